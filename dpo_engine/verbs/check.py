"""Check a run before it starts, without Megatron, and report all problems at once."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from dpo_engine.config.rules import contradictions, facts_of, is_broken, loss_problems
from dpo_engine.config.run import Config, import_plugins
from dpo_engine.config.sections import Source
from dpo_engine.data.columns import target_problems
from dpo_engine.data.encode import Limits, dropped_text, encode_pairs
from dpo_engine.data.formats import FORMATS, read_pairs, recognize
from dpo_engine.data.pair import REFERENCE_LOGPS
from dpo_engine.data.records import BadLines, BadRecord
from dpo_engine.data.sources import find_shards, locate
from dpo_engine.data.tokenizer import Tokenizer, load_tokenizer
from dpo_engine.errors import ConfigError, DataError, printable
from dpo_engine.model.architecture import Architecture, read_architecture, read_config_json
from dpo_engine.model.cuda_graphs import graph_problems
from dpo_engine.model.megatron_options import layout_problems, megatron_problems
from dpo_engine.model.stages import parallel_dims
from dpo_engine.model.weights.export import Export
from dpo_engine.model.weights.files import CheckpointFiles, check_tensors
from dpo_engine.model.weights.freeze import freeze_problems, router_problems
from dpo_engine.model.weights.peft import adapter_problems
from dpo_engine.objective.losses import judged_fields
from dpo_engine.optim.optimizers import optimizer_problems
from dpo_engine.optim.schedules import schedule_problems
from dpo_engine.options import name_problem
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.reporting.sinks import SINKS, sink_problems
from dpo_engine.training.callbacks import callback_problems
from dpo_engine.training.evaluation_settings import metric_problems
from dpo_engine.verbs.first_records import FIRST_RECORDS, all_dropped
from dpo_engine.wording import join, show

LAUNCH = "-m dpo_engine train RUN.yaml"
OF_MEGATRON = ("model.recompute", "model.spec", "model.dtype", "parallel", "optim", "reference", "adapter", "batch")
REGISTERED: dict[tuple[str, ...], Callable[[Config], list[str]]] = {
    ("loss",): loss_problems,
    ("callbacks",): callback_problems,
    ("logging.sinks",): sink_problems,
    ("megatron", *OF_MEGATRON): megatron_problems,
    ("optim.schedule", "optim.schedule_options"): schedule_problems,
    ("optim.optimizer", "optim.optimizer_options", "parallel.distributed_optimizer"): optimizer_problems,
}
"""The functions that check registered names or Megatron-Core options, by the keys that each function reads."""


@dataclass
class Findings:
    """Problems of the configuration (`path=value: rule; way out`) and of the records (`file:line: problem`)."""

    config: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)

    def catch(self, error: ConfigError | DataError) -> None:
        """Add the problems of an error, without duplicates."""
        kept = self.data if isinstance(error, DataError) else self.config
        kept.extend(problem for problem in error.problems if problem not in kept)


def check(config: Config, world_size: int | None = None) -> list[str]:
    """Return a line for each problem found in a run whose configuration is valid according to the schema.

    world_size  number of ranks; None: the smallest number that the layout allows
    """
    found = examine(config, world_size)
    return found.config + found.data


def examine(
    config: Config, world_size: int | None = None, *, broken: frozenset[str] = frozenset(), launch: str = LAUNCH
) -> Findings:
    """Import the plugins of a run and find problems that the schema does not cover.

    Of each data source, only the first records are read. If all of these would be dropped, more records are read.

    world_size  number of ranks; None: the smallest number that the layout allows
    broken      keys with invalid values; checks that depend on these keys are skipped
    launch      arguments for torchrun, shown in the error about a wrong number of ranks
    """
    found = Findings()

    def whole(*keys: str) -> bool:
        return not any(is_broken(key, broken) for key in keys)

    plugins = import_plugins(config.plugins) if whole("plugins") else []
    found.config += plugins + contradictions(config, broken)
    for keys, problems in REGISTERED.items():
        if whole(*keys, "plugins") and not plugins:
            found.config += problems(config)
    decide = ("checkpoint", "callbacks", "loss", "data", "logging", "reference", "adapter")
    if whole(*decide) and not plugins:
        found.config += metric_problems(config)
    arch = _architecture("model.path", config.model.path, found) if whole("model.path") else None
    if arch and whole("reference") and config.reference.path and config.reference_mode != "none":
        _reference(config.reference.path, arch, found)
    if arch and whole("adapter"):
        found.config += adapter_problems(config.adapter, arch, config.parallel.tp)
    if arch and whole("optim.freeze", "train.freeze_router", "loss"):
        found.config += freeze_problems(config.optim.freeze, arch) + router_problems(config, arch)
    if whole("parallel"):
        found.config += _layout(config, world_size, arch, launch)
    if arch and whole("data.max_length"):
        found.config += _lengths(config, arch)
    if whole("train.output_dir"):
        found.config += _writable("train.output_dir", config.train.output_dir)
    if whole("checkpoint.export", "train.output_dir", "model.path") and config.checkpoint.export:
        start = config.adapter and config.adapter.path
        for name in ("hf", "hf_adapter") if config.adapter else ("hf",):
            export = Export(Path(config.train.output_dir) / name)
            if refusal := export.refusal(Path(config.model.path), Path(start) if start else None):
                way_out = "change train.output_dir, or set checkpoint.export=false"
                value = show(config.checkpoint.export)
                found.config.append(f"checkpoint.export={value}: {export.directory} {refusal}; {way_out}")
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
    """Read a checkpoint's architecture (None if unreadable), and check that the weight files match the architecture."""
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
    needed = ParallelDims.fewest(parallel)
    world = needed if world_size is None else world_size
    problems = []
    if world % needed:
        sizes = f"parallel.tp={parallel.tp} x parallel.pp={parallel.pp} x parallel.cp={parallel.cp}"
        if needed != parallel.tp * parallel.pp * parallel.cp:
            etp = ParallelDims.of(parallel, needed).etp
            sizes += f", and parallel.etp={etp} x parallel.ep={parallel.ep} in each of the {parallel.pp} stages"
        multiples = [needed * factor for factor in (world // needed, world // needed + 1) if factor]
        problems.append(
            f"{sizes}: the number of ranks must be a multiple of {needed}, but is {world}; start {join(multiples)} "
            f"ranks, for example: {torchrun(needed)} {launch}"
        )
        world = needed
    if parallel.overlap and world_size is not None and world == parallel.tp * parallel.pp:
        problems.append(
            f"parallel.overlap=true: requires dp x cp >= 2, but dp x cp is 1 with {world} "
            f"rank{'' if world == 1 else 's'}; remove parallel.overlap, or use at least {2 * needed} ranks"
        )
    if arch:
        if arch.experts and parallel.tp > 1 and parallel.sequence_parallel is False:
            problems.append(
                "parallel.sequence_parallel=false: is not possible with experts and tp > 1, because each "
                "tensor-parallel rank must send its own tokens to the experts; remove parallel.sequence_parallel"
            )
        dims = parallel_dims(config, arch, world)
        # contradictions() already reports parallel.vpp without pipeline stages.
        problems += [line for line in dims.problems(arch) if parallel.pp > 1 or not line.startswith("parallel.vpp")]
        problems += layout_problems(config, arch, dims, ranks=world_size is not None) + graph_problems(config, arch)
    return problems


def torchrun(world: int) -> str:
    """Return the torchrun command for `world` ranks: on one node, or on nodes with 8 ranks each."""
    if world > 8 and world % 8 == 0:
        return f"torchrun --nnodes {world // 8} --nproc-per-node 8"
    return f"torchrun --nproc-per-node {world}"


def _lengths(config: Config, arch: Architecture) -> list[str]:
    length = config.data.max_length
    if length <= arch.max_positions:
        return []
    return [
        f"data.max_length={length}: must be at most {arch.max_positions}, the model's maximum number of positions; "
        "lower data.max_length"
    ]


def _writable(key: str, directory: str) -> list[str]:
    """Check, from the permissions of the nearest existing parent, that a directory can be created and written to."""
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
    missing = [
        f"logging.{key}={show(value)}: the package {name} is not installed; run pip install 'dpo-engine[{name}]', or "
        f"remove logging.{name}"
        for name, (key, value) in asked.items()
        if value is not None and importlib.util.find_spec(name) is None
    ]
    packages = {name: getattr(SINKS[name], "package", None) for name in logging.sinks if name in SINKS}
    return missing + [
        f"logging.sinks.{name}: the package {package} is not installed; run pip install {package}, or remove the sink"
        for name, package in packages.items()
        if package and importlib.util.find_spec(package) is None
    ]


def _tokenizer(config: Config, arch: Architecture | None, found: Findings) -> Tokenizer | None:
    """Load the tokenizer and check that it fits the model. Return None if the records cannot be encoded."""
    template = config.data.chat_template
    if template is not None and not Path(template).is_file():
        found.config.append(f"data.chat_template={template}: no such file; set the path of a Jinja template")
        return None
    if config.model.tokenizer is None:
        try:
            read_config_json(config.model.path)
        except ConfigError:
            return None  # this problem is already reported for model.path
    try:
        tokenizer = load_tokenizer(config.tokenizer_path, template)
    except ConfigError as error:
        found.catch(error)
        return None
    key = "model.tokenizer" if config.model.tokenizer else "model.path"
    if arch:
        tokenizer.rows = arch.vocab_size
        # Added tokens without an embedding row, such as a padding token, do no harm unless a text contains them.
        absent = [token for token in range(arch.vocab_size, tokenizer.vocab_size) if token not in tokenizer.end_ids]
        if absent:
            names = ", ".join(repr(tokenizer.name_of(token)) for token in absent[:3])
            found.config.append(
                f"{key}={config.tokenizer_path}: has {tokenizer.vocab_size} tokens, but the model has only "
                f"{arch.vocab_size} embedding rows, and no row for {names}{', ...' if len(absent) > 3 else ''}; use "
                "the tokenizer with which the model was trained"
            )
    if config.data.add_eos and tokenizer.eos_id is None:
        found.config.append(
            f"data.add_eos={show(config.data.add_eos)}: the tokenizer in {config.tokenizer_path} has no EOS token; use "
            "a tokenizer that has an EOS token, or set data.add_eos=false"
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
        given = f"{key}.format={source.format}"
        problems.append(name_problem(FORMATS, source.format, given, plugins=bool(config.plugins)))
    else:
        problems += [
            f"{key}.columns.{name}={source.columns[name]}: {rule}"
            for name, rule in target_problems(source.columns or {}, source.format)
        ]
    if problems:
        found.config += problems
        return
    bad, limits = BadLines(skip=config.data.on_bad_line == "skip"), Limits.of(config.data)
    try:
        rows = list(islice(read_pairs(source.path, source.format, bad, source.columns), FIRST_RECORDS))
        items = [(line, pair) for line, pairs in rows for pair in pairs]
        usable = len(items)
        facts = facts_of(config.loss)
        read = {field: f"loss {config.loss.name}" for field in judged_fields(facts.needs_data if facts else ())}
        if facts and facts.needs_reference and config.reference_mode == "dataset":
            read |= dict.fromkeys(REFERENCE_LOGPS, "reference.mode=dataset")
        for field, reader in read.items():
            line = next((line for line, pair in items if getattr(pair, field) is None), None)
            if line is not None:
                where = locate(source.path, line)
                found.data.append(f"{where}: missing field '{field}', required by {reader}; add it to every record")
        if tokenizer and tokenizer.chat_template is None and any(not isinstance(pair.prompt, str) for _, pair in items):
            found.catch(ConfigError(_no_template(source, tokenizer, bad.skip)))
        elif tokenizer:
            made = encode_pairs([pair for _, pair in items], tokenizer, limits, source=0)
            dropped: Counter[str] = Counter()
            for (line, _), result in zip(items, made, strict=True):
                if isinstance(result, BadRecord):
                    usable -= 1
                    bad.add(source.path, line, result)
                elif result.dropped:
                    dropped[result.dropped] += 1
            if usable and usable == dropped.total() and (all_of_them := all_dropped(source, tokenizer, config)):
                found.data.append(f"{source.path}: contains no usable pair{dropped_text(all_of_them)}")
        if not usable:
            first = bad.first[0].removeprefix(f"{printable(source.path)}:") if bad.first else ""
            shown = first if not bad.first or first == bad.first[0] else f"line {first}"
            found.data.append(f"{source.path}: contains no usable pair" + (shown and f"; {shown}"))
    except (ConfigError, DataError) as error:
        found.catch(error)


def _no_template(source: Source, tokenizer: Tokenizer, skip: bool) -> str:
    """Return the error line for records that are read as conversations although there is no chat template."""
    name, row = recognize(source.path, source.format, source.columns, skip=skip) or (source.format, {})
    fields = join([repr(field) for field in getattr(FORMATS[name], "fields", ()) if field in row], "and")
    return (
        f"data.chat_template=null: {source.path} is read as conversations (format {name}: {fields}), but the tokenizer "
        f"of {tokenizer.path} has no chat template; set data.chat_template to a file with a Jinja template, or use "
        "text records"
    )
