"""The adapters of a model: the adapted projections, their ranks and scales, and the tensors of the PEFT adapter.

Each setting has the same meaning as PEFT's corresponding setting. This module does not import Megatron.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from dpo_engine.config.adapter_section import AdapterConfig
from dpo_engine.model.architecture import FAMILIES, Architecture
from dpo_engine.model.families.rule import LAYER, HFTensor, Rule, expected_tensors
from dpo_engine.wording import join

PREFIX = "base_model.model."
"""Start of all tensor names in a PEFT adapter of a causal language model."""
PARTS = {"A": ".lora_A.weight", "B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
"""The parts of an adapter, and the suffixes of their tensors' names in a PEFT adapter."""
PARAMETER = re.compile(r"(?P<linear>.+)_adapter\.(?P<projection>\w+)_(?P<part>A|B|magnitude)")
"""Name of an adapter's parameter in the model."""
ALL_LINEAR = "all-linear"
UNSUPPORTED = {
    "lm_head": "the engine computes the output layer and the log-probabilities in one operation, which has no adapters",
    "embed_tokens": "an embedding is not a projection",
    "model.embed_tokens": "an embedding is not a projection",
}


class AdapterShape(NamedTuple):
    """The adapter of one projection: its rank, and the factor ``scale`` of the low-rank product."""

    rank: int
    scale: float


@dataclass(frozen=True)
class Adaptation:
    """The settings of all adapters of a model, with PEFT's semantics.

    targets        whole names of projections, or the last parts of their names, such as ``q_proj``; or a regular
                   expression that must match a projection's whole name
    layers         indices of the adapted layers; None: all layers. If a target is the whole name of a projection, the
                   projection is adapted even if its layer is not listed
    rank_pattern   pairs of a regular expression and a rank. A projection gets the rank of the first pair whose
                   expression matches the projection's name, or the end of this name. A projection without a match gets
                   ``rank``
    alpha_pattern  pairs of a regular expression and an alpha. A projection's alpha is chosen in the same way; without a
                   match, it is ``alpha``
    """

    kind: str
    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...] | str
    layers: tuple[int, ...] | None = None
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, asked: AdapterConfig, arch: Architecture) -> Adaptation:
        """Return the settings of the section ``adapter``, whose ``path`` must be null."""
        names = tuple(dict.fromkeys(name.rpartition(".")[2] for name in projection_names(arch)))
        return cls(
            kind=asked.kind,
            rank=asked.rank,
            alpha=asked.alpha,
            rslora=asked.rslora,
            targets=names if asked.targets == ALL_LINEAR else asked.targets,
            layers=asked.layers,
            rank_pattern=tuple(asked.rank_pattern.items()),
            alpha_pattern=tuple(asked.alpha_pattern.items()),
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The settings in a form that can be compared: targets and layers are sorted, as their order has no meaning."""
        targets = self.targets if isinstance(self.targets, str) else sorted(self.targets)
        return {**asdict(self), "targets": targets, "layers": self.layers and sorted(self.layers)}

    @property
    def dora(self) -> bool:
        """Whether the norms of the weights' rows are trained (DoRA)."""
        return self.kind == "dora"

    def shape(self, projection: str) -> AdapterShape | None:
        """Return the adapter of a projection, such as ``model.layers.0.self_attn.q_proj``; None if it has none."""
        if not self._targets(projection):
            return None
        rank, alpha = self.setting("rank", projection), self.setting("alpha", projection)
        return AdapterShape(rank, alpha / (math.sqrt(rank) if self.rslora else rank))

    def setting(self, name: str, projection: str) -> Any:
        """Return a projection's ``rank`` or ``alpha``: the value of the first matching pattern.

        Without a match, the value is that of the field ``rank`` or ``alpha``.
        """
        patterns: Sequence[tuple[str, Any]] = getattr(self, f"{name}_pattern")
        return next((value for pattern, value in patterns if matches(pattern, projection)), getattr(self, name))

    def _targets(self, projection: str) -> bool:
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, projection) is not None
        if projection in self.targets:  # PEFT ignores `layers` for a target that is the whole name
            return True
        named = any(projection.endswith(f".{target}") for target in self.targets)
        return named and (self.layers is None or layer_of(projection) in self.layers)


