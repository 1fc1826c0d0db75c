"""Checks of a run before it starts. They need no Megatron, and they report all problems at once."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from dpo_engine.config.rules import contradictions, facts_of, is_broken, loss_problems
from dpo_engine.config.run import Config, import_plugins
from dpo_engine.config.sections import Source
from dpo_engine.data.encode import Limits, encode_pairs
from dpo_engine.data.formats import FORMATS, read_pairs
from dpo_engine.data.pair import REFERENCE_LOGPS
from dpo_engine.data.records import BadLines, BadRecord
from dpo_engine.data.sources import find_shards, locate
from dpo_engine.data.tokenizer import Tokenizer, load_tokenizer
from dpo_engine.errors import ConfigError, DataError, printable
from dpo_engine.model.architecture import Architecture, read_architecture, read_config_json
from dpo_engine.model.weights.export import Export
from dpo_engine.model.weights.files import CheckpointFiles, check_tensors
from dpo_engine.objective.losses import judged_fields
from dpo_engine.platform.parallel import ParallelDims
from dpo_engine.wording import join, nearest, show

LAUNCH = "-m dpo_engine train RUN.yaml"
FIRST_RECORDS = 8


@dataclass
class Findings:
    """Problems of the configuration (`path=value: rule; way out`) and of the records (`file:line: what`)."""

    config: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)

    def catch(self, error: ConfigError | DataError) -> None:
        """Add the problems of an error, without duplicates."""
        kept = self.data if isinstance(error, DataError) else self.config
        kept.extend(problem for problem in error.problems if problem not in kept)


def check(config: Config, world_size: int | None = None) -> list[str]:
    """Return every problem of a run that passed the schema.

    world_size  number of ranks; None: as few as the layout needs
    """
    found = examine(config, world_size)
    return found.config + found.data


def examine(
    config: Config, world_size: int | None = None, *, broken: frozenset[str] = frozenset(), launch: str = LAUNCH
) -> Findings:
    """Import the plugins of a run and find every problem that the schema does not cover.

    world_size  number of ranks; None: as few as the layout needs
    broken      keys with invalid values; checks that depend on them are skipped
    launch      arguments for torchrun in the message about a wrong number of ranks
    """
    found = Findings()

    def whole(*keys: str) -> bool:
        return not any(is_broken(key, broken) for key in keys)

    plugins = import_plugins(config.plugins) if whole("plugins") else []
    found.config += plugins + contradictions(config, broken)
    if whole("loss", "plugins") and not plugins:
        found.config += loss_problems(config)
    arch = _architecture("model.path", config.model.path, found) if whole("model.path") else None
    if arch and whole("reference") and config.reference.path and config.reference.mode != "none":
        _reference(config.reference.path, arch, found)
    if whole("parallel"):
        found.config += _layout(config, world_size, arch, launch)
    if arch and whole("data.max_length"):
        found.config += _lengths(config, arch)
    if whole("train.output_dir"):
        found.config += _writable("train.output_dir", config.train.output_dir)
    if whole("checkpoint.export", "train.output_dir", "model.path") and config.checkpoint.export:
        export = Export(Path(config.train.output_dir) / "hf")
        if refusal := export.refusal(Path(config.model.path)):
            way_out = "change train.output_dir, or set checkpoint.export=false"
            found.config.append(f"checkpoint.export=true: {export.directory} {refusal}; {way_out}")
    if whole("data.cache_dir") and config.data.cache_dir:
        found.config += _writable("data.cache_dir", config.data.cache_dir)
    if whole("reference.store") and config.reference.store:
        found.config += _writable("reference.store", config.reference.store)
    if whole("logging"):
        found.config += _trackers(config)
    tokenizer = None
    if whole("model.path", "model.tokenizer", "data.chat_template"):
        tokenizer = _tokenizer(config, arch, found)
    for key in ("train", "validation"):
        if whole(f"data.{key}", "plugins") and not plugins:
            for index, source in enumerate(getattr(config.data, key) or ()):
                _source(f"data.{key}[{index}]", source, tokenizer, config, found)
    return found


def _architecture(key: str, path: str, found: Findings) -> Architecture | None:
    """Read a checkpoint's architecture and compare it with the tensors that the headers of its files list."""
    try:
        arch = read_architecture(path, key)
    except ConfigError as error:
        found.catch(error)
        return None
    try:
        check_tensors(CheckpointFiles(path, key), arch)
    except ConfigError as error:
        found.catch(error)
    return arch


def _reference(path: str, arch: Architecture, found: Findings) -> None:
    reference = _architecture("reference.path", path, found)
    if reference:
        found.config += [
            f"reference.path={path}: must have the policy's architecture, but has {difference}; use a checkpoint with "
            "the same architecture"
            for difference in arch.differences(reference)
        ]


