"""``dpo-engine plan``: list the fastest parallel layouts that fit on a given number of GPUs.

The prediction needs neither a GPU nor Megatron. Memory is computed by :mod:`~dpo_engine.model.memory`. The predicted
time of a step is the sum of these parts:

- the time of the slowest stage's operations; the speed is `EFFICIENCY` times the GPU's peak FLOP/s
- the time to send the bytes of each kind of communication; the speed is that of the link
- the time of the optimizer's update, if the update runs on the host
- the pipeline bubble

Use the prediction to compare layouts; it is not the exact time of a step. Each row (a prompt with one response) is
assumed to have ``data.max_length`` tokens, which is the worst case. In layers with a sliding window, each token attends
only to the keys within the window. The communication between context-parallel ranks is predicted as if no layer had a
window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpo_engine.batching.packing import visible_pairs
from dpo_engine.config.rules import reads_reference
from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.model.adaptation import matrix_parameters as adapter_matrices
from dpo_engine.model.architecture import Architecture, read_architecture
from dpo_engine.model.batch_size import largest_micro_batch
from dpo_engine.model.cuda_graphs import graph_problems
from dpo_engine.model.memory import BYTES, GIB, Memory, memory, stage_adapter_memory
from dpo_engine.model.parameter_counts import stage_counts
from dpo_engine.model.savings import lighter_runs
from dpo_engine.model.sizes import mlp_parameters, score_size
from dpo_engine.model.stages import stage_work, with_layers
from dpo_engine.model.weights.peft import adaptation_of, adapter_problems
from dpo_engine.platform.dims import ParallelDims, divisors
from dpo_engine.wording import join

EFFICIENCY = 0.5
"""Typical FLOP/s of a training step, as a fraction of the GPU's peak.

The FLOP/s are lower than those of a single matrix product, because a step also spends time between matrix products."""
HOST = 5e9
"""Parameters that a node's CPUs update per second (``optim.states: host``), at 200 GB/s and 40 bytes per parameter."""
PER_NODE = 8
RECOMPUTE = ("none", "selective", "full")
SHOWN = 5


@dataclass(frozen=True)
class GPU:
    """A GPU's data sheet: dense bf16 FLOP/s, and bytes per second in one direction within a node and between nodes."""

    flops: float
    inside: float
    between: float


GPUS = {
    "A100": GPU(312e12, 300e9, 25e9),
    "H100": GPU(989e12, 450e9, 50e9),
    "H200": GPU(989e12, 450e9, 50e9),
    "B200": GPU(2250e12, 900e9, 50e9),
}


