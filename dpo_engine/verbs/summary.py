"""Build the summary that `check` prints. It describes the run, from its model and layout to its memory and warnings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from dpo_engine.config.rules import reads_reference
from dpo_engine.config.run import Config
from dpo_engine.config.sections import Source
from dpo_engine.data.formats import FORMATS, recognize
from dpo_engine.data.hub import model_directory
from dpo_engine.data.records import count_records
from dpo_engine.data.sources import Shards, find_shards
from dpo_engine.data.tokenizer import Tokenizer, load_tokenizer
from dpo_engine.errors import DataError
from dpo_engine.model.adaptation import adapter_lines
from dpo_engine.model.architecture import Architecture, read_architecture
from dpo_engine.model.batch_size import ENOUGH, largest_micro_batch
from dpo_engine.model.megatron_options import instances_of
from dpo_engine.model.memory import OUTSIDE, gib, memory
from dpo_engine.model.parameter_counts import active_parameters, parameters
from dpo_engine.model.stages import parallel_dims
from dpo_engine.model.weights.export import GENERATION, companions, config_text
from dpo_engine.model.weights.peft import adaptation_of, other_base
from dpo_engine.model.weights.tokenizer_files import exported_tokenizer
from dpo_engine.optim.forecast import schedule_warnings
from dpo_engine.platform.device import gpu_memory, gpu_present, has_transformer_engine
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.training.evaluation_settings import interval_problems, intervals_in_steps
from dpo_engine.verbs.first_records import FIRST_RECORDS, record_warnings

COUNTED_BYTES = 1 << 30


def summarize(config: Config, world_size: int | None, tried: Sequence[tuple[str, str]] = ()) -> list[str]:
    """Return a description of a run that passed `check`, as lines to print.

    world_size  number of ranks; None: the smallest number that the layout allows
    tried       lines about the parts of the run that were tried, each with its subject; see
                :mod:`~dpo_engine.verbs.dry_run`
    """
    parallel = config.parallel
    arch = read_architecture(config.model.path)
    dims = parallel_dims(config, arch, world_size or ParallelDims.fewest(parallel))
    pairs = _training_pairs(config)
    tokenizer = load_tokenizer(config.tokenizer_path, config.data.chat_template)
    lines = [
        ("model", _model(arch, dims)),
        *(("adapter", line.removeprefix("adapter: ")) for line in _adapter(config, arch)),
        ("layout", _layout(config, dims, world_size, experts=arch.experts is not None)),
        ("batch", _batch(config, dims)),
        *(("data", line) for line in [*_data(config), *filter(None, [tokenizer.note])]),
        ("steps", _steps(config, pairs)),
        *(("", line) for line in _intervals(config, pairs)),
        ("loss", _loss(config)),
        *(("auto", line) for line in _auto(config, dims)),
        *(("export", line) for line in _export(config, tokenizer)),
        *_memory(config, arch, dims),
        *tried,
        *(("warning", line) for line in [*run_warnings(config), *record_warnings(config, tokenizer)]),
    ]
    return [f"  {name:<8}{text}" for name, text in lines]


def _model(arch: Architecture, dims: ParallelDims) -> str:
    count = parameters(arch)
    padded = dims.padded_vocab(arch.vocab_size)
    rows = f"{arch.vocab_size}" + (f" (padded to {padded})" if padded != arch.vocab_size else "")
    active = active_parameters(arch)
    used = f", of which a token uses {_short(active)} ({active:,})" if active != count else ""
    return (
        f"{arch.model_type}, {_short(count)} parameters ({count:,}){used}, {arch.num_layers} layers, "
        f"hidden size {arch.hidden_size}, vocabulary {rows}"
    )


def _adapter(config: Config, arch: Architecture) -> list[str]:
    return adapter_lines(config.adapter, adaptation_of(config.adapter, arch), arch) if config.adapter else []


def _layout(config: Config, dims: ParallelDims, world_size: int | None, *, experts: bool) -> str:
    sizes = f"tp {dims.tp} x pp {dims.pp} x cp {dims.cp} x dp {dims.dp} = {_count(dims.world, 'rank')}"
    parts = [sizes + ("" if world_size else " (the minimum; pass --world-size N to change it)")]
    if dims.vpp:
        parts.append(f"{dims.vpp} model chunks per stage")
    if dims.layers:
        parts.append(f"layers {dims.division}")
    if experts:
        parts.append(f"experts: ep {dims.ep} x etp {dims.etp} x dp {dims.expert_dp} in each stage")
    instances = instances_of(config)
    if config.parallel.distributed_optimizer and dims.dp * dims.cp > instances:
        parts.append(f"optimizer state sharded over {dims.dp * dims.cp // instances} ranks")
        if experts:
            parts[-1] += f", and the experts' state over {dims.expert_dp // instances}"
    return ", ".join(parts)


def _batch(config: Config, dims: ParallelDims) -> str:
    pairs, micro = config.train.global_batch_size, config.train.micro_batch_size
    if micro is None or config.batch.layout == "tree":
        budget = config.batch.tokens_per_micro_batch
        if micro is not None:
            room = f"at most the total length of the {_count(micro, 'longest pair')}"
        else:
            room = "a size that fits the device" if budget == "auto" else f"at most {budget:,} tokens"
        trees = " as trees" if config.batch.layout == "tree" else ""
        return f"{_count(pairs, 'pair')} per step{trees}, dp {dims.dp}, micro-batches of {room}"
    number = -(-pairs // (dims.dp * micro))
    if dims.vpp:
        # In an interleaved schedule, the number of micro-batches must be a multiple of the number of stages.
        number = -(-number // dims.pp) * dims.pp
    places = number * micro * dims.dp
    text = (
        f"{_count(pairs, 'pair')} per step = dp {dims.dp} x {_count(number, 'micro-batch', 'es')} "
        f"x {_count(micro, 'pair')}"
    )
    return text if places == pairs else f"{text}, {places - pairs} of {places} slots empty"


def _data(config: Config) -> list[str]:
    """Return a description of the data sources, one line per source."""
    lines = []
    for key, sources in (("train", config.data.train), ("validation", config.data.validation or ())):
        for source in sources:
            records = count(source)
            number = "not counted (large file)" if records is None else _count(records, "record")
            weight = f", weight {source.weight:g}" if len(sources) > 1 and key == "train" else ""
            lines.append(f"{key} {source.path}: {number}, format {_format(source, config)}{weight}")
    lines.append(
        f"checked the first {FIRST_RECORDS} records of each source; training reads all records before its first step"
    )
    if config.data.validation_fraction:
        lines.append(f"validation: about {config.data.validation_fraction:g} of the prompts in data.train are held out")
    return lines


def _format(source: Source, config: Config) -> str:
    if source.format != "auto":
        return source.format
    name, _ = recognize(source.path, source.format, source.columns, skip=config.data.on_bad_line == "skip") or ("?", {})
    return f"{name} (auto)"


def count(source: Source) -> int | None:
    """Count the records of a source, including bad ones.

    Return None if the source has too much JSON to be counted quickly, or if the source cannot be read.
    """
    shards = find_shards(source.path)
    if shards.suffix.startswith(".json"):
        if shards.size > COUNTED_BYTES // (1 if shards.suffix in (".jsonl", ".json") else 8):
            return None
    states = [file.stat() for file in shards.files]
    total = _total(shards, COUNTED_BYTES, tuple((state.st_size, state.st_mtime_ns) for state in states))
    if total is None or shards.part is None:
        return total
    start, stop = shards.part.bounds(total)
    return max(int(min(stop, total)) - start, 0)


@lru_cache(maxsize=256)
def _total(shards: Shards, limit: int, versions: tuple[tuple[int, int], ...]) -> int | None:
    """Count the records of all files, for `count`. The result is cached, because several summary lines need it.

    limit     maximum number of JSON bytes to read
    versions  size and modification time of each file; a file that changes is counted again
    """
    try:
        return count_records(shards, limit)
    except DataError:  # reported, with its line number, by the code that reads records
        return None


def run_warnings(config: Config) -> list[str]:
    """Return a line for each setting that makes the run train or evaluate wrongly, but raises no error."""
    steps, _ = _most_steps(config, _training_pairs(config))
    found = schedule_warnings(config.optim, steps) if steps else []
    found += other_base(config.adapter, config.model.path)
    ours = [source.path for source in config.data.train]
    for source in config.data.validation or ():
        if source.path in ours:
            found.append(
                f"data.validation: {source.path} is also in data.train, so evaluations look better than they should; "
                "use other records"
            )
    return found


def most_pairs(config: Config) -> int | None:
    """Return the largest possible number of pairs in data.train, including pairs held out by data.validation_fraction.

    Return None if the records are not counted, or if a record can contain several pairs.
    """
    data = config.data
    counts = [count(source) for source in data.train]
    if None in counts or any(getattr(FORMATS[source.format], "several", False) for source in data.train):
        return None
    return min(sum(counts), data.max_pairs or sum(counts))


def _training_pairs(config: Config) -> int | None:
    """Estimate the number of training pairs from the number of records. Return None if :func:`most_pairs` does."""
    most = most_pairs(config)
    return None if most is None else round(most * (1 - config.data.validation_fraction))


def _intervals(config: Config, pairs: int | None) -> list[str]:
    """Return lines about intervals given in epochs: their problems or, if there are none, their lengths in steps."""
    if not pairs:
        return []
    epoch = -(-pairs // config.train.global_batch_size)
    return interval_problems(config, epoch) or [f"{line}, or fewer" for line in intervals_in_steps(config, epoch)]


def _most_steps(config: Config, pairs: int | None) -> tuple[int | None, int | None]:
    """Return the largest possible numbers of steps in the run and in an epoch; None if unknown.

    pairs  estimated number of training pairs; None: not counted
    """
    train = config.train
    if pairs is None:
        return train.max_steps, None
    epoch = -(-pairs // train.global_batch_size)
    return min(train.epochs * epoch, train.max_steps or train.epochs * epoch), epoch


def _steps(config: Config, pairs: int | None) -> str:
    """Describe the numbers of steps and pairs. They can be smaller in the run, because tokenization can drop pairs."""
    steps, epoch = _most_steps(config, pairs)
    if pairs is None or steps is None:
        return f"at most {steps}" if steps else "unknown until the pairs are counted"
    about = "about" if config.data.validation_fraction else "at most"
    optim = config.optim
    warmup = optim.warmup_steps if optim.warmup_steps is not None else math.ceil(steps * (optim.warmup_ratio or 0))
    return (
        f"{about} {_count(steps, 'step')} ({epoch:,} per epoch) over {_count(pairs, 'pair')}"
        + (f", {_count(warmup, 'warmup step')}" if warmup else "")
        + "; fewer if pairs are dropped"
    )


def _loss(config: Config) -> str:
    given = {**config.loss.settings, **config.loss.options}
    options = "".join(f", {name} {value}" for name, value in given.items())
    return f"{config.loss.name}{options}; {_reference(config)}"


def _reference(config: Config) -> str:
    asked = config.reference
    if not reads_reference(config):
        return "no reference"
    weights = f"reference {config.reference_name}"
    return {
        "resident": f"{weights}, resident"
        + (f", sync_alpha {asked.sync_alpha} every {_count(asked.sync_every, 'step')}" if asked.sync_every else ""),
        "shared": f"{weights}, the policy's own model "
        + ("with the adapter that training starts from" if config.reference_has_adapter else "without its adapter")
        + (f", copied from the policy every {_count(asked.sync_every, 'step')}" if asked.sync_every else ""),
        "offloaded": f"{weights}, kept in host memory, loaded for {_count(asked.ahead, 'step')} at a time",
        "stored": f"{weights}, log-probabilities stored in {config.store_path}; reference.missing: {asked.missing}",
        "dataset": "reference log-probabilities from the records",
    }[config.reference_mode]


def _auto(config: Config, dims: ParallelDims) -> list[str]:
    """Return lines about keys whose values the engine chooses. A line names the value, or what the choice depends on.

    Some keys with the value `auto` have no line here, for example model.attention.
    """
    lines = []
    if config.parallel.sequence_parallel == "auto":
        lines.append(f"parallel.sequence_parallel: {'on' if dims.tp > 1 else 'off'}, because parallel.tp is {dims.tp}")
    here = f"this machine has {'a' if gpu_present() else 'no'} GPU"
    if config.model.dtype == "auto":
        lines.append(f"model.dtype: bf16 on a GPU, fp32 on a CPU; {here}")
    if config.batch.layout == "auto":
        lines.append("batch.layout: tree if it saves enough tokens and is fast on the device, otherwise stacked")
    if config.batch.tokens_per_micro_batch == "auto" and config.train.micro_batch_size is None:
        lines.append(
            f"batch.tokens_per_micro_batch: {ENOUGH['gpu'] * dims.cp:,} on a GPU with enough memory, "
            f"{ENOUGH['cpu'] * dims.cp:,} on a CPU; fewer if pipeline stages would be idle otherwise, but enough for "
            f"the longest pair; {here}"
        )
    if (by := config.checkpoint.keep_best) and by.mode is None:
        lines.append(f"checkpoint.keep_best.mode: {by.direction} for {by.metric}")
    if config.model.spec == "auto":
        engine = "installed" if has_transformer_engine() else "not installed"
        lines.append(f"model.spec: te on a GPU if Transformer Engine ({engine}) suits the model, else native; {here}")
    return lines


def _export(config: Config, tokenizer: Tokenizer) -> list[str]:
    """Return a line for each property of the run's tokenizer that the export cannot keep."""
    source, own = model_directory(config.model.path), config.model.tokenizer
    if not config.checkpoint.export or (own is None and config.data.chat_template is None and tokenizer.note is None):
        # Without an export, nothing can be lost. Otherwise, the run uses the tokenizer in the model's own files. These
        # files are exported, and transformers reads the same tokenizer from them.
        return []
    files = {
        name: path
        for name, path in companions(source, own and model_directory(own, "model.tokenizer")).items()
        if name != GENERATION
    }
    return exported_tokenizer(files, config_text(source, None), tokenizer).notes


def _memory(config: Config, arch: Architecture, dims: ParallelDims) -> list[tuple[str, str]]:
    asked = config.model.dtype
    dtypes = [asked] if asked != "auto" else ["bf16"] if gpu_present() else ["bf16", "fp32"]
    lines = []
    for dtype in dtypes:
        # If the GPU's memory is unknown, show the least memory that is enough for the run.
        size = gpu_memory() if gpu_present() else 0 if dtype == "bf16" else None
        tokens = largest_micro_batch(config, arch, dims, dtype=dtype, device_memory=size)
        cost = memory(config, arch, dims, dtype=dtype, tokens=tokens)
        stage = f" of stage {cost.stage} (the largest)" if dims.pp > 1 else ""
        lines.append(
            (
                "memory",
                f"{dtype}: {gib(cost.peak)} per rank{stage} = {cost.terms}; largest micro-batch: "
                f"{'at least ' * (size == 0)}{tokens:,} tokens; "
                f"CUDA and NCCL need about {gib(OUTSIDE)} more{cost.on_host}",
            )
        )
        lines.append(("", cost.formula))
    return lines


def _short(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"