def ending(pattern: str) -> str:
    """Return PEFT's regular expression for a pattern. The expression also matches the end of a name, after a dot."""
    return rf"(.*\.)?({pattern})$"


def matches(pattern: str, projection: str) -> bool:
    return re.match(ending(pattern), projection) is not None


def layer_of(projection: str) -> int:
    """Return the index of the layer that a projection belongs to."""
    return int(re.search(r"\.(\d+)\.", projection)[1])


def projection_rules(arch: Architecture) -> list[Rule]:
    """Return the weight table's rules for the matrices that can be adapted.

    These are the matrices of the layers' sharded linear modules, except the matrices of experts.
    """
    return [
        rule
        for rule in FAMILIES[arch.model_type].rules
        if rule.parameter.startswith(LAYER)
        and not rule.expert
        and rule.columns
        and rule.cut is not None
        and rule.applies(arch)
    ]


def layer_rules(arch: Architecture, layer: int) -> list[Rule]:
    """Return the rules of :func:`projection_rules` for one layer."""
    return [rule for rule in projection_rules(arch) if layer in arch.layers(rule.layers)]


def _projections(arch: Architecture) -> Iterator[tuple[str, HFTensor]]:
    for layer in range(arch.num_layers):
        for rule in layer_rules(arch, layer):
            for tensor in rule.hf_tensors(arch, layer):
                yield tensor.name.removesuffix(".weight"), tensor


def projection_names(arch: Architecture) -> list[str]:
    """Return the names of all projections that can be adapted, in the order of the layers."""
    return [name for name, _ in _projections(arch)]


@lru_cache(maxsize=8)
def expert_names(arch: Architecture) -> tuple[str, ...]:
    """Return the names of the experts' matrices, without ``.weight``. These matrices cannot be adapted."""
    rules = [rule for rule in FAMILIES[arch.model_type].rules if rule.expert and rule.applies(arch)]
    tensors = (tensor for rule in rules for place in rule.places(arch) for tensor in rule.hf_tensors(arch, *place))
    return tuple(tensor.name.removesuffix(".weight") for tensor in tensors)


def adapter_shapes(adaptation: Adaptation, arch: Architecture) -> dict[str, AdapterShape]:
    """Return the adapters of the whole model, by the names of their projections."""
    return {name: shape for name in projection_names(arch) if (shape := adaptation.shape(name))}


