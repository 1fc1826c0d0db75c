"""Estimate the memory that one rank needs: weights, optimizer, reference, activations, and logits.

The formulas count the tensors that the native layers keep. On a GPU that computes nothing (``tests/nullgpu``), they
match the measured peaks to 3 %. The allocator and CUDA need additional memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dpo_engine.batching.batches import CHUNK_SITES
from dpo_engine.config.rules import reads_reference
from dpo_engine.config.run import Config
from dpo_engine.model.adaptation import Adaptation, LayerAdapters, layer_adapters
from dpo_engine.model.architecture import FAMILIES, Architecture
from dpo_engine.model.weights.peft import adaptation_of
from dpo_engine.platform.parallel import ParallelDims

GIB = 1 << 30
BYTES = {"fp64": 8, "fp32": 4, "bf16": 2}
OUTSIDE = 5 * GIB // 2
"""Memory that torch does not count: the CUDA context, loaded kernels, and NCCL's buffers."""
RESERVED = 1.03
"""Memory that the allocator reserves, relative to the memory that tensors occupy."""


def gib(size: int) -> str:
    """Return a number of bytes as text, in GiB or, if it is small, in MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / (1 << 20):.2f} MiB"


def layer_parameters(arch: Architecture, tp: int = 1) -> int:
    """Return the number of parameters that one transformer layer has on each of `tp` ranks."""
    rules = FAMILIES[arch.model_type].rules
    return sum(rule.parameters(arch, tp) for rule in rules if "{l}" in rule.parameter and rule.applies(arch))


def parameters(arch: Architecture) -> int:
    """Return the number of parameters in the whole model, with the vocabulary size of its checkpoint (not padded)."""
    rules = [rule for rule in FAMILIES[arch.model_type].rules if "{l}" not in rule.parameter and rule.applies(arch)]
    return arch.num_layers * layer_parameters(arch) + sum(rule.parameters(arch) for rule in rules)


def stage_parameters(arch: Architecture, dims: ParallelDims, stage: int) -> int:
    """Return the number of parameters on one rank of a pipeline stage, over all model chunks, with padded vocabulary.

    If embeddings are tied and the first stage is not also the last, both stages store the embeddings.
    """
    embedding = dims.padded_vocab(arch.vocab_size) // dims.tp * arch.hidden_size
    count = arch.num_layers // dims.pp * layer_parameters(arch, dims.tp)
    first, last = stage == 0, stage == dims.pp - 1
    if first:
        count += embedding + arch.learned_positions * arch.max_positions * arch.hidden_size
    if last:
        norm = arch.hidden_size * (1 + arch.norm_bias)
        count += norm + (0 if first and arch.tied_embeddings else embedding)
    return count


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank of the pipeline stage that needs the most.

    weights, gradients, optimizer, reference  allocated during the whole run
    activations                               what the forward passes in flight keep for their backward passes
    working                                   logits of one chunk and their gradients, or the activations of a layer
                                              that is recomputed, whichever is larger
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    working: int
    formula: str

    @property
    def parts(self) -> dict[str, int]:
        """The parts that need memory, by name."""
        names = ("weights", "gradients", "optimizer", "reference", "activations", "working")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @property
    def terms(self) -> str:
        """The parts and their sizes as text, such as ``weights 2.30 GiB + gradients 4.61 GiB``."""
        return " + ".join(f"{name} {gib(size)}" for name, size in self.parts.items())

    @property
    def constant(self) -> int:
        """Bytes that are allocated during the whole run."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def peak(self) -> int:
        """Largest number of bytes that tensors occupy during a step."""
        return self.constant + self.activations + self.working

    @property
    def needed(self) -> float:
        """Bytes of a GPU's memory that the run needs, with the allocator's overhead and what torch does not count."""
        return self.peak * RESERVED + OUTSIDE


def memory(config: Config, arch: Architecture, dims: ParallelDims, *, dtype: str, tokens: int) -> Memory:
    """Estimate the memory of the stage that needs the most.

    Communication buffers and the allocator's overhead are not included.

    dtype   "fp64", "fp32" or "bf16"
    tokens  number of tokens in the rows of the largest micro-batch
    """
    known = has_resident_reference(config), config.adapter and adaptation_of(config.adapter, arch)
    stages = [_stage_memory(config, arch, dims, stage, dtype, tokens, *known) for stage in range(dims.pp)]
    return max(stages, key=lambda stage: stage.peak)


def stage_memory(config: Config, arch: Architecture, dims: ParallelDims, stage: int, dtype: str, tokens: int) -> Memory:
    """Estimate the memory of a rank of one pipeline stage; arguments as for :func:`memory`."""
    known = has_resident_reference(config), config.adapter and adaptation_of(config.adapter, arch)
    return _stage_memory(config, arch, dims, stage, dtype, tokens, *known)


