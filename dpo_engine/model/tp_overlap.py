"""Overlap of tensor-parallel communication with matrix products, by Transformer Engine's communication buffers.

Problem. With tensor and sequence parallelism, a linear layer gathers its input from the other ranks before its product,
or sums its output over them afterwards. The GPU's matrix units wait meanwhile. Megatron's field ``tp_comm_overlap``
lets Transformer Engine cut communication and product into pieces, and run a piece of one during a piece of the other.
NCCL does not take part: each rank writes to buffers in the memory of the other ranks. These buffers are created once,
with a fixed size, and Transformer Engine refuses every input of another size.

Solution. All micro-batches of a run have the same number of tokens. This requires rows of trees, one of which is a
micro-batch; each row is padded to the token budget (:func:`dpo_engine.batching.micro_batches.fixed_row`). Padding is
never scored, and no other token sees it. The policy, the reference and evaluations use the same buffers in turn.

Last layer. It computes selected columns only, so its sizes vary. It is built without the overlap
(:class:`~dpo_engine.model.layer.LastLayer`), which is cheaper than computing all columns.

Frozen weights. Transformer Engine sums the gradient of a fused layer's input while it computes the gradient of the
weight. If the weight is frozen, it skips both, and the gradient of the input is silently wrong. ``optim.freeze`` is
therefore refused. Adapters freeze all weights, but they are attached to layers without this fusion.

Policy and reference. Transformer Engine gathers the inputs of fused layers in pieces only in passes that compute
gradients. Products of pieces can be rounded differently from the whole product, so policy and reference can differ by
rounding in bf16 (:mod:`dpo_engine.training.first_step`).

Not covered. FP8. Groups of ranks on several nodes. Numbers: no test has run these kernels on a GPU.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import Architecture
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.wording import join

FIELD = "tp_comm_overlap"
"""The field of Megatron's ``TransformerConfig``."""

LINE = f"transformer.{FIELD}=true"
SIZES = (2, 4, 8)
"""Tensor-parallel sizes for which Transformer Engine has kernels. With others, it silently sums nothing."""
WIDTH = 32
"""Divisor of the hidden size: Transformer Engine cuts it into 4 parts, and its kernels read 8 numbers at a time."""
BUFFERS = 12
"""Number of buffers: one for the forward product, and two for those of the backward pass, of each of the layers
``qkv``, ``proj``, ``fc1`` and ``fc2``."""
WORKSPACES = 3 << 25
"""Bytes of cuBLAS's workspaces for three products at the same time."""


def overlap_problems(config: Config) -> Iterator[str]:
    """Yield the reasons why a run with this configuration cannot use the overlap, whatever the model and the GPU."""
    if not config.megatron.tp_comm_overlap:
        return
    tp = config.parallel.tp
    if tp > 1 and tp not in SIZES:
        yield f"{LINE}: Transformer Engine has kernels for parallel.tp={join(SIZES, 'or')} only; change parallel.tp"
    if config.model.spec == "native":
        yield f"{LINE}: requires Transformer Engine's layers, but model.spec is native; set model.spec=te, or remove it"
    if config.model.dtype == "fp32":
        yield f"{LINE}: requires weights in bf16, but model.dtype is fp32; set model.dtype=bf16, or remove it"
    if config.batch.layout != "tree":
        yield (
            f"{LINE}: its buffers have a fixed size, and only rows of trees can have one, but batch.layout is "
            f"{config.batch.layout}; set batch.layout=tree, or remove it"
        )
    if config.optim.freeze:
        yield (
            f"{LINE}: Transformer Engine would not sum the gradient of a layer's input over ranks if the weight is "
            "frozen; remove it, or optim.freeze"
        )
    if config.megatron.transformer.get("fp8"):
        yield f"{LINE}: was never tested with fp8; remove it, or fp8"


def overlap_model_problems(config: Config, arch: Architecture) -> list[str]:
    """List the reasons why the layers of a model cannot use the overlap."""
    if not config.megatron.tp_comm_overlap:
        return []
    problems, line = [], f"megatron.{LINE}"
    if not arch.suits_transformer_engine:
        problems.append(
            f"{line}: requires Transformer Engine's layers, which do not support {arch.model_type} models; remove it"
        )
    if arch.hidden_size % WIDTH:
        problems.append(f"{line}: the hidden size, {arch.hidden_size}, must be a multiple of {WIDTH}; remove it")
    if arch.num_layers == 1:
        problems.append(f"{line}: has no effect, because the model's only layer computes selected columns; remove it")
    return problems