@dataclass(frozen=True)
class Layout:
    """One way to run the configuration.

    dims       sizes of the parallel dimensions
    recompute  ``model.recompute``
    tokens     number of tokens in the largest micro-batch
    memory     memory of the rank that needs the most memory
    seconds    predicted time of a step, by cause
    sent       for each parallel dimension, the bytes that a rank sends in a step, and the link that carries them
    flops      floating-point operations of a step, over all GPUs
    """

    dims: ParallelDims
    recompute: str
    tokens: int
    memory: Memory
    seconds: dict[str, float]
    sent: dict[str, tuple[float, str]]
    flops: float

    @property
    def step_s(self) -> float:
        """Predicted time of a step, in seconds."""
        return sum(self.seconds.values())

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of this layout that differ from their defaults."""
        sizes = {name: getattr(self.dims, name) for name in ("tp", "pp", "vpp", "cp", "ep")}
        found = {f"parallel.{name}": size for name, size in sizes.items() if size not in (1, None)}
        found |= {"parallel.layers": "auto"} if self.dims.layers else {}
        return found | ({"model.recompute": self.recompute} if self.recompute != "none" else {})


def plan(
    config: Config, gpus: int, *, gpu_memory: float = 80.0, gpu: str = "H100", nodes: int | None = None
) -> list[str]:
    """Return the lines of a report: the layouts that fit, fastest first, and why other layouts are not possible.

    gpus        total number of GPUs
    gpu_memory  memory of each GPU, in GiB
    gpu         a key of `GPUS`
    nodes       number of nodes; None: the smallest number with at most eight GPUs per node

    Raises :class:`~dpo_engine.errors.ConfigError` for numbers that are not positive and finite, for a number of GPUs
    that is not a multiple of the number of nodes, for a model whose configuration cannot be read, and for adapters that
    do not fit the model.
    """
    given = [("gpus", gpus, "GPUs"), ("nodes", nodes, "nodes")]
    problems = [
        f"--{name}={number}: must be at least 1; pass the number of {what}"
        for name, number, what in given
        if number is not None and number < 1
    ]
    if not 0 < gpu_memory * GIB < math.inf:
        problems.append(
            f"--gpu-memory={gpu_memory:g}: must be positive and finite; pass the memory of one GPU in GiB, such as 80"
        )
    if problems:
        raise ConfigError(problems)
    nodes = nodes or -(-gpus // PER_NODE)
    if gpus % nodes:
        raise ConfigError(
            f"--gpus={gpus}: must be a multiple of the number of nodes ({nodes}); change --gpus or --nodes"
        )
    per_node = gpus // nodes
    arch = read_architecture(config.model.path)
    if problems := adapter_problems(config.adapter, arch):
        raise ConfigError(problems)
    size = int(gpu_memory * GIB)
    layouts, out = _layouts(config, arch, gpus, per_node, size, GPUS[gpu])
    fitting = sorted((one for one in layouts if one.memory.needed <= size), key=lambda one: one.step_s)
    best = _cheapest_recompute(fitting)
    rows = f"rows of {config.data.max_length:,} tokens, {config.train.global_batch_size} pairs per step"
    where = f"{gpus} x {gpu} with {gpu_memory:g} GiB" + (f" on {nodes} nodes" if nodes > 1 else "")
    lines = [f"{arch.model_type} on {where}: layouts that fit: {len(best)}; {rows}"]
    for place, layout in enumerate(best[:SHOWN], 1):
        lines += [f"{place}. {_title(layout)}", *("   " + line for line in _details(layout))]
    if best:
        lines += ["to use the first layout:", *_yaml(best[0])]
    else:
        lines += _way_out(config, arch, gpus, per_node, size, GPUS[gpu], layouts)
    tight = [one for one in layouts if one.memory.needed > size and one.recompute == "full"]
    if tight:
        least = min(tight, key=lambda one: one.memory.needed)
        out.insert(0, f"{len(tight)} layout(s): too large even with model.recompute=full; smallest: {_title(least)}")
    return lines + [f"not possible: {reason}" for reason in out]


def _layouts(
    config: Config, arch: Architecture, gpus: int, per_node: int, size: int, gpu: GPU
) -> tuple[list[Layout], list[str]]:
    """Return all possible layouts, including those that do not fit, and why the other layouts are not possible."""
    found, reasons = [], set()
    for sizes in _sizes(arch, gpus):
        uneven = config.parallel.layers == "auto" or arch.num_layers % (sizes.pp * sizes.chunks)
        dims = with_layers(sizes, "auto" if uneven else None, arch, config.data.max_length)
        problems = dims.problems(arch) + graph_problems(config, arch)
        if dims.tp > per_node:
            problems.append(f"tp {dims.tp}: tensor parallelism is too slow between nodes of {per_node} GPU(s)")
        if dims.dp > config.train.global_batch_size:
            problems.append(f"dp {dims.dp}: is larger than train.global_batch_size ({config.train.global_batch_size})")
        if problems:
            reasons.update(problem.partition(";")[0] for problem in problems)
            continue
        for recompute in ("none",) if config.model.cuda_graphs else RECOMPUTE:
            asked = config.model_copy(update={"model": config.model.model_copy(update={"recompute": recompute})})
            found.append(_predict(asked, arch, dims, per_node, size, gpu))
    return found, sorted(reasons)


def _sizes(arch: Architecture, gpus: int) -> Iterator[ParallelDims]:
    for tp in divisors(gpus):
        for pp in divisors(gpus // tp):
            for cp in (cp for cp in divisors(gpus // (tp * pp)) if cp <= 8):
                for vpp in (None, 2, 4) if pp > 1 else (None,):
                    for ep in _expert_sizes(arch, gpus // pp):
                        yield ParallelDims(tp, pp, vpp, cp, ep, gpus)


def _expert_sizes(arch: Architecture, ranks: int) -> list[int]:
    """Return the possible values of ``parallel.ep`` if each pipeline stage has ``ranks`` ranks."""
    return divisors(math.gcd(arch.experts.count, ranks)) if arch.experts else [1]


def _predict(config: Config, arch: Architecture, dims: ParallelDims, per_node: int, size: int, gpu: GPU) -> Layout:
    micro_batch = largest_micro_batch(config, arch, dims, dtype="bf16", device_memory=size)
    cost = memory(config, arch, dims, dtype="bf16", tokens=micro_batch)
    number = BYTES["bf16"]
    tokens = 2 * config.data.max_length * config.train.global_batch_size  # of all rows of a step
    scored = reads_reference(config) and config.reference_mode in ("resident", "shared", "offloaded")
    products = tokens * 2 * arch.matrix_parameters
    forward = products + tokens * 4 * score_size(arch) * _keys_seen(arch, config.data.max_length)
    mlp = tokens * 2 * sum(mlp_parameters(arch, layer) for layer in arch.layers())
    again = {"none": 0, "selective": mlp, "full": forward}[config.model.recompute]
    flops = forward * (3 + scored) + again
    adaptation = config.adapter and adaptation_of(config.adapter, arch)
    if adaptation:  # add the products of the adapters, and subtract the gradients of frozen matrices
        flops += 3 * tokens * 2 * adapter_matrices(adaptation, arch) - products
    work = stage_work(arch, dims, config.data.max_length)
    slowest = max(work) * dims.pp / sum(work)  # relative to the mean
    compute = flops * slowest / (dims.world * gpu.flops * EFFICIENCY)

    steps = -(-tokens // (dims.dp * micro_batch))  # micro-batches of a rank
    row = micro_batch // dims.cp * arch.hidden_size * number  # bytes of one micro-batch's hidden states
    layers = max(len(dims.layers_of(stage, arch.num_layers)) for stage in range(dims.pp))
    sent: dict[str, tuple[float, str]] = {}

    def add(name: str, size: float, ranks_apart: int) -> None:
        """Record the bytes that a rank sends to ranks whose numbers differ from its own by at most ``ranks_apart``."""
        if size:
            sent[name] = size, "within a node" if ranks_apart < per_node else "between nodes"

    # A layer gathers 2 times and scatters 2 times in a forward pass. In a backward pass, it gathers 4 times and
    # scatters 2 times.
    collectives = 4 * (1 + scored) + 6 + (4 if config.model.recompute == "full" else 0)
    add("tp", steps * layers * collectives * row * (dims.tp - 1) / dims.tp, dims.tp - 1)
    keys = 2 * max(arch.num_kv_heads // dims.tp, 1) * arch.head_dim * micro_batch * number
    add("cp", steps * layers * (2 + scored) * keys * (dims.cp - 1) / dims.cp, (dims.cp - 1) * dims.tp)
    exchanges = steps * dims.chunks * (2 + scored) * (dims.pp > 1)
    add("pp", exchanges * row / dims.tp, dims.world - 1)  # a stage's ranks are consecutive, so stages are far apart
    if arch.experts:
        # Each token's hidden states go to its experts and come back, in the forward and in the backward pass.
        mixed = len([layer for layer in dims.layers_of(0, arch.num_layers) if layer in arch.experts.layers])
        sent_tokens = row * arch.experts.chosen / dims.tp * (dims.ep - 1) / dims.ep
        passes = 2 * (2 + scored) + 2 * (config.model.recompute != "none")
        add("ep", steps * mixed * passes * sent_tokens, dims.ep * dims.etp - 1)
    shards = dims.dp * dims.cp
    if adaptation:
        adapters = [stage_adapter_memory(adaptation, arch, dims, stage, False) for stage in range(dims.pp)]
        trained, reduced = max(stage.parameters for stage in adapters), 8
    else:
        trained = max(stage_counts(arch, dims, stage).others for stage in range(dims.pp))
        reduced = BYTES[config.optim.gradients] + number  # bytes per parameter: gradients out, updated weights in
    gradients = trained * reduced
    add("dp", gradients * (shards - 1) / shards, (shards - 1) * dims.tp)
    if arch.experts and not adaptation and dims.expert_dp > 1:
        own, copies = max(stage_counts(arch, dims, stage).experts for stage in range(dims.pp)), dims.expert_dp
        add("dp of experts", own * reduced * (copies - 1) / copies, (copies - 1) * dims.ep * dims.etp)
    links = {"within a node": gpu.inside, "between nodes": gpu.between}
    seconds = {"compute": compute} | {name: size / links[link] for name, (size, link) in sent.items()}
    if cost.host:
        seconds["update on the host"] = cost.host["optimizer states"] / 12 * min(per_node, dims.world) / HOST
    if dims.pp > 1:
        seconds["pipeline bubble"] = compute * (dims.pp - 1) / (steps * dims.chunks)
    return Layout(dims, config.model.recompute, micro_batch, cost, seconds, sent, flops)


def _keys_seen(arch: Architecture, length: int) -> float:
    """Return the mean number of keys that a token sees, summed over all layers."""
    return sum(visible_pairs(length, window) for window in arch.windows) / length


def _cheapest_recompute(layouts: list[Layout]) -> list[Layout]:
    """Keep, for each parallel layout, the fastest value of ``model.recompute``. ``layouts`` must be sorted by time."""
    kept: dict[ParallelDims, Layout] = {}
    for layout in layouts:
        kept.setdefault(layout.dims, layout)
    return list(kept.values())


def _title(layout: Layout) -> str:
    dims = layout.dims
    sizes = f"tp {dims.tp}, pp {dims.pp}" + (f" (vpp {dims.vpp})" if dims.vpp else "") + f", cp {dims.cp}, dp {dims.dp}"
    sizes += f", layers {dims.division}" if dims.layers else ""
    sizes += f", ep {dims.ep}" if dims.ep > 1 else ""
    again = "" if layout.recompute == "none" else f", recompute {layout.recompute}"
    return f"{sizes}{again}: {layout.memory.needed / GIB:.1f} GiB, about {layout.step_s:.3g} s per step"


def _details(layout: Layout) -> list[str]:
    cost = layout.memory
    stage = f" (stage {cost.stage})" if layout.dims.pp > 1 else ""
    parts = " + ".join(f"{name} {size / GIB:.1f}" for name, size in cost.parts.items())
    limit = max(layout.seconds, key=layout.seconds.__getitem__)
    times = ", ".join(f"{name} {seconds:.3g}" for name, seconds in layout.seconds.items())
    sent = ", ".join(f"{name} {size / 1e9:.3g} GB {link}" for name, (size, link) in layout.sent.items())
    return [
        f"memory in GiB{stage}: {parts}; the rest of the total is allocator overhead and memory outside of torch; "
        f"micro-batches of at most {layout.tokens:,} tokens{cost.on_host}",
        f"seconds: {times}; the largest part is {limit}; {layout.flops / 1e15:.3g} PFLOP per step",
        *([f"sent by a rank: {sent}"] if sent else []),
    ]


def _yaml(layout: Layout) -> list[str]:
    sections: dict[str, list[str]] = {}
    for key, value in layout.keys.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"  {name}: {value}")
    if not sections:
        return ["  (no keys are needed: this layout is the default)"]
    return [line for section, keys in sections.items() for line in (f"{section}:", *keys)]


def _way_out(
    config: Config, arch: Architecture, gpus: int, per_node: int, size: int, gpu: GPU, layouts: list[Layout]
) -> list[str]:
    """Return lines about the smallest layout, and about changes with which the run would fit."""
    lines = ["does not fit"]
    if layouts:
        lines[0] += f"; the smallest layout is {_title(min(layouts, key=lambda one: one.memory.needed))}"
    dims = ParallelDims(1, 1, None, 1, 1, gpus)
    tokens = largest_micro_batch(config, arch, dims, dtype="bf16", device_memory=size)
    lighter = lighter_runs(config, dims, dtype="bf16", tokens=tokens)
    # The layouts already include all values of model.recompute.
    changes = [(one.name, one.config, gpus) for one in lighter if one.config.model == config.model]
    if config.batch.tokens_per_micro_batch != "auto":
        least = config.batch.model_copy(update={"tokens_per_micro_batch": "auto"})
        changes.append(("batch.tokens_per_micro_batch=auto", config.model_copy(update={"batch": least}), gpus))
    half = config.data.model_copy(update={"max_length": config.data.max_length // 2})
    changes.append((f"data.max_length={half.max_length}", config.model_copy(update={"data": half}), gpus))
    changes += [(f"{gpus * factor} GPUs", config, gpus * factor) for factor in (2, 4, 8, 16)]
    enough = []
    for name, changed, number in changes:
        if name.endswith("GPUs") and any(one.endswith("GPUs") for one in enough):
            break
        found, _ = _layouts(changed, arch, number, min(per_node, number) if number > gpus else per_node, size, gpu)
        if any(one.memory.needed <= size for one in found):
            enough.append(name)
    nothing = "the run would not fit with any of the changes that were tried"
    return [*lines, f"what would fit: {join(enough, 'or')}" if enough else nothing]
