"""Floating-point operations of DPO: the minimum for a step, and a counter of what a program executed."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

TRAINING = 3
"""Minimum work of a forward and backward pass, in forward passes: each forward product needs two backward."""

FLASH_BACKWARD = 2.5
"""Backward work of attention kernels, in forward passes: five products to two, since they recompute the scores."""

aten = torch.ops.aten


class Shape(NamedTuple):
    """Sizes of a dense decoder with gated MLPs."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def read(cls, checkpoint: str | Path) -> "Shape":
        """Read the sizes of a Hugging Face checkpoint."""
        said = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
        heads = said["num_attention_heads"]
        return cls(
            hidden=said["hidden_size"],
            layers=said["num_hidden_layers"],
            intermediate=said["intermediate_size"],
            heads=heads,
            kv_heads=said.get("num_key_value_heads") or heads,
            head_dim=said.get("head_dim") or said["hidden_size"] // heads,
            vocab=said["vocab_size"],
        )

    @property
    def keys_and_values(self) -> int:
        """Weights of a layer whose outputs all later tokens need."""
        return 2 * self.hidden * self.kv_heads * self.head_dim

    @property
    def other_weights(self) -> int:
        """Weights of a layer whose outputs only the token itself needs."""
        return 2 * self.hidden * self.heads * self.head_dim + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """Weights in all matrices; input and output embeddings count separately."""
        return self.layers * (self.keys_and_values + self.other_weights) + 2 * self.hidden * self.vocab


def tree_flops(shape: Shape, prompt: int, responses: Iterable[int], *, prune: bool = True) -> float:
    """Return the operations of one forward pass over a prompt, computed once, and the responses after it.

    prompt     its tokens
    responses  tokens of each response, including EOS; the output layer computes this many rows
    prune      in the last layer, compute only keys and values for the prompt, which is not scored

    A query sees all earlier segments of its sequence and, on average, half of its own segment.
    """
    responses = list(responses)
    scored = sum(responses)
    tokens = prompt + scored
    to_prompt = prompt**2 / 2
    from_responses = sum(response * (prompt + response / 2) for response in responses)

    def layer(rows: int, area: float) -> float:
        """Keys and values are computed for all tokens, everything else only for `rows` tokens."""
        products = shape.keys_and_values * tokens + shape.other_weights * rows
        return 2 * products + 4 * shape.heads * shape.head_dim * area

    whole = layer(tokens, to_prompt + from_responses)
    last = layer(scored, from_responses) if prune else whole
    return (shape.layers - 1) * whole + last + 2 * shape.hidden * shape.vocab * scored


def bound(shape: Shape, lengths: Iterable[Sequence[int]], *, passes: float = TRAINING + 1, prune: bool = True) -> float:
    """Return the minimum operations of training once on some pairs, computing each pair's prompt once.

    lengths  prompt, chosen and rejected tokens of each pair
    passes   equivalent forward passes: training plus one reference pass, or 1/E of one if E epochs share a store
    """
    trees = ([int(part) for part in pair] for pair in lengths)
    forward = sum(tree_flops(shape, prompt, responses, prune=prune) for prompt, *responses in trees)
    return passes * forward


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], causal: bool) -> float:
    """Count two products over the keys that each query sees: up to its own position if causal, otherwise all keys."""
    *batch, rows, width = query
    area = rows * (rows + 1) / 2 if causal else rows * key[-2]
    return 2 * math.prod(batch) * area * (width + value[-1])


def _forward(query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> float:
    return _attention(query, key, value, causal)


def _backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, dropout: float, causal: bool, **_: Any
) -> float:
    return FLASH_BACKWARD * _attention(query, key, value, causal)


def _added_product(total: Any, left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def executed_flops() -> FlopCounterMode:
    """Return a context manager that counts the matrix products and attention that torch executes; `get_total_flops()`.

    Extends torch's counter with what it omits on a CPU: attention and in-place products. Causal attention counts the
    visible keys; attention with a mask counts all keys, since the kernel computes every score. Kernels that torch does
    not dispatch (Triton's) are not counted.
    """
    added = {
        aten.addmm_: _added_product,
        aten._scaled_dot_product_flash_attention_for_cpu: _forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    }
    return FlopCounterMode(display=False, custom_mapping=added)
