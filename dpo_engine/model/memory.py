"""Estimate the memory that one rank needs: weights, gradients, optimizer, reference, activations, and logits.

The formulas assume native layers that keep their tensors in ``model.dtype``. On an emulated GPU that computes nothing
(``tests/nullgpu``), the formulas match the measured peaks of full micro-batches to within 3 %. There are two
exceptions. With context parallelism, the attention kernels ``varlen`` of the tree layout need 6 % more than estimated.
With FP8, Transformer Engine keeps the inputs of linear layers in one byte per number, so the estimate of activations is
too large. The allocator, CUDA and NCCL need additional memory.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

from dpo_engine.batching.batches import CHUNK_SITES
from dpo_engine.config.rules import reads_reference
from dpo_engine.config.run import Config
from dpo_engine.model.adaptation import Adaptation, LayerAdapters, layer_adapters
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.cuda_graphs import graph_numbers
from dpo_engine.model.fp8 import fp8_layers
from dpo_engine.model.megatron_options import instances_of
from dpo_engine.model.parameter_counts import layer_parameters, stage_counts
from dpo_engine.model.tp_overlap import buffer_bytes
from dpo_engine.model.weights.peft import adaptation_of
from dpo_engine.platform.dims import ParallelDims

GIB = 1 << 30
BYTES = {"fp64": 8, "fp32": 4, "bf16": 2}
OUTSIDE = 5 * GIB // 2
"""Memory that torch does not count: the CUDA context, loaded kernels, and NCCL's buffers."""
RESERVED = 1.03
"""Ratio of the memory that the allocator reserves to the memory that tensors occupy."""
PIECE = 1 << 24
"""Largest number of elements that an optimizer converts or copies at a time, if it updates in pieces. In fp32, these
elements occupy 64 MiB."""


def gib(size: int) -> str:
    """Return a number of bytes as text, in GiB or, if it is small, in MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / (1 << 20):.2f} MiB"


def _sum(parts: dict[str, int]) -> str:
    return " + ".join(f"{name} {gib(size)}" for name, size in parts.items())


@dataclass(frozen=True)
class Memory:
    """Memory of one rank of a pipeline stage, in bytes.

    stage                                     number of the pipeline stage
    weights, gradients, optimizer, reference  allocated during the whole run
    fp8                                       FP8 copies of the policy's and the reference's weights, also allocated
                                              during the whole run
    buffers                                   buffers of ``tp_comm_overlap``, also allocated during the whole run; torch
                                              does not count them
    graphs                                    copies and buffers of ``model.cuda_graphs``. They and ``activations``
                                              remain allocated from the second step to the end of the run
    activations                               tensors that forward passes in flight keep for their backward passes
    working                                   logits of `CHUNK_SITES` tokens, their exponentials and their gradient, or
                                              the activations of a layer that is recomputed, whichever is larger
    update                                    fp32 copies of bf16 gradients, after the activations are freed
    formula                                   formula for weights, gradients, optimizer states and reference, as text
    host                                      bytes of host memory with ``optim.states: host``, by purpose
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    working: int
    formula: str
    fp8: int = 0
    buffers: int = 0
    graphs: int = 0
    update: int = 0
    host: dict[str, int] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, int]:
        """The nonzero parts of the peak, by name.

        Without graphs, the peak contains either ``update``, or both ``activations`` and ``working``, whichever is
        larger. With graphs, it contains ``activations``, and either ``update`` or ``working``, whichever is larger.
        """
        kept = ("activations",) if self.graphs else ()
        during = ("working",) if self.graphs else ("activations", "working")
        largest = ("update",) if self.update > sum(getattr(self, name) for name in during) else during
        names = ("weights", "gradients", "optimizer", "reference", "fp8", "buffers", "graphs", *kept, *largest)
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @property
    def terms(self) -> str:
        """The parts and their sizes as text, such as ``weights 2.30 GiB + gradients 4.61 GiB``."""
        return _sum(self.parts)

    @property
    def on_host(self) -> str:
        """The host memory of ``optim.states: host`` as text, or an empty text."""
        return f"; host memory: {gib(sum(self.host.values()))} = {_sum(self.host)}" if self.host else ""

    @property
    def constant(self) -> int:
        """Bytes that are allocated during the whole run."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.fp8 + self.buffers

    @property
    def peak(self) -> int:
        """Largest number of bytes that tensors occupy during a step."""
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """Bytes of a GPU's memory that the run needs, with allocator overhead and memory that torch does not count."""
        return self.peak * RESERVED + OUTSIDE


