"""Overlap of tensor-parallel communication with matrix products, by Transformer Engine's communication buffers.

Problem. With tensor and sequence parallelism, a linear layer communicates with the other tensor-parallel ranks. It
gathers its input before the matrix product, or sums its output over the ranks after the product. The GPU's matrix units
wait for this communication. Megatron's field ``tp_comm_overlap`` lets Transformer Engine cut the communication and the
product into pieces, and communicate one piece while it multiplies another. NCCL does not take part: each rank writes to
buffers in the memory of the other ranks. These buffers are created once, with a fixed size, and Transformer Engine
refuses every input of another size.

Solution. All micro-batches of a run have the same number of tokens. This requires ``batch.layout=tree``, in which a
micro-batch has only one row. Each row is padded to the token budget
(:func:`dpo_engine.batching.micro_batches.fixed_row`). Padding is never scored, and no other token sees it. The policy,
the reference and evaluations use the same buffers in turn.

Last layer. The model's last layer computes its output for selected tokens only, and the number of these tokens varies.
The layer is built without the overlap (:class:`~dpo_engine.model.layer.LastLayer`), because this costs less than
computing the output for all tokens.

Frozen weights. Transformer Engine fuses some linear layers with the norm before them. While it computes the gradient
of a fused layer's weight, it sums the gradient of the layer's input over ranks. If the weight is frozen, it does
neither, and the gradient of the input is silently wrong. ``optim.freeze`` is therefore refused. Adapters freeze all
weights, but they are attached to layers without this fusion.

Policy and reference. In a forward pass, Transformer Engine gathers the inputs of fused layers in pieces only if
gradients will be computed. Products of pieces can be rounded differently from the whole product, so policy and
reference can differ by rounding in bf16 (:mod:`dpo_engine.training.first_step`).

FP8. The ranks exchange inputs and output gradients in FP8, so the buffers for them have one byte per number. A layer
that remains in bf16 needs a second set of buffers. Transformer Engine cannot exchange numbers in the format of
``blockwise``. With ``mxfp8``, all pieces must contain whole blocks of 128 x 128 numbers.

Not covered. Tensor-parallel groups whose ranks are on several nodes are refused. No test has run these kernels on a
GPU, so no test covers their numerical results.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dpo_engine.config.parallel_section import MXFP8_BLOCK
from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.fp8 import fp8_layers, layer_problems, linear_sizes, model_problems
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.wording import join

FIELD = "tp_comm_overlap"
"""The field of Megatron's ``TransformerConfig`` that turns the overlap on."""

LINE = f"transformer.{FIELD}=true"
SIZES = (2, 4, 8)
"""Tensor-parallel sizes for which Transformer Engine has kernels. With other sizes, it silently sums nothing."""
WIDTH = 8
"""Number of values that Transformer Engine's kernels read at a time."""
SPLITS = 4
"""Number of pieces into which Transformer Engine cuts a product whose output is summed over ranks."""
GATHERS, SUMS = 8, 4
"""Numbers of buffers for gathers and for sums. Each of the layers ``qkv``, ``proj``, ``fc1`` and ``fc2`` has three
buffers, one for each of its products: the output, the gradient of the input, and the gradient of the weight."""
WORKSPACES = 3 << 25
"""Bytes of cuBLAS's workspaces for three products at the same time."""


def overlap_problems(config: Config) -> Iterator[str]:
    """Yield the reasons why a run with this configuration cannot use the overlap, whatever the model and the GPU."""
    if not config.megatron.tp_comm_overlap:
        return
    tp = config.parallel.tp
    if tp > 1 and tp not in SIZES:
        yield f"{LINE}: Transformer Engine has kernels for parallel.tp={join(SIZES, 'or')} only; change parallel.tp"
    yield from layer_problems(LINE, config)
    if config.batch.layout != "tree":
        yield (
            f"{LINE}: requires rows of one size, which only the tree layout has, but batch.layout is "
            f"{config.batch.layout}; set batch.layout=tree, or remove {FIELD}"
        )
    if config.optim.freeze:
        yield (
            f"{LINE}: Transformer Engine with {FIELD} does not sum the input gradient of a frozen layer over the "
            f"ranks; remove {FIELD} or optim.freeze"
        )
    if config.megatron.fp8_recipe == "blockwise":
        yield (
            f"{LINE}: Transformer Engine cannot exchange numbers in the format of fp8_recipe=blockwise; use another "
            "recipe, or remove tp_comm_overlap"
        )


def overlap_model_problems(config: Config, arch: Architecture, dims: ParallelDims) -> list[str]:
    """List the reasons why the layers of a model cannot use the overlap with these parallel sizes."""
    if not config.megatron.tp_comm_overlap:
        return []
    line = f"megatron.{LINE}"
    problems = model_problems(line, arch)
    blocks = config.megatron.fp8_recipe == "mxfp8"
    widths = {"the hidden size": (arch.hidden_size, SPLITS * (MXFP8_BLOCK if blocks else WIDTH))}
    if blocks:
        summed = ("width of the attention output", "width of the MLP", "width of the shared expert")
        sizes = linear_sizes(arch, dims)
        widths |= {f"the {what} on each rank": (sizes[what], MXFP8_BLOCK) for what in summed if what in sizes}
    problems += [
        f"{line}: {what}, {size}, must be a multiple of {divisor}; remove {FIELD}"
        for what, (size, divisor) in widths.items()
        if size % divisor
    ]
    if arch.num_layers == 1:
        why = "has no effect on the last layer, which is this model's only layer"
        problems.append(f"{line}: {why}; remove {FIELD}")
    return problems


