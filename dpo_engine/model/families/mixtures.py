"""Building blocks of families with experts: parts of weight tables, and readers of the fields about experts."""

from dataclasses import replace

from dpo_engine.errors import shorten
from dpo_engine.model.architecture import HFConfig
from dpo_engine.model.families.blocks import HF_LAYER, MLP
from dpo_engine.model.families.rule import LAYER, Fused, Rule
from dpo_engine.model.mixture import Experts

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")

DENSE_MLP = tuple(replace(rule, layers="dense") for rule in MLP)
"""The rules for the MLP of the layers without experts."""


def gated(parameter: str, tensor: str, size: str, names: tuple[str, str, str] = GATE_UP_DOWN) -> tuple[Rule, ...]:
    """Return the rules for the matrices of a gated MLP in the layers with experts.

    parameter          first part of the names of the MLP's parameters in the model
    tensor             first part of the names of the MLP's tensors in the checkpoint
    size               Architecture attribute with the MLP's width
    names              names of the gate, up and down projections in the checkpoint
    """
    gate, up, down = (f"{HF_LAYER}{tensor}{name}.weight" for name in names)
    fc1, fc2 = (f"{LAYER}mlp.{parameter}linear_{name}.weight" for name in ("fc1", "fc2"))
    return (
        Rule(fc1, (gate, up), (size, size), "hidden_size", layout="glu", cut=0, layers="experts"),
        Rule(fc2, (down,), ("hidden_size",), size, cut=1, layers="experts"),
    )


def mixture(
    inside: str = "mlp.", *, names: tuple[str, str, str] = GATE_UP_DOWN, shared: str | None = None
) -> tuple[Rule, ...]:
    """Return the rules for a router, its experts and, if there is one, the MLP that every token uses.

    inside  first part of the tensors' names, after the prefix of the layer
    names   names of an expert's gate, up and down projections in the checkpoint
    shared  name of the MLP that every token uses; None: there is none
    """

    def router(parameter: str, tensor: str, rows: str | int, columns: str | None, when: str | None = None) -> Rule:
        stored = (f"{HF_LAYER}{inside}{tensor}",)
        return Rule(f"{LAYER}mlp.{parameter}", stored, (rows,), columns, when=when, layers="experts")

    rules = (
        router("router.weight", "gate.weight", "experts.count", "hidden_size"),
        router("router.expert_bias", "gate.e_score_correction_bias", "experts.count", None, "experts.bias"),
        *gated("experts.local_experts.{e}.", f"{inside}experts.{{e}}.", "experts.ffn_hidden_size", names),
    )
    if shared is None:
        return rules
    return (
        *rules,
        *gated("shared_experts.", f"{inside}{shared}.", "experts.shared_size"),
        router("shared_experts.gate_weight", "shared_expert_gate.weight", 1, "hidden_size", "experts.shared_gate"),
    )


def fused_experts(inside: str = "mlp.", names: tuple[str, str, str] = GATE_UP_DOWN) -> tuple[Fused, ...]:
    """Return the fused tensors of the experts; each of them contains matrices of all experts of a layer.

    The names of the fused tensors are those in transformers' modules. With ``save_original_format=False``, transformers
    saves checkpoints in this form. If the router has a different name in these checkpoints, the result also contains
    the router's weight.

    inside, names   as for :func:`mixture`
    """
    gate, up, down = (f"{HF_LAYER}{inside}experts.{{e}}.{name}.weight" for name in names)
    stored = f"{HF_LAYER}mlp.experts."
    router = (Fused(f"{HF_LAYER}mlp.gate.weight", (f"{HF_LAYER}{inside}gate.weight",)),) if inside != "mlp." else ()
    return (Fused(f"{stored}gate_up_proj", (gate, up)), Fused(f"{stored}down_proj", (down,)), *router)


def named_count(config: HFConfig, *names: str, default: int | None = None) -> int:
    """Read a count that can have any of several names.

    If ``config.json`` has none of the names, return the default. If there is no default either, record a problem that
    mentions the first of the names.
    """
    given = next((name for name in names if config.get(name) is not None), names[0])
    return config.count(given, default)


def sparse_layers(config: HFConfig) -> tuple[int, ...]:
    """Return the indices of the layers with experts, from ``decoder_sparse_step`` and ``mlp_only_layers``."""
    count, step = config.count("num_hidden_layers"), config.count("decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int and 0 <= layer < count for layer in dense):
        config.problem(
            f"mlp_only_layers={shorten(repr(dense), 60)}: must be a list of layer numbers, from 0 to {count - 1}; "
            "correct config.json"
        )
        dense = []
    return tuple(layer for layer in range(count) if layer not in dense and (layer + 1) % step == 0)


def checked(config: HFConfig, experts: Experts) -> Experts | None:
    """Return the mixture, or None if no layer has experts.

    If the numbers of the mixture are inconsistent, record a problem and return None.
    """
    size = experts.count // experts.groups
    for found, limit, what in (
        (experts.chosen, experts.count, "experts per token, but the number of experts is {}"),
        (experts.chosen_groups, experts.groups, "groups per token, but the number of groups is {}"),
        (experts.chosen, experts.chosen_groups * size, "experts per token, but only {} experts in a token's groups"),
    ):
        if found > limit:
            config.problem(f"experts: {found} {what.format(limit)}; correct config.json")
            return None
    if experts.count % experts.groups or size < experts.group_best:
        config.problem(
            f"n_group={experts.groups}: must divide the number of experts, {experts.count}, into groups of at least "
            f"{experts.group_best}; correct config.json"
        )
        return None
    return experts if experts.layers else None


def deepseek_experts(
    config: HFConfig,
    *,
    count: int,
    chosen: int | None,
    width: int,
    shared: int = 1,
    dense_layers: int,
    groups: tuple[int, int],
    scale: float = 1.0,
) -> Experts:
    """Read the mixture of DeepSeek-V3 and similar models: sigmoid scores, groups, and an MLP that every token uses.

    The keyword arguments are the defaults of fields that ``config.json`` can omit:

    count         ``n_routed_experts``
    chosen        ``num_experts_per_tok``; None: the field is required
    width         ``moe_intermediate_size``
    shared        ``n_shared_experts``
    dense_layers  ``first_k_dense_replace``
    groups        ``n_group`` and ``topk_group``
    scale         ``routed_scaling_factor``
    """
    layers, first = config.count("num_hidden_layers"), config.get("first_k_dense_replace", dense_layers)
    if type(first) is not int or not 0 <= first <= layers:
        config.problem(
            f"first_k_dense_replace={shorten(repr(first), 60)}: must be a whole number from 0 to {layers}; correct "
            "it in config.json"
        )
        first = 0
    size = config.count("moe_intermediate_size", width)
    return Experts(
        layers=tuple(range(first, layers)),
        count=named_count(config, "n_routed_experts", "num_local_experts", "num_experts", default=count),
        chosen=config.count("num_experts_per_tok", chosen),
        ffn_hidden_size=size,
        score="sigmoid",
        normalized=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", scale),
        bias=True,
        groups=config.count("n_group", groups[0]),
        chosen_groups=config.count("topk_group", groups[1]),
        group_best=2,
        shared_size=size * config.count("n_shared_experts", shared),
    )
