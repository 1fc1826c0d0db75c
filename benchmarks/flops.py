"""Floating-point operations of DPO: the least a step needs, by arithmetic, and what a program executed, counted."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

TRAINING = 3
"""Least work of a forward and a backward pass, in forward passes: for each product of the one, two of the other."""

FLASH_BACKWARD = 2.5
"""What attention kernels execute, in forward passes: five products for two, as they compute the scores again."""

aten = torch.ops.aten


class Shape(NamedTuple):
    """The sizes of a dense decoder with gated MLPs."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def read(cls, checkpoint: str | Path) -> "Shape":
        """The sizes of the Hugging Face checkpoint in a directory."""
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
        """Weights of a layer that every later token needs the results of."""
        return 2 * self.hidden * self.kv_heads * self.head_dim

    @property
    def other_weights(self) -> int:
        """Weights of a layer that only a token's own results need."""
        return 2 * self.hidden * self.heads * self.head_dim + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """Weights in all matrices, input and output embeddings counted apart."""
        return self.layers * (self.keys_and_values + self.other_weights) + 2 * self.hidden * self.vocab


def tree_flops(shape: Shape, prompt: int, responses: Iterable[int], *, prune: bool = True) -> float:
    """Operations of one forward pass over a prompt, computed once, and the responses that follow it.

    prompt     tokens
    responses  tokens of each, EOS included; the head computes as many rows
    prune      the last layer computes nothing but keys and values for the prompt, which nobody scores

    A query sees all keys before it and, on average, half of its own segment.
    """
    responses = list(responses)
    scored = sum(responses)
    tokens = prompt + scored
    to_prompt = prompt**2 / 2
    from_responses = sum(response * (prompt + response / 2) for response in responses)

    def layer(rows: int, area: float) -> float:
        """With keys and values of all tokens, and everything else of `rows` of them."""
        products = shape.keys_and_values * tokens + shape.other_weights * rows
        return 2 * products + 4 * shape.heads * shape.head_dim * area

    whole = layer(tokens, to_prompt + from_responses)
    last = layer(scored, from_responses) if prune else whole
    return (shape.layers - 1) * whole + last + 2 * shape.hidden * shape.vocab * scored


def bound(shape: Shape, lengths: Iterable[Sequence[int]], *, passes: float = TRAINING + 1, prune: bool = True) -> float:
    """The least operations of training once on some pairs, each pair on its own: its prompt is computed once.

    lengths  prompt, chosen and rejected tokens of each pair
    passes   forward passes that cost as much: training, and one of the reference, or 1/E where E epochs share a store
    """
    trees = ([int(part) for part in pair] for pair in lengths)
    forward = sum(tree_flops(shape, prompt, responses, prune=prune) for prompt, *responses in trees)
    return passes * forward


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], causal: bool) -> float:
    """Two products over the keys that each query sees: as many as its own place if causal, else all of them."""
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
    """A context manager that counts the matrix products and attentions that torch executes; `get_total_flops()` after.

    To torch's own counter it adds what that leaves out on a CPU: attention, and products added in place. A causal
    attention counts the keys that are seen, one with a mask all of them, since the kernel looks at each. Kernels
    that torch does not dispatch (Triton's) are not counted.
    """
    added = {
        aten.addmm_: _added_product,
        aten._scaled_dot_product_flash_attention_for_cpu: _forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    }
    return FlopCounterMode(display=False, custom_mapping=added)