def overlap_line(config: Config) -> str:
    """Describe the overlap for the log; an empty text without it."""
    return ", tensor-parallel communication overlaps with products" if config.megatron.tp_comm_overlap else ""


def without_overlap(config: Config) -> Config:
    """Return the configuration without the overlap."""
    kept = {name: value for name, value in config.megatron.transformer.items() if name != FIELD}
    return config.model_copy(update={"megatron": config.megatron.model_copy(update={"transformer": kept})})


def buffer_bytes(config: Config, arch: Architecture, dims: ParallelDims, tokens: int) -> int:
    """Return the bytes of a rank's buffers for rows of ``tokens`` tokens, and of the workspaces of products."""
    if not config.megatron.tp_comm_overlap:
        return 0
    return BUFFERS * -(-tokens // dims.cp) * arch.hidden_size * 2 + WORKSPACES


def multicast_problem(config: Config) -> str | None:
    """Return the reason why Transformer Engine cannot create its buffers on this GPU, if any."""
    if not config.megatron.tp_comm_overlap or os.environ.get("UB_SKIPMC", "0") != "0":
        return None
    if import_module("transformer_engine_torch").device_supports_multicast():
        return None
    return (
        f"megatron.{LINE}: this GPU, its driver or this version of CUDA cannot write to several GPUs at once "
        "(multicast); set the environment variable UB_SKIPMC=1, with which each GPU is written to separately, or "
        "remove it"
    )


def layer_options(
    config: Config, arch: Architecture, dims: ParallelDims, world: Any, row_tokens: int | None
) -> dict[str, Any]:
    """Return ``megatron.transformer``, and create the buffers of the overlap unless they exist.

    row_tokens  number of tokens of every row. None: the model will only be saved, so it is built without the overlap

    *Collectives*, if buffers are created: one all-gather of objects over world, and those of Transformer Engine, which
    creates two groups.
    Raises :class:`~dpo_engine.errors.ConfigError` on all ranks if the ranks of a tensor-parallel group are on several
    nodes.
    """
    options = dict(config.megatron.transformer)
    if config.megatron.tp_comm_overlap and row_tokens is None:
        del options[FIELD]
    elif config.megatron.tp_comm_overlap:
        _open_buffers((row_tokens // dims.cp, arch.hidden_size), dims.tp, world)
    return options


_opened: tuple[int, int] | None = None


def _open_buffers(shape: tuple[int, int], tp: int, world: Any) -> None:
    """Create Transformer Engine's buffers for tensors of this shape, which contain the tokens of all tp ranks."""
    global _opened
    if _opened == shape:
        return
    close_buffers()
    import torch
    import torch.distributed as dist

    hosts: list[str] = [""] * world.size()
    dist.all_gather_object(hosts, socket.gethostname(), group=world)
    for first in range(0, len(hosts), tp):
        if len(nodes := sorted(set(hosts[first : first + tp]))) > 1:
            raise ConfigError(
                f"megatron.{LINE}: the {tp} ranks of a tensor-parallel group must be on one node, but ranks {first} to "
                f"{first + tp - 1} are on {join(nodes, 'and')}; lower parallel.tp, or remove it"
            )
    base = import_module("transformer_engine.pytorch.module.base")
    kinds = getattr(base, "UserBufferQuantizationMode", None)  # newer versions can have several sets of buffers
    precision = {"quantization_modes": [kinds.NONE]} if kinds else {"use_fp8": False}
    base.initialize_ub(list(shape), tp, dtype=torch.bfloat16, bootstrap_backend="nccl", **precision)
    _opened = shape


def close_buffers() -> None:
    """Free Transformer Engine's buffers, if there are any. No model that was built with them can run afterwards."""
    global _opened
    if _opened is not None:
        import_module("transformer_engine.pytorch.module.base").destroy_ub()
        _opened = None