def has_resident_reference(config: Config) -> bool:
    """Whether a second model is in device memory."""
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
    number = stage_parameters(arch, dims, stage)
    weight_bytes = BYTES[dtype]
    # Adam keeps two fp32 moments, and bf16 weights also need an fp32 main copy.
    state_bytes = {"fp64": 16, "fp32": 8, "bf16": 12}[dtype]
    gradient_bytes = 8 if dtype == "fp64" else BYTES[config.optim.gradients]
    shards = dims.dp * dims.cp if config.parallel.distributed_optimizer else 1
    reference_bytes = weight_bytes if resident else 0
    last = stage == dims.pp - 1
    adapters = stage_adapter_memory(adaptation, arch, dims, stage, splits_sequence(config, dims))
    # The logits and their exponentials in fp32, and the gradient.
    logits = last * CHUNK_SITES * (dims.padded_vocab(arch.vocab_size) // dims.tp) * (2 * 4 + weight_bytes)
    activations, recomputed = _activations(config, arch, dims, stage, dtype, tokens, adapters)
    if config.adapter is not None:
        own = adapters.parameters  # in fp32, like their gradients and their two moments
        copied = config.reference_has_adapter or config.reference.sync_every is not None
        return Memory(
            stage=stage,
            weights=number * weight_bytes + 4 * own,
            gradients=4 * own,
            optimizer=-(-own * 8 // shards),
            reference=number * reference_bytes + 4 * own * copied,
            activations=activations,
            working=max(logits, recomputed),
            formula=f"{number:,} frozen parameters x {weight_bytes + reference_bytes} bytes + {own:,} parameters of "
            "adapters x (4 weight + 4 gradient + 8 optimizer"
            + (f" / {shards} (dp x cp)" if shards > 1 else "")
            + ") bytes",
        )
    return Memory(
        stage=stage,
        weights=number * weight_bytes,
        gradients=number * gradient_bytes,
        optimizer=-(-number * state_bytes // shards),
        reference=number * reference_bytes,
        activations=activations,
        working=max(logits, recomputed),
        formula=f"{number:,} parameters x ({weight_bytes} weight + {gradient_bytes} gradient + {state_bytes} optimizer"
        + (f" / {shards} (dp x cp)" if shards > 1 else "")
        + (f" + {reference_bytes} reference" if reference_bytes else "")
        + ") bytes",
    )


def layers_of(arch: Architecture, dims: ParallelDims, stage: int) -> list[int]:
    """Return the indices of a stage's layers, over all its model chunks."""
    size = arch.num_layers // (dims.pp * dims.chunks)
    first = [(chunk * dims.pp + stage) * size for chunk in range(dims.chunks)]
    return [layer for start in first for layer in range(start, start + size)]


def splits_sequence(config: Config, dims: ParallelDims) -> bool:
    """Whether sequence parallelism splits the activations between tensor-parallel regions."""
    asked = config.parallel.sequence_parallel
    return dims.tp > 1 if asked == "auto" else asked


@lru_cache(maxsize=4096)
def stage_adapter_memory(
    adaptation: Adaptation | None, arch: Architecture, dims: ParallelDims, stage: int, split: bool
) -> LayerAdapters:
    """Return what the adapters of a stage add on each of its ranks, over all its layers.

    split   whether sequence parallelism splits the activations between tensor-parallel regions
    """
    if adaptation is None:
        return LayerAdapters()
    layers = [layer_adapters(adaptation, arch, layer, dims.tp, split=split) for layer in layers_of(arch, dims, stage)]
    return LayerAdapters(*map(sum, zip(*layers, strict=True)))


def token_bytes(arch: Architecture, dims: ParallelDims, *, dtype: str, split: bool, recompute: str) -> tuple[int, int]:
    """Return the bytes per token that a layer keeps for its backward pass, and those of the layer being recomputed.

    split      whether sequence parallelism splits the activations between tensor-parallel regions
    recompute  ``model.recompute``
    """
    number = BYTES[dtype]
    heads, kv_heads = arch.num_attention_heads // dims.tp, max(arch.num_kv_heads // dims.tp, 1)
    stream = arch.hidden_size * number // (dims.tp if split else 1)
    count = 2 * arch.pre_norms + 2 * arch.post_norms - (arch.parallel == "one norm")
    norms = 2 * count * stream  # their inputs and outputs
    # Queries and the output; keys and values, of which each context-parallel rank keeps those of the whole row.
    attention = (2 * heads + 2 * kv_heads * dims.cp) * arch.head_dim * number
    if arch.qk_norms:  # queries and keys before their norms
        attention += (heads + kv_heads) * arch.head_dim * number
    # The activation's input, which contains the gate, and its output.
    mlp = (2 + arch.gated) * (arch.ffn_hidden_size // dims.tp) * number
    if recompute == "full":
        return stream, norms + attention + 2 * mlp
    if recompute == "selective":
        return norms + attention, 2 * mlp
    return norms + attention + mlp, 0


def _activations(
    config: Config,
    arch: Architecture,
    dims: ParallelDims,
    stage: int,
    dtype: str,
    tokens: int,
    adapters: LayerAdapters,
) -> tuple[int, int]:
    """Return the bytes that the micro-batches in flight keep, and those of the layer that is being recomputed."""
    split = splits_sequence(config, dims)
    kept, recomputed = token_bytes(arch, dims, dtype=dtype, split=split, recompute=config.model.recompute)
    pairs = -(-config.train.global_batch_size // dims.dp)
    micro_batches = -(-pairs // max(tokens // (2 * config.data.max_length), 1))
    tokens = -(-tokens // dims.cp)
    layers = arch.num_layers // (dims.pp * dims.chunks)  # of a model chunk
    # A mean over the stage's layers, of which only some may have adapters.
    attention, mlp = (BYTES[dtype] * more // (layers * dims.chunks) for more in (adapters.attention, adapters.mlp))
    again = {"none": 0, "selective": mlp, "full": attention + mlp}[config.model.recompute]
    kept, recomputed = kept + attention + mlp - again, recomputed + again
    if dims.vpp:
        # The warmup of an interleaved schedule, and the forward pass before the first backward pass.
        in_flight = min(2 * (dims.pp - stage - 1) + (dims.vpp - 1) * dims.pp + 1, micro_batches * dims.vpp)
    else:
        in_flight = min(dims.pp - stage, micro_batches)
    return tokens * kept * layers * in_flight, tokens * recomputed
