"""Estimate the memory that one rank needs, from the number of parameters in its pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_engine.config.rules import reads_reference
from dpo_engine.config.run import Config
from dpo_engine.model.architecture import Architecture
from dpo_engine.platform.parallel import ParallelDims

GIB = 1 << 30


def layer_parameters(arch: Architecture, tp: int = 1) -> int:
    """Return the number of parameters that one transformer layer has on each of `tp` ranks.

    Norms are replicated on all ranks. Key-value heads are replicated if there are fewer of them than ranks.
    """
    kv_heads = max(arch.num_kv_heads // tp, 1)
    heads = arch.num_attention_heads // tp
    qkv = (heads + 2 * kv_heads) * arch.head_dim * (arch.hidden_size + arch.qkv_bias)
    out = heads * arch.head_dim * arch.hidden_size
    mlp = 3 * arch.hidden_size * (arch.ffn_hidden_size // tp)
    return qkv + out + mlp + 2 * arch.hidden_size + 2 * arch.head_dim * arch.qk_norm


def parameters(arch: Architecture) -> int:
    """Return the number of parameters in the whole model, with the vocabulary size of its checkpoint (not padded)."""
    embeddings = arch.vocab_size * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    return arch.num_layers * layer_parameters(arch) + embeddings + arch.hidden_size


def stage_parameters(arch: Architecture, dims: ParallelDims, stage: int) -> int:
    """Return the number of parameters on one rank of a pipeline stage, over all model chunks, with padded vocabulary.

    If embeddings are tied and the first stage is not also the last, both stages store the embeddings.
    """
    embedding = dims.padded_vocab(arch.vocab_size) // dims.tp * arch.hidden_size
    count = arch.num_layers // dims.pp * layer_parameters(arch, dims.tp)
    first, last = stage == 0, stage == dims.pp - 1
    if first:
        count += embedding
    if last:
        count += arch.hidden_size + (0 if first and arch.tied_embeddings else embedding)
    return count


@dataclass(frozen=True)
class Memory:
    """Bytes that are allocated during the whole run, on a rank of the largest pipeline stage."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    formula: str

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.reference


def memory(config: Config, arch: Architecture, dims: ParallelDims, *, dtype: str) -> Memory:
    """Estimate the memory for weights, gradients, optimizer state, and resident reference of the largest stage.

    Activations, logits, communication buffers, and the allocator's overhead are not included.

    dtype  "fp32" or "bf16"
    """
    counts = [stage_parameters(arch, dims, stage) for stage in range(dims.pp)]
    stage = counts.index(max(counts))
    number = counts[stage]
    weight_bytes = {"fp32": 4, "bf16": 2}[dtype]
    # Adam keeps two fp32 moments, and bf16 weights also need an fp32 main copy.
    state_bytes = {"fp32": 8, "bf16": 12}[dtype]
    shards = dims.dp * dims.cp if config.parallel.distributed_optimizer else 1
    reference_bytes = weight_bytes if config.reference.mode == "resident" and reads_reference(config) else 0
    return Memory(
        stage=stage,
        weights=number * weight_bytes,
        gradients=number * 4,
        optimizer=-(-number * state_bytes // shards),
        reference=number * reference_bytes,
        formula=f"{number:,} parameters x ({weight_bytes} weight + 4 gradient + {state_bytes} optimizer"
        + (f" / {shards} (dp x cp)" if shards > 1 else "")
        + (f" + {reference_bytes} reference" if reference_bytes else "")
        + ") bytes",
    )