def peft_tensors(adaptation: Adaptation, arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of all tensors in a PEFT adapter with these settings."""
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in _projections(arch):
        if shape := adaptation.shape(name):
            rows, columns = tensor.shape
            sizes = {"A": (shape.rank, columns), "B": (rows, shape.rank), "magnitude": (rows,)}
            found |= {PREFIX + name + PARTS[part]: sizes[part] for part in parts_of(adaptation)}
    return found


def parts_of(adaptation: Adaptation) -> tuple[str, ...]:
    """Return the names of the parts that each adapter has; see `PARTS`."""
    return ("A", "B", "magnitude") if adaptation.dora else ("A", "B")


def adapter_rule(base: Rule, projection: str, part: str, rank: int | None) -> Rule:
    """Return the weight table's rule for a part of an adapter, derived from the rule of the adapted matrix.

    base        rule of the matrix that contains the projection
    projection  last part of the projection's name, such as ``q_proj``
    part        ``A``, ``B`` or ``magnitude``; see `PARTS`
    rank        rank of the adapter; not needed for the magnitude

    If the matrix is sharded along its inputs, so is ``A``. If it is sharded along its outputs, so are ``B`` and the
    magnitude. If the checkpoint stores the whole matrix as one tensor, ``B`` and the magnitude have the matrix's
    layout. Otherwise, their layout is ``plain``.
    """
    index = next(index for index, name in enumerate(base.tensors) if name.split(".")[-2] == projection)
    rows, layout = (base.rows, base.layout) if is_whole(base) else ((base.rows[index],), "plain")
    columns: str | int | None = {"A": base.columns, "B": rank, "magnitude": None}[part]
    axis = 1 if part == "A" else 0
    return Rule(
        parameter=f"{base.parameter.removesuffix('.weight')}_adapter.{projection}_{part}",
        tensors=(PREFIX + base.tensors[index].removesuffix(".weight") + PARTS[part],),
        rows=(rank,) if part == "A" else rows,
        columns=columns,
        layout="plain" if part == "A" else layout,
        cut=axis if base.cut == axis else None,
        adapter=True,
    )


def is_whole(base: Rule) -> bool:
    """Whether the checkpoint stores the whole matrix of a rule as one tensor. This matrix is then one projection."""
    return len(base.tensors) == 1


def adapter_parameters(adaptation: Adaptation, arch: Architecture) -> int:
    """Return the number of parameters in all adapters of the model."""
    return sum(math.prod(shape) for shape in peft_tensors(adaptation, arch).values())


def adapter_lines(asked: AdapterConfig | None, adaptation: Adaptation | None, arch: Architecture) -> list[str]:
    """Return a list with the log line that describes the adapters; without adapters, the list is empty."""
    if asked is None or adaptation is None:
        return []
    shapes = adapter_shapes(adaptation, arch)
    ranks = sorted({shape.rank for shape in shapes.values()})
    projections = dict.fromkeys(name.rpartition(".")[2] for name in shapes)
    frozen = sum(math.prod(tensor.shape) for tensor, _ in expected_tensors(FAMILIES[arch.model_type].rules, arch))
    return [
        f"adapter: {adaptation.kind} of rank {join(ranks, 'and')}; adapted projections: {len(shapes)} "
        f"({', '.join(projections)}); {'newly initialized' if asked.path is None else f'loaded from {asked.path}'}; "
        f"{adapter_parameters(adaptation, arch):,} parameters are trained, and {frozen:,} are frozen"
    ]


@lru_cache(maxsize=64)
def matrix_parameters(adaptation: Adaptation, arch: Architecture) -> int:
    """Return the number of parameters in the matrices of all adapters. Every token uses all of these matrices."""
    return sum(math.prod(shape) for shape in peft_tensors(adaptation, arch).values() if len(shape) == 2)


class LayerAdapters(NamedTuple):
    """The memory that the adapters of one or more layers add on each tensor-parallel rank.

    parameters  number of parameters of the adapters
    attention   change in the number of activations per token that attention keeps for the backward pass, compared with
                a model that has no adapters and whose weights are all trained. Adapters keep additional activations,
                but frozen linears do not keep their inputs, so the change can be negative
    mlp         the same change for the MLP
    """

    parameters: int = 0
    attention: int = 0
    mlp: int = 0


def layer_adapters(adaptation: Adaptation, arch: Architecture, layer: int, tp: int, *, split: bool) -> LayerAdapters:
    """Return the memory that the adapters of a layer add on each of ``tp`` ranks.

    split   whether sequence parallelism shards the activations outside the tensor-parallel regions
    """
    parameters, kept = 0, {"attention": 0, "mlp": 0}
    for rule in layer_rules(arch, layer):
        up, down = (tp, 1) if rule.cut == 0 else (1, tp)
        tensors = rule.hf_tensors(arch, layer)
        shapes = [adaptation.shape(tensor.name.removesuffix(".weight")) for tensor in tensors]
        for tensor, shape in zip(tensors, shapes, strict=True):
            if shape:
                rows, columns = tensor.shape
                parameters += shape.rank * (columns // down + rows // up) + adaptation.dora * (rows // up)
        part = "attention" if "attention" in rule.parameter else "mlp"
        if any(shapes):
            outputs = sum(tensor.shape[0] for tensor in tensors) // (tp if split else up)
            kept[part] += sum(shape.rank for shape in shapes if shape) + adaptation.dora * outputs
        elif rule.cut == 0 or part == "mlp":
            # A frozen linear does not keep its input. Attention's output projection is excluded, because its input is
            # the output of core attention, which core attention keeps anyway.
            kept[part] -= tensors[0].shape[1] // (tp if split else down)
    return LayerAdapters(parameters, **kept)
