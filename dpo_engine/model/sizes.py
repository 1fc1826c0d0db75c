"""Count the matrix parameters that a token uses in each part of a layer, to derive operation counts. Needs no torch."""

from __future__ import annotations

from dpo_engine.model.architecture import Architecture


def attention_inputs(arch: Architecture) -> int:
    """Return the number of parameters in the projections that precede attention in a layer."""
    if arch.latent is None:
        return arch.hidden_size * arch.qkv_size
    inside = arch.latent
    query = arch.hidden_size * arch.query_size
    if inside.query_rank is not None:
        query = inside.query_rank * (arch.hidden_size + arch.query_size)
    return query + arch.hidden_size * inside.down_size + inside.rank * arch.latent_kv_size


def attention_output(arch: Architecture) -> int:
    """Return the number of parameters in the projection that follows attention in a layer."""
    return arch.hidden_size * arch.value_size


def score_size(arch: Architecture) -> int:
    """Return the mean of a layer's query width and value width, where both are summed over the heads.

    A visible (query, key) pair costs twice this many multiplications.
    """
    return (arch.query_size + arch.value_size) // 2


def mlp_parameters(arch: Architecture, layer: int) -> int:
    """Return the number of parameters that a token uses in the MLP of a layer, including its router."""
    if layer in arch.layers("dense"):
        return arch.mlp_matrices * arch.hidden_size * arch.ffn_hidden_size
    experts = arch.experts
    width = experts.chosen * experts.ffn_hidden_size + (experts.shared_size or 0)
    return arch.hidden_size * (3 * width + experts.count + experts.shared_gate)
