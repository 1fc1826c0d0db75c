"""Low-rank adapters on Megatron's linear modules: LoRA and DoRA, sharded like the linears.

Problem. Megatron fuses several projections of the checkpoint into one linear (query, key and value; gate and up), and
shards linears by rows or by columns. An adapter of the fused matrix would not be a PEFT adapter, whose projections have
separate matrices ``A`` and ``B``. An adapter that used the collectives of its linear would exchange tensors as wide as
the model.

Solution. An :class:`Adapter` is a module beside its linear, and a forward hook of the linear adds the adapter's result
to the output. (The adapter is not a child of the linear, because Transformer Engine's linears require that all their
parameters have one dtype.) An :class:`Adapter` has one parameter for each PEFT tensor of its linear's projections, so
the weight table covers loading, saving, resharding and exporting. For a fused linear, the matrices ``A`` are stacked.
The matrices ``B`` are the blocks of a temporary matrix, whose rows are in the order of the linear's rows. The other
elements of this temporary matrix are zeros::

    z    = x A_all^T                     [s, b, R]     R is the sum of the adapters' ranks
    out += z B_all^T                                   B_all [rows of this rank, R], scaled

For this computation, tensor-parallel ranks exchange ``z``, whose width is R, but no wider activations. (If there are
more ranks than key heads, the ranks also gather ``B`` for a fused linear of queries, keys and values.)

===================================  =====================================  ====================================
linear                               forward                                backward
===================================  =====================================  ====================================
sharded by rows                      nothing                                SUM of dz
... with sequence parallelism        all-gather of z                        reduce-scatter of dz
sharded by columns                   SUM of z                               nothing
... with sequence parallelism        reduce-scatter of z                    all-gather of dz
===================================  =====================================  ====================================

Under sequence parallelism, a rank computes the gradient of a replicated matrix from its own tokens only. Megatron sums
these gradients over tp, because the parameters have the attribute ``sequence_parallel``. Without sequence parallelism,
each rank has the whole gradient.

Not covered: adapters of the embedding, the output layer, experts, and matrices that tensor parallelism does not shard;
and dropout inside adapters, because its masks would depend on the layout.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from dpo_engine.model.adaptation import (
    Adaptation,
    AdapterShape,
    adapter_rule,
    is_whole,
    layer_rules,
    parts_of,
)
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.families.rule import LAYER, Rule
from dpo_engine.platform.parallel import ParallelGroups


class Adapter(nn.Module):
    """The adapters of all projections that are fused into one linear.

    linear   the adapted linear, already on its device
    base     rule of the linear's weight
    shapes   adapters of the rule's projections, by the last part of the projection's name; None for a projection
             without an adapter
    parts    names of the parts that each adapter has, from :func:`~dpo_engine.model.adaptation.parts_of`
    dtype    dtype of the adapter's parameters

    All parameters belong to this module directly, and not to child modules, because DDP waits only for the gathered
    weights of the module that is called, and not for the weights of its children.
    """

    def __init__(
        self,
        linear: nn.Module,
        base: Rule,
        shapes: Mapping[str, AdapterShape | None],
        arch: Architecture,
        groups: ParallelGroups,
        *,
        parts: Sequence[str],
        dtype: torch.dtype,
    ):
        super().__init__()
        self.tp = groups.tp
        tp = self.tp.size()
        self.sequence_parallel = linear.config.sequence_parallel
        self.columns_sharded = base.cut == 1
        joined = base.layout == "qkv" and not is_whole(base)
        # With more ranks than key-value heads, a rank's rows of the fused matrix do not contain an equal part of every
        # projection. In this case, each rank owns an equal share of each B, and all ranks gather B in the forward pass.
        self.gathers = joined and arch.num_kv_heads % tp != 0
        self.shapes = dict(shapes)
        self.dora = "magnitude" in parts
        self.active = True
        ranks = tp if base.cut == 0 and not self.gathers else 1
        self.heads = arch.num_kv_heads // ranks if joined else 1
        counts = [sum(base.row_counts(arch))] if is_whole(base) else base.row_counts(arch)
        self.rows = {name: count // ranks for name, count in zip(shapes, counts, strict=True)}
        # own_norms: the norms of the linear's rows, by projection. own_squares: the sum of squares of each row of this
        # rank, over this rank's columns only.
        self.own_norms: dict[str, Tensor] = {}
        self.own_squares: Tensor | None = None
        columns, owners = linear.weight.shape[1], tp if self.gathers else 1
        for name, shape in self.adapted:
            rows = self.rows[name] // owners
            sizes = {"A": (shape.rank, columns), "B": (rows, shape.rank), "magnitude": (rows,)}
            for part in parts:
                parameter = nn.Parameter(torch.zeros(sizes[part], dtype=dtype, device=linear.weight.device))
                cut = adapter_rule(base, name, part, shape.rank).cut
                if cut is not None and tp > 1:
                    set_tensor_model_parallel_attributes(parameter, True, cut, 1)
                else:
                    parameter.sequence_parallel = self.sequence_parallel
                self.register_parameter(f"{name}_{part}", parameter)

    @property
    def adapted(self) -> list[tuple[str, AdapterShape]]:
        """The projections that have an adapter, each with the adapter's rank and scale."""
        return [(name, shape) for name, shape in self.shapes.items() if shape is not None]

    def share(self, name: str, part: str) -> nn.Parameter:
        """Return this rank's share of ``A``, ``B`` or the magnitude of a projection's adapter."""
        return getattr(self, f"{name}_{part}")

    def _rows_of(self, name: str, part: str) -> Tensor:
        """Return the rows of ``B`` or of the magnitude from which :meth:`_fused` takes this rank's rows."""
        share = self.share(name, part)
        if not self.gathers:
            return share
        return gather_from_sequence_parallel_region(share, tensor_parallel_output_grad=True, group=self.tp)

    def _fused(self, blocks: Sequence[Tensor]) -> Tensor:
        """Arrange rows of each projection [rows, k] in the order of the linear's rows on this rank."""
        fused = torch.cat([block.unflatten(0, (self.heads, -1)) for block in blocks], dim=1).flatten(0, 1)
        return fused.chunk(self.tp.size())[self.tp.rank()] if self.gathers else fused

    def _split(self, fused: Tensor) -> dict[str, Tensor]:
        """Split a vector into one part per projection: the reverse of :meth:`_fused`.

        fused   one number per row of the linear on this rank
        """
        if self.gathers:
            shares = [torch.empty_like(fused) for _ in range(self.tp.size())]
            dist.all_gather(shares, fused, group=self.tp)
            fused = torch.cat(shares)
        widths = [self.rows[name] // self.heads for name in self.shapes]
        parts = fused.unflatten(0, (self.heads, -1)).split(widths, dim=1)
        return {name: part.flatten() for name, part in zip(self.shapes, parts, strict=True)}

    def down(self) -> Tensor:
        """Return all matrices ``A``, stacked [R, columns of this rank]."""
        return torch.cat([self.share(name, "A") for name, _ in self.adapted])

    def up(self) -> Tensor:
        """Return all scaled matrices ``B`` as one block matrix [rows of this rank, R].

        *Collectives* if ranks gather ``B``: for each projection's ``B``, an all-gather over tp, and a reduce-scatter of
        the gradient.
        """
        total, start = sum(shape.rank for _, shape in self.adapted), 0
        like = self.share(self.adapted[0][0], "A")
        blocks = {name: like.new_zeros(rows, total) for name, rows in self.rows.items()}
        for name, shape in self.adapted:
            scaled = self._rows_of(name, "B") * shape.scale
            blocks[name] = F.pad(scaled, (start, total - start - shape.rank))
            start += shape.rank
        return self._fused(list(blocks.values()))

    def forward(self, x: Tensor, out: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output of the adapted linear.

        x       [s, b, columns of this rank]    the linear's input; [s/t, b, h] with sequence parallelism and sharded
                                                rows
        out     [s (/t), b, rows of this rank]  the linear's output
        bias    the bias that ``out`` includes, or None

        *Collectives*: those in the table at the top of this file, and those of :meth:`up`. With DoRA, the collectives
        of :meth:`up` are repeated for the magnitudes; if columns are sharded, there is also a SUM over tp of one number
        per row.
        """
        down, up = self.down(), self.up()
        z = self._exchanged(F.linear(x, down.to(x.dtype)))
        delta = F.linear(z, up.to(x.dtype))
        if not self.dora:
            return out + delta
        ratio = self._magnitude() / self._norms(weight, down, up)
        product = delta + (out if bias is None else out - bias)
        # Adding (ratio - 1) * product preserves the digits of a ratio near 1 in bf16, and saves a buffer.
        return out + delta + (ratio - 1).to(x.dtype) * product

    def _exchanged(self, z: Tensor) -> Tensor:
        if self.tp.size() == 1:
            return z
        if self.columns_sharded:
            exchange = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            return exchange(z, group=self.tp)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(z, tensor_parallel_output_grad=True, group=self.tp)
        return copy_to_tensor_model_parallel_region(z, group=self.tp)

    def _magnitude(self) -> Tensor:
        """Return the trained norm of each row of this rank; for rows without an adapter, the norm of the frozen row."""
        norms = [
            self._rows_of(name, "magnitude") if shape else self.own_norms[name] for name, shape in self.shapes.items()
        ]
        return self._fused([norm[:, None] for norm in norms])[:, 0]

    @torch.no_grad()
    def _norms(self, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Return the norm of each of this rank's rows of ``weight + B A``. The norms have no gradient.

        The sum of the two matrices is never computed. For a row w of ``weight``, the same row u of ``up``, and the
        matrix D = ``down``, the squared norm is ``|w + u D|^2 = |w|^2 + 2 w D^T u^T + u D D^T u^T``.

        *Source*: DoRA (arXiv 2402.09353), section 4.3, which treats the norm as a constant.

        *Collectives*: with sharded columns, a SUM over tp of one number per row.
        """
        cross = ((weight.to(down.dtype) @ down.T) * up).sum(1, dtype=torch.float64)
        square = ((up @ (down @ down.T)) * up).sum(1, dtype=torch.float64)
        total = self.own_squares + 2 * cross + square
        if self.columns_sharded and self.tp.size() > 1:
            dist.all_reduce(total, group=self.tp)
        return total.sqrt().to(down.dtype)

    @torch.no_grad()
    def reset_magnitude(self, weight: Tensor) -> None:
        """With DoRA, set the magnitudes to the norms of the linear's rows. Call this after the weights are loaded.

        *Collectives* with DoRA: if columns are sharded, a SUM over tp of one number per row; if ranks gather ``B``, an
        all-gather over tp of one number per row.
        """
        if not self.dora:
            return
        self.own_squares = weight.double().square().sum(1)
        down = self.down()
        self.own_norms = self._split(self._norms(weight, down, down.new_zeros(weight.shape[0], down.shape[0])))
        for name, _ in self.adapted:
            norms = self.own_norms[name]
            self.share(name, "magnitude").copy_(norms.chunk(self.tp.size())[self.tp.rank()] if self.gathers else norms)


def _add_adapter(
    adapter: Adapter, linear: nn.Module, args: tuple[Any, ...], result: tuple[Tensor, Tensor | None]
) -> Any:
    """Return the output of a linear with its adapter; used as a forward hook of the linear."""
    if not adapter.active:
        return result
    out, separate_bias = result
    bias = None if separate_bias is not None else getattr(linear, "bias", None)
    bias = bias if bias is not None and bias.numel() else None  # without a bias, Transformer Engine's bias is empty
    return adapter(args[0], out, linear.weight, bias), separate_bias


def attach(
    chunks: Sequence[nn.Module],
    adaptation: Adaptation,
    arch: Architecture,
    groups: ParallelGroups,
    *,
    dtype: torch.dtype,
) -> None:
    """Freeze a loaded model, and attach adapters that change nothing: ``A`` and ``B`` are zero.

    dtype   dtype of the adapters' parameters. bf16 is too coarse, because an optimizer's update is usually far smaller
            than the parameter that it changes

    *Collectives* with DoRA: those of :meth:`Adapter.reset_magnitude`.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.frozen_input = chunk.adapted = True
        for layer in chunk.decoder.layers:
            for rule in layer_rules(arch, layer.layer_number - 1):
                tensors = rule.hf_tensors(arch, layer.layer_number - 1)
                names = [tensor.name.removesuffix(".weight") for tensor in tensors]
                shapes = {name.rpartition(".")[2]: adaptation.shape(name) for name in names}
                if any(shapes.values()):
                    path, _, name = rule.parameter.removeprefix(LAYER).removesuffix(".weight").rpartition(".")
                    parent = layer.get_submodule(path)
                    linear, parts = parent.get_submodule(name), parts_of(adaptation)
                    adapter = Adapter(linear, rule, shapes, arch, groups, parts=parts, dtype=dtype)
                    adapter.reset_magnitude(linear.weight)
                    parent.add_module(f"{name}_adapter", adapter)
                    linear.register_forward_hook(partial(_add_adapter, adapter))


def adapters(chunks: Sequence[nn.Module]) -> Iterator[Adapter]:
    """Yield the adapters of this rank's model chunks, in the order of the layers."""
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, Adapter))


@contextmanager
def adapters_off(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Make the model compute without its adapters inside a ``with`` block. On exit, all adapters are turned on."""
    found = list(adapters(chunks))
    for adapter in found:
        adapter.active = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.active = True


class AdapterValues:
    """A second set of values for the adapters of a model chunk, which can be swapped with the values in the chunk.

    An instance has those members of a chunk that the weight table needs, so checkpoints can contain the values.
    """

    def __init__(self, chunk: nn.Module):
        chunk = getattr(chunk, "module", chunk)  # unwrap DDP
        self.decoder = chunk.decoder
        self._own = {name: parameter for name, parameter in chunk.named_parameters() if parameter.requires_grad}
        self._values = {name: parameter.detach().clone() for name, parameter in self._own.items()}

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the values under the names of the chunk's trained parameters."""
        yield from self._values.items()

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap the values in this set with the values in the chunk."""
        for name, parameter in self._own.items():
            before = parameter.clone()
            parameter.copy_(self._values[name])
            self._values[name].copy_(before)

    @torch.no_grad()
    def read(self) -> None:
        """Copy the values in the chunk to this set."""
        for name, parameter in self._own.items():
            self._values[name].copy_(parameter)