def memory(config: Config, arch: Architecture, dims: ParallelDims, *, dtype: str, tokens: int) -> Memory:
    """Estimate the memory of one rank of the pipeline stage that needs the most.

    The parts of the estimate and their peak do not include the memory of CUDA and NCCL, or the allocator's overhead.

    dtype   "fp64", "fp32" or "bf16"
    tokens  number of tokens in the largest micro-batch, over all its rows
    """
    known = has_resident_reference(config), config.adapter and adaptation_of(config.adapter, arch)
    stages = [_stage_memory(config, arch, dims, stage, dtype, tokens, *known) for stage in range(dims.pp)]
    return max(stages, key=lambda stage: stage.peak)


def stage_memory(config: Config, arch: Architecture, dims: ParallelDims, stage: int, dtype: str, tokens: int) -> Memory:
    """Estimate the memory of one rank of a pipeline stage; arguments as for :func:`memory`."""
    known = has_resident_reference(config), config.adapter and adaptation_of(config.adapter, arch)
    return _stage_memory(config, arch, dims, stage, dtype, tokens, *known)


def has_resident_reference(config: Config) -> bool:
    """Whether the reference is a second model in device memory."""
    return config.reference_mode == "resident" and reads_reference(config)


def _stage_memory(
    config: Config,
    arch: Architecture,
    dims: ParallelDims,
    stage: int,
    dtype: str,
    tokens: int,
    resident: bool,
    adaptation: Adaptation | None,
) -> Memory:
    counts = stage_counts(arch, dims, stage)
    number = sum(counts)
    weight_bytes = BYTES[dtype]
    on_host = config.optim.states == "host" and dtype != "fp64"
    # Adam keeps two moments. If weights are in bf16, or states are on the host, Adam also keeps an fp32 main copy.
    state_bytes = 12 if on_host else {"fp64": 16, "fp32": 8, "bf16": 12}[dtype]
    states = "optimizer in host memory" if on_host else "optimizer"
    gradient_bytes = 8 if dtype == "fp64" else BYTES[config.optim.gradients]
    distributed = config.parallel.distributed_optimizer
    in_pieces = on_host or (distributed and gradient_bytes == 2)
    instances = instances_of(config)
    shards, copies = (max(n // instances, 1) if distributed else 1 for n in (dims.dp * dims.cp, dims.expert_dp))
    divided = f" / {shards} ({'dp x cp' if instances == 1 else 'ranks of an instance'})" if shards > 1 else ""
    reference_bytes = weight_bytes if resident else 0
    last = stage == dims.pp - 1
    adapters = stage_adapter_memory(adaptation, arch, dims, stage, splits_sequence(config, dims))
    # The logits and their exponentials in fp32, and their gradient in the weights' dtype.
    logits = last * CHUNK_SITES * (dims.padded_vocab(arch.vocab_size) // dims.tp) * (2 * 4 + weight_bytes)
    activations, recomputed = _activations(config, arch, dims, stage, dtype, tokens, adapters)
    own_layers = set(dims.layers_of(stage, arch.num_layers)) & set(fp8_layers(config, arch) if dtype == "bf16" else ())
    # Forward and backward passes need different copies of a weight: the copy for the backward pass has other scales, or
    # is stored by columns. The resident reference has no backward pass, so it needs only one copy.
    fp8 = sum(sum(layer_parameters(arch, dims, layer)) for layer in own_layers) * (2 + resident)
    buffers = buffer_bytes(config, arch, dims, tokens) if dtype == "bf16" else 0
    held = _layers_in_flight(config, arch, dims, stage, tokens)
    graphs = BYTES[dtype] * graph_numbers(config, arch, dims, tokens, held, split=splits_sequence(config, dims))
    if config.adapter is not None:
        own = adapters.parameters  # in fp32, like their gradients and their two moments
        state_bytes, owned = (12 if on_host else 8), -(-own // shards)
        copied = config.reference_has_adapter or config.reference.sync_every is not None
        return Memory(
            stage=stage,
            weights=number * weight_bytes + 4 * own,
            gradients=4 * own,
            optimizer=_buffers(owned) if on_host else -(-own * 8 // shards),
            reference=number * reference_bytes + 4 * own * copied,
            activations=activations,
            working=max(logits, recomputed),
            fp8=fp8,
            buffers=buffers,
            graphs=graphs,
            formula=f"{number:,} frozen parameters x {weight_bytes + reference_bytes} bytes + {own:,} parameters of "
            f"adapters x (4 weight + 4 gradient + {state_bytes} {states}{divided}) bytes",
            host=_host_memory(config, owned) if on_host else {},
        )
    owned = -(-counts.others // shards), -(-counts.experts // copies)
    whole = -(-counts.others * state_bytes // shards) - (-counts.experts * state_bytes // copies)
    return Memory(
        stage=stage,
        weights=number * weight_bytes,
        gradients=number * gradient_bytes,
        optimizer=whole * (not on_host) + _buffers(*owned, count=1 + on_host) * in_pieces,
        reference=number * reference_bytes,
        activations=activations,
        working=max(logits, recomputed),
        fp8=fp8,
        buffers=buffers,
        graphs=graphs,
        formula=f"{number:,} parameters x ({weight_bytes} weight + {gradient_bytes} gradient + {state_bytes} {states}"
        + divided
        + (f" [/ {copies} for the {counts.experts:,} parameters of experts]" if counts.experts and distributed else "")
        + (f" + {reference_bytes} reference" if reference_bytes else "")
        + ") bytes",
        update=4 * sum(owned) if gradient_bytes == 2 and not in_pieces else 0,
        host=_host_memory(config, *owned) if on_host else {},
    )


def _buffers(*owned: int, count: int = 2) -> int:
    """Return the bytes of the fp32 buffers for updates in pieces; each of this rank's optimizers has ``count`` buffers.

    owned   number of parameters of each optimizer; experts have an optimizer of their own
    """
    return sum(4 * count * min(number, PIECE) for number in owned)


def _host_memory(config: Config, *owned: int) -> dict[str, int]:
    """Return the bytes of host memory for the states of ``owned`` parameters, by purpose."""
    found = {"optimizer states": 12 * sum(owned), "buffers": 2 * _buffers(*owned)}
    return found | ({"copies for saves": 12 * sum(owned)} if config.checkpoint.async_save else {})


def splits_sequence(config: Config, dims: ParallelDims) -> bool:
    """Whether sequence parallelism shards the activations outside the tensor-parallel regions."""
    asked = config.parallel.sequence_parallel
    return dims.tp > 1 if asked == "auto" else asked


@lru_cache(maxsize=4096)
def stage_adapter_memory(
    adaptation: Adaptation | None, arch: Architecture, dims: ParallelDims, stage: int, split: bool
) -> LayerAdapters:
    """Return the memory that the adapters of a stage add on each of its ranks, summed over the stage's layers.

    split   whether sequence parallelism shards the activations outside the tensor-parallel regions
    """
    if adaptation is None:
        return LayerAdapters()
    layers = dims.layers_of(stage, arch.num_layers)
    found = [layer_adapters(adaptation, arch, layer, dims.tp, split=split) for layer in layers]
    return LayerAdapters(*map(sum, zip(*found, strict=True)))


def token_bytes(arch: Architecture, dims: ParallelDims, *, dtype: str, split: bool, recompute: str) -> tuple[int, int]:
    """Return the bytes per token that a layer keeps for its backward pass, and those added while it is recomputed.

    split      whether sequence parallelism shards the activations outside the tensor-parallel regions
    recompute  ``model.recompute``
    """
    number = BYTES[dtype]
    heads, kv_heads = arch.num_attention_heads // dims.tp, max(arch.num_kv_heads // dims.tp, 1)
    stream = arch.hidden_size * number // (dims.tp if split else 1)
    count = 2 * arch.pre_norms + 2 * arch.post_norms - (arch.parallel == "one norm")
    norms = 2 * count * stream  # their inputs and outputs
    # Queries and the output for the tokens of this rank; keys and values for all tokens of the row, because every
    # context-parallel rank keeps all keys and values.
    attention = (2 * heads + 2 * kv_heads * dims.cp) * arch.head_dim * number
    if arch.qk_norms:  # queries and keys before their norms; if norms are per head, also a copy of the values
        attention += (heads + (1 + arch.qk_norm) * kv_heads) * arch.head_dim * number
    # The input of the activation (with the gate, if the MLP has one), and the output of the activation.
    mlp = (2 + arch.gated) * (arch.ffn_hidden_size // dims.tp) * number
    if arch.experts:
        mixed = _expert_bytes(arch, dims, number, split=split)
        share = len(arch.experts.layers) / arch.num_layers
        mlp = int(share * mixed + (1 - share) * mlp)
    if recompute == "full":
        return stream, norms + attention + 2 * mlp
    if recompute == "selective":
        return norms + attention, 2 * mlp
    return norms + attention + mlp, 0


def _expert_bytes(arch: Architecture, dims: ParallelDims, number: int, *, split: bool) -> int:
    """Return the bytes per token that a layer's experts keep for the backward pass, if all experts are used equally.

    For each expert of a token, a layer keeps two copies of the input: in the order of tokens, and in the order of
    experts. For each shard of the expert, it keeps two such copies of the output. Native layers also keep 6 tensors
    with the width of the expert: gate, up projection, activation, product, and the weighted product both in the model's
    dtype and in fp32. Experts with biases or a clamp keep 4: gate, up projection, product, and weighted product.
    """
    experts = arch.experts
    # Tokens that a rank sends to experts, per token of the row. The rank's own experts receive the same number.
    tokens = 1 / (dims.tp if split else 1)
    # If an expert is sharded, each of its ranks gets all of the expert's tokens, but only a part of the width.
    copies = (2 + 2 * dims.etp) * arch.hidden_size + (4 if experts.special else 6) * experts.ffn_hidden_size
    router = 3 * experts.count * max(number, 4)
    shared = 3 * (experts.shared_size or 0) // dims.tp
    return int(tokens * (experts.chosen * copies * number + router)) + shared * number


def _activations(
    config: Config,
    arch: Architecture,
    dims: ParallelDims,
    stage: int,
    dtype: str,
    tokens: int,
    adapters: LayerAdapters,
) -> tuple[int, int]:
    """Return the bytes that the micro-batches in flight keep, and the bytes of the layer that is being recomputed."""
    split = splits_sequence(config, dims)
    kept, recomputed = token_bytes(arch, dims, dtype=dtype, split=split, recompute=config.model.recompute)
    number = len(dims.layers_of(stage, arch.num_layers))
    # The mean over the stage's layers, because possibly only some of them have adapters.
    attention, mlp = (BYTES[dtype] * more // number for more in (adapters.attention, adapters.mlp))
    again = {"none": 0, "selective": mlp, "full": attention + mlp}[config.model.recompute]
    kept, recomputed = kept + attention + mlp - again, recomputed + again
    own = -(-tokens // dims.cp)
    return own * kept * _layers_in_flight(config, arch, dims, stage, tokens), own * recomputed


def _layers_in_flight(config: Config, arch: Architecture, dims: ParallelDims, stage: int, tokens: int) -> int:
    """Return the largest number of layers whose activations a rank keeps, summed over all micro-batches in flight.

    With graphs, model chunks never use each other's memory. The result is then the sum of the chunks' own maxima.
    """
    pairs = -(-config.train.global_batch_size // dims.dp)
    micro_batches = -(-pairs // max(tokens // (2 * config.data.max_length), 1))
    layers = [len(chunk) for chunk in dims.chunk_layers(arch.num_layers)[stage :: dims.pp]]
    if not dims.vpp:
        return min(dims.pp - stage, micro_batches) * layers[0]
    # Each chunk computes a group of micro-batches before the next chunk begins. Backward passes begin with the last
    # chunk, after the forward passes of the warmup and one more.
    group = config.megatron.transformer.get("microbatch_group_size_per_vp_stage") or dims.pp
    first = 2 * (dims.pp - stage - 1) + (dims.vpp - 1) * group + 1
    sizes = [min(group, micro_batches - begin) for begin in range(0, min(micro_batches, 2 * group), group)]
    forward = [chunk for size in sizes for chunk in range(dims.vpp) for _ in range(size)]
    if not config.model.cuda_graphs:
        return sum(layers[chunk] for chunk in forward[:first])
    flying, most = Counter(forward[:first]), Counter(forward[:first])
    for finished, started in zip(forward, forward[first:], strict=False):
        flying.subtract([dims.vpp - 1 - finished])
        flying[started] += 1
        most |= flying
    return sum(layers[chunk] * count for chunk, count in most.items())