def _layout(config: Config, world_size: int | None, arch: Architecture | None, launch: str) -> list[str]:
    """Check the layout against the number of ranks and against the model."""
    parallel = config.parallel
    needed = parallel.tp * parallel.pp * parallel.cp
    world = needed if world_size is None else world_size
    problems = []
    if world % needed:
        sizes = f"parallel.tp={parallel.tp} x parallel.pp={parallel.pp} x parallel.cp={parallel.cp}"
        multiples = [needed * factor for factor in (world // needed, world // needed + 1) if factor]
        problems.append(
            f"{sizes}: the number of ranks must be a multiple of {needed}, but is {world}; start {join(multiples)} "
            f"ranks, for example: {torchrun(needed)} {launch}"
        )
        world = needed
    if parallel.overlap and world_size is not None and world == parallel.tp * parallel.pp:
        problems.append(
            f"parallel.overlap=true: needs dp x cp of at least 2, but it is 1 with {world} "
            f"rank{'' if world == 1 else 's'}; remove it, or use at least {2 * needed} ranks"
        )
    if arch:
        dims = ParallelDims(parallel.tp, parallel.pp, parallel.vpp, parallel.cp, parallel.ep, world)
        # contradictions() already reports a vpp without pipeline stages.
        problems += [line for line in dims.problems(arch) if parallel.pp > 1 or not line.startswith("parallel.vpp")]
    return problems


def torchrun(world: int) -> str:
    """Return the torchrun command for `world` ranks, on nodes of 8 ranks each if one node is not enough."""
    if world > 8 and world % 8 == 0:
        return f"torchrun --nnodes {world // 8} --nproc-per-node 8"
    return f"torchrun --nproc-per-node {world}"


def _lengths(config: Config, arch: Architecture) -> list[str]:
    length, problems = config.data.max_length, []
    if length > arch.max_positions:
        problems.append(
            f"data.max_length={length}: must be at most {arch.max_positions}, the model's maximum number of positions; "
            "lower it"
        )
    if arch.sliding_window is not None and length > arch.sliding_window:
        problems.append(
            f"data.max_length={length}: must be at most {arch.sliding_window}, the model's sliding window, because the "
            "engine does not support sliding-window attention; lower it"
        )
    return problems


def _writable(key: str, directory: str) -> list[str]:
    """Check that a directory can be created, from the permissions of its nearest existing parent."""
    place = Path(directory).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        return [f"{key}={directory}: {place} is not a directory; set another path"]
    if not os.access(place, os.W_OK | os.X_OK):
        return [f"{key}={directory}: {place} is not writable; change its permissions, or set another path"]
    return []


def _trackers(config: Config) -> list[str]:
    """Report the trackers that the run uses but whose packages are not installed."""
    logging = config.logging
    asked = {
        "tensorboard": ("tensorboard", True if logging.tensorboard else None),
        "wandb": ("wandb.project", logging.wandb and logging.wandb.project),
        "mlflow": ("mlflow.experiment", logging.mlflow and logging.mlflow.experiment),
    }
    return [
        f"logging.{key}={show(value)}: the package {name} is not installed; run pip install 'dpo-engine[{name}]', or "
        "remove it"
        for name, (key, value) in asked.items()
        if value is not None and importlib.util.find_spec(name) is None
    ]


def _tokenizer(config: Config, arch: Architecture | None, found: Findings) -> Tokenizer | None:
    """Load the tokenizer and check it against the model; None if it cannot be used to encode records."""
    template = config.data.chat_template
    if template is not None and not Path(template).is_file():
        found.config.append(f"data.chat_template={template}: no such file; set the path of a Jinja template")
        return None
    if config.model.tokenizer is None:
        try:
            read_config_json(config.model.path)
        except ConfigError:
            return None  # already reported for model.path
    try:
        tokenizer = load_tokenizer(config.tokenizer_path, template)
    except ConfigError as error:
        found.catch(error)
        return None
    key = "model.tokenizer" if config.model.tokenizer else "model.path"
    if arch and tokenizer.vocab_size > arch.vocab_size:
        found.config.append(
            f"{key}={config.tokenizer_path}: has {tokenizer.vocab_size} tokens, but the model has only "
            f"{arch.vocab_size} embedding rows; use the tokenizer that the model was trained with"
        )
    if config.data.add_eos and tokenizer.eos_id is None:
        found.config.append(
            f"data.add_eos=true: the tokenizer of {config.tokenizer_path} has no EOS token; use a tokenizer with one, "
            "or set data.add_eos=false"
        )
        return None
    return tokenizer


def _source(key: str, source: Source, tokenizer: Tokenizer | None, config: Config, found: Findings) -> None:
    """Check that the files of a source exist, that its format is known, and that its first records can be encoded."""
    problems = []
    try:
        find_shards(source.path)
    except DataError as error:
        problems.append(f"{key}.path={error}")
    if source.format not in FORMATS:
        near = nearest(source.format, list(FORMATS))
        hint = f"did you mean {near}? " if near else ""
        problems.append(
            f"{key}.format={source.format}: no such data format; {hint}registered formats: "
            f"{join(sorted(FORMATS), 'and')}"
        )
    if problems:
        found.config += problems
        return
    data, bad = config.data, BadLines(skip=config.data.on_bad_line == "skip")
    limits = Limits(data.max_length, data.max_prompt_length, data.truncation, data.add_eos)
    try:
        rows = islice(read_pairs(source.path, source.format, bad), FIRST_RECORDS)
        items = [(line, pair) for line, pairs in rows for pair in pairs]
        usable = len(items)
        facts = facts_of(config.loss)
        read = {field: f"loss {config.loss.name}" for field in judged_fields(facts.needs_data if facts else ())}
        if facts and facts.needs_reference and config.reference.mode == "dataset":
            read |= dict.fromkeys(REFERENCE_LOGPS, "reference.mode=dataset")
        for field, reader in read.items():
            line = next((line for line, pair in items if getattr(pair, field) is None), None)
            if line is not None:
                where = locate(source.path, line)
                found.data.append(f"{where}: missing field '{field}', required by {reader}; add it to every record")
        if tokenizer:
            made = encode_pairs([pair for _, pair in items], tokenizer, limits, source=0)
            for (line, _), result in zip(items, made, strict=True):
                if isinstance(result, BadRecord):
                    usable -= 1
                    bad.add(source.path, line, result)
        if not usable:
            first = bad.first[0].removeprefix(f"{printable(source.path)}:") if bad.first else ""
            shown = first if not bad.first or first == bad.first[0] else f"line {first}"
            found.data.append(f"{source.path}: contains no usable pair" + (shown and f"; {shown}"))
    except (ConfigError, DataError) as error:
        found.catch(error)