def overlap_line(config: Config) -> str:
    """Return a description of the overlap for the log; without the overlap, return an empty text."""
    return ", tensor-parallel communication overlaps with matrix products" if config.megatron.tp_comm_overlap else ""


def without_overlap(config: Config) -> Config:
    """Return the configuration without the overlap."""
    return config.model_copy(update={"megatron": config.megatron.without(FIELD)})


@dataclass(frozen=True)
class Buffers:
    """The buffers of a rank.

    tokens  number of tokens of all tp ranks together
    width   hidden size
    tp      number of ranks that share the buffers
    fp8     whether there is a set of buffers for layers in FP8
    bf16    whether there is a set of buffers for layers in bf16
    """

    tokens: int
    width: int
    tp: int
    fp8: bool
    bf16: bool

    @classmethod
    def of(cls, config: Config, arch: Architecture, dims: ParallelDims, row_tokens: int) -> Buffers:
        """Return the buffers for rows of ``row_tokens`` tokens."""
        in_fp8, overlapped = set(fp8_layers(config, arch)), set(range(arch.num_layers - 1))
        tokens = -(-row_tokens // dims.cp)
        return cls(tokens, arch.hidden_size, dims.tp, bool(overlapped & in_fp8), bool(overlapped - in_fp8))

    @property
    def bytes(self) -> int:
        """Total bytes of the buffers and of cuBLAS's workspaces."""
        each = (GATHERS + 2 * SUMS) * self.fp8 + 2 * (GATHERS + SUMS) * self.bf16
        return self.tokens * self.width * each + WORKSPACES


def buffer_bytes(config: Config, arch: Architecture, dims: ParallelDims, tokens: int) -> int:
    """Return the bytes of a rank's buffers for rows of ``tokens`` tokens; 0 without the overlap."""
    return Buffers.of(config, arch, dims, tokens).bytes if config.megatron.tp_comm_overlap else 0


def multicast_problem(config: Config) -> str | None:
    """Return the reason why Transformer Engine cannot create its buffers on this GPU, or None."""
    if not config.megatron.tp_comm_overlap or os.environ.get("UB_SKIPMC", "0") != "0":
        return None
    if import_module("transformer_engine_torch").device_supports_multicast():
        return None
    return (
        f"megatron.{LINE}: this GPU, its driver or this version of CUDA cannot write to several GPUs at once "
        "(multicast); set the environment variable UB_SKIPMC=1, to write to each GPU separately, or "
        "remove tp_comm_overlap"
    )


def layer_options(
    config: Config, arch: Architecture, dims: ParallelDims, world: Any, row_tokens: int | None
) -> dict[str, Any]:
    """Return the fields of ``megatron.transformer``, and create the buffers of the overlap unless they exist.

    row_tokens  number of tokens of every row. None: the model will only be saved, so it is built without the overlap

    *Collectives*, if buffers are created: one all-gather of objects over world, and those of Transformer Engine, which
    creates two groups.
    Raises :class:`~dpo_engine.errors.ConfigError` on all ranks if the ranks of a tensor-parallel group are on several
    nodes, or if this version of Transformer Engine cannot create the buffers.
    """
    options = dict(config.megatron.transformer)
    if config.megatron.tp_comm_overlap and row_tokens is None:
        del options[FIELD]
    elif config.megatron.tp_comm_overlap:
        _open(Buffers.of(config, arch, dims, row_tokens), world)
    return options


_opened: Buffers | None = None


def _open(buffers: Buffers, world: Any) -> None:
    """Create Transformer Engine's buffers, unless the same buffers exist."""
    global _opened
    if _opened == buffers:
        return
    close_buffers()
    import torch
    import torch.distributed as dist

    tp, hosts = buffers.tp, [""] * world.size()
    dist.all_gather_object(hosts, socket.gethostname(), group=world)
    for first in range(0, len(hosts), tp):
        if len(nodes := sorted(set(hosts[first : first + tp]))) > 1:
            raise ConfigError(
                f"megatron.{LINE}: the {tp} ranks of a tensor-parallel group must be on one node, but ranks {first} to "
                f"{first + tp - 1} are on {join(nodes, 'and')}; lower parallel.tp, or remove {FIELD}"
            )
    base = import_module("transformer_engine.pytorch.module.base")
    kinds = getattr(base, "UserBufferQuantizationMode", None)
    if kinds:
        sets = [kind for kind, needed in ((kinds.FP8, buffers.fp8), (kinds.NONE, buffers.bf16)) if needed]
        precision: dict[str, Any] = {"quantization_modes": sets}
    elif buffers.fp8 and buffers.bf16:
        raise ConfigError(
            f"megatron.{LINE}: this version of Transformer Engine has one set of buffers, but some layers are in fp8 "
            "and some in bf16; remove tp_comm_overlap or first_last_layers_bf16"
        )
    else:
        precision = {"use_fp8": buffers.fp8}
    shape = [buffers.tokens, buffers.width]
    base.initialize_ub(shape, tp, dtype=torch.bfloat16, bootstrap_backend="nccl", **precision)
    _opened = buffers


def close_buffers() -> None:
    """Free Transformer Engine's buffers, if there are any. No model that was built with them can run afterwards."""
    global _opened
    if _opened is not None:
        import_module("transformer_engine.pytorch.module.base").destroy_ub()
        _opened = None
