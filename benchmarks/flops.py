"""Compute the minimum number of floating-point operations of DPO, and count those that a program executes."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

TRAINING = 3
"""Minimum work of a forward and backward pass, as a multiple of a forward pass. For each matrix product in the forward
pass, the backward pass needs two."""

FLASH_BACKWARD = 2.5
"""Work of the backward pass of attention kernels, as a multiple of the forward pass. The forward pass has two matrix
products. The backward pass has five, because the kernels recompute the scores."""

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
        """Number of a layer's weights for keys and values. Their outputs are used by later tokens."""
        return 2 * self.hidden * self.kv_heads * self.head_dim

    @property
    def other_weights(self) -> int:
        """Number of a layer's other weights. Their outputs are used only by the token itself."""
        return 2 * self.hidden * self.heads * self.head_dim + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """Number of weights in all matrices. The input and the output embedding are two matrices."""
        return self.layers * (self.keys_and_values + self.other_weights) + 2 * self.hidden * self.vocab


def tree_flops(shape: Shape, prompt: int, responses: Iterable[int], *, prune: bool = True) -> float:
    """Return the number of operations of one forward pass over a prompt, computed once, and its responses.

    prompt     number of tokens in the prompt
    responses  number of tokens in each response, including EOS; the output layer computes one row for each token
    prune      whether the last layer computes only keys and values for the prompt, which is not scored

    A query in a response attends to the whole prompt and, on average, to half of its own response. A query in the
    prompt attends, on average, to half of the prompt.
    """
    responses = list(responses)
    scored = sum(responses)
    tokens = prompt + scored
    to_prompt = prompt**2 / 2
    from_responses = sum(response * (prompt + response / 2) for response in responses)

    whole = to_prompt + from_responses
    area = (shape.layers - 1) * whole + (from_responses if prune else whole)
    weights = (shape.keys_and_values, shape.other_weights, shape.hidden * shape.vocab)
    return _products(shape.layers, weights, tokens, scored, prune) + 4 * shape.heads * shape.head_dim * area


def _products(layers: int, weights: tuple[int, int, int], tokens: int, scored: int, prune: bool) -> int:
    """Return the number of operations of the products with weight matrices in one forward pass.

    weights  numbers of weights: of a layer's keys and values, of its other matrices, and of the output layer
    """
    keys_and_values, others, head = weights
    rows = (layers - 1) * tokens + (scored if prune else tokens)
    return 2 * (layers * keys_and_values * tokens + others * rows + head * scored)


def bound(
    shape: Shape,
    lengths: Iterable[Sequence[int]],
    *,
    passes: float = TRAINING + 1,
    prune: bool = True,
    rank: int | None = None,
) -> float:
    """Return the minimum number of operations to train once on each pair, if each pair's prompt is computed once.

    lengths  number of prompt, chosen and rejected tokens of each pair
    passes   work per pair, as a number of forward passes: `TRAINING`, plus 1 if every step scores its pairs with the
             reference, or plus 1/E if E epochs share the stored results of the reference
    rank     rank of the adapters, if adapters of all matrices in the layers are trained; None: all weights are trained
    """
    trees = [[int(part) for part in pair] for pair in lengths]
    total = passes * sum(tree_flops(shape, prompt, responses, prune=prune) for prompt, *responses in trees)
    if rank is not None:
        total += sum(_adapted(shape, prompt, sum(responses), passes, prune, rank) for prompt, *responses in trees)
    return total


def _adapted(shape: Shape, prompt: int, scored: int, passes: float, prune: bool, rank: int) -> float:
    """Return the number of operations of training adapters, minus that of training all weights.

    Adapters need additional matrix products, but no gradients of the frozen weights. The embedding is frozen too, so no
    gradients of the first layer's inputs are needed.
    """
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    wide = 2 * (shape.hidden + query) + 3 * (shape.hidden + shape.intermediate)
    tokens = prompt + scored
    own = _products(shape.layers, (2 * rank * (shape.hidden + key), rank * wide, 0), tokens, scored, prune)
    weights = (shape.keys_and_values, shape.other_weights, shape.hidden * shape.vocab)
    frozen = _products(shape.layers, weights, tokens, scored, prune)
    first = 2 * tokens * shape.hidden * (query + 2 * key + 3 * rank)
    return passes * own - frozen - first


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], causal: bool) -> float:
    """Return the operations of attention's two matrix products: the scores, and the weighted sums of values.

    Each query attends to all keys or, if `causal`, to its own and earlier keys.
    """
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
    """Return a context manager that counts the operations of matrix products and attention that torch executes.

    The context manager's method `get_total_flops()` returns the count. The counter extends torch's counter, which omits
    in-place products, and attention on a CPU. For causal attention, only visible keys are counted. For attention with a
    mask, all keys are counted, because the kernel computes every score. Kernels that torch does not dispatch, such as
    Triton kernels, are not counted.
    """
    added = {
        aten.addmm_: _added_product,
        aten._scaled_dot_product_flash_attention_for_cpu: _forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    }
    return FlopCounterMode(display=False, custom_mapping=added)
