"""Building blocks of model families: parts of weight tables, and a reader for the config fields of dense decoders."""

from dataclasses import replace
from typing import Any

from dpo_engine.model.activations import ACTIVATIONS
from dpo_engine.model.architecture import Architecture, HFConfig
from dpo_engine.model.families.rope import Rope, rope
from dpo_engine.model.families.rule import LAYER, Rule

HF_LAYER = "model.layers.{l}."


def vector(parameter: str, tensor: str, rows: str, **facts: Any) -> Rule:
    """Return the rule for a norm weight of the transformer layers. All tensor-parallel ranks have the whole weight.

    facts   other fields of the rule, such as ``when``
    """
    return Rule(f"{LAYER}{parameter}.weight", (f"{HF_LAYER}{tensor}.weight",), (rows,), **facts)


def norm(parameter: str, tensor: str, *, inside: str = HF_LAYER, when: str | None = None) -> tuple[Rule, ...]:
    """Return the rules for the weight and the bias of a norm of hidden states.

    inside  first part of the tensors' names; empty for a norm outside of the layers
    when    condition for both rules, as in :class:`Rule`. Set it only if all norms of the family have biases. None: the
            model always has the weight, and has the bias if ``norm_bias`` is true
    """
    name = f"{LAYER if inside else ''}{parameter}"
    return (
        Rule(f"{name}.weight", (f"{inside}{tensor}.weight",), ("hidden_size",), when=when),
        Rule(f"{name}.bias", (f"{inside}{tensor}.bias",), ("hidden_size",), when=when or "norm_bias"),
    )


def linear(
    parameter: str,
    tensors: dict[str, str] | tuple[str, tuple[str, ...]],
    *,
    columns: str,
    cut: int,
    layout: str = "plain",
    bias: str | None = None,
    inside: str = HF_LAYER,
    transposed: bool = False,
) -> tuple[Rule, ...]:
    """Return the rules for the weight and the bias of a linear layer that is part of every transformer layer.

    tensors   mapping from the name of each tensor in the checkpoint, without ``.weight``, to the Architecture attribute
              with the tensor's row count; or a pair: the name of a single tensor, and the attributes with the row
              counts of its parts
    bias      boolean Architecture attribute that is true if there is a bias; None if there never is one
    inside    first part of the tensors' names
    transposed  whether the weight is stored with rows and columns exchanged
    """
    stored, rows = tensors if isinstance(tensors, tuple) else (None, tuple(tensors.values()))
    names = (stored,) if stored else tuple(tensors)

    def part(kind: str, columns: str | None, cut: int | None, when: str | None) -> Rule:
        return Rule(
            f"{LAYER}{parameter}.{kind}", tuple(f"{inside}{name}.{kind}" for name in names), rows, columns, layout, cut,
            when,
        )  # fmt: skip

    weight = replace(part("weight", columns, cut, None), transposed=transposed)
    # If columns are sharded, ranks compute parts of a sum. The bias is added once to this sum, so it is replicated.
    return (weight,) if bias is None else (weight, part("bias", None, 0 if cut == 0 else None, bias))


def root(embedding: str = "model.embed_tokens", final: str = "model.norm", head: str = "lm_head") -> tuple[Rule, ...]:
    """Return the rules outside of the layers: embedding, final norm and output layer."""
    word = "embedding.word_embeddings.weight"
    return (
        Rule(word, (f"{embedding}.weight",), ("vocab_size",), "hidden_size", layout="vocab", cut=0),
        *norm("decoder.final_layernorm", final, inside=""),
        Rule(
            "output_layer.weight",
            (f"{head}.weight",),
            ("vocab_size",),
            "hidden_size",
            layout="vocab",
            cut=0,
            tied_to=word,
        ),
    )


def within(prefix: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the rules for a model that is a part of a larger model.

    prefix  start of the names of the part's tensors in the checkpoint; the names in ``rules`` do not contain it
    """
    return tuple(replace(rule, tensors=tuple(f"{prefix}{name}" for name in rule.tensors)) for rule in rules)


ROOT = root()

NORMS = norm("input_layernorm", "input_layernorm") + norm("pre_mlp_layernorm", "post_attention_layernorm")

AFTER_NORMS = norm("post_attention_layernorm", "post_attention_layernorm") + norm(
    "post_mlp_layernorm", "post_feedforward_layernorm"
)
"""Norms after attention and MLP, and none before them."""

ALL_NORMS = (
    norm("input_layernorm", "input_layernorm")
    + norm("post_attention_layernorm", "post_attention_layernorm")
    + norm("pre_mlp_layernorm", "pre_feedforward_layernorm")
    + norm("post_mlp_layernorm", "post_feedforward_layernorm")
)
"""Norms before and after attention and MLP, with Gemma's names."""

OUT = linear(
    "self_attention.linear_proj",
    {"self_attn.o_proj": "hidden_size"},
    columns="query_size",
    cut=1,
    bias="out_bias",
)

ATTENTION = (
    *linear(
        "self_attention.linear_qkv",
        {"self_attn.q_proj": "query_size", "self_attn.k_proj": "kv_size", "self_attn.v_proj": "kv_size"},
        columns="hidden_size",
        layout="qkv",
        cut=0,
        bias="qkv_bias",
    ),
    *OUT,
)

FUSED_ATTENTION = (
    *linear(
        "self_attention.linear_qkv",
        ("self_attn.qkv_proj", ("query_size", "kv_size", "kv_size")),
        columns="hidden_size",
        layout="qkv",
        cut=0,
        bias="qkv_bias",
    ),
    *OUT,
)


SINKS = (
    Rule(
        f"{LAYER}self_attention.sinks",
        (f"{HF_LAYER}self_attn.sinks",),
        ("num_attention_heads",),
        cut=0,
        when="attention_sinks",
    ),
)


def qk_norm(query: str, key: str, sizes: tuple[str, str] = ("head_dim", "head_dim")) -> tuple[Rule, ...]:
    """Return the rules for the norms of queries and keys.

    sizes   Architecture attributes with the sizes of the two norms
    """
    return (
        vector("self_attention.q_layernorm", f"self_attn.{query}", sizes[0], when="qk_norms"),
        vector("self_attention.k_layernorm", f"self_attn.{key}", sizes[1], when="qk_norms"),
    )


QK_NORM = qk_norm("q_norm", "k_norm")
WHOLE_QK_NORM = qk_norm("q_norm", "k_norm", ("query_size", "kv_size"))

DOWN = linear("mlp.linear_fc2", {"mlp.down_proj": "hidden_size"}, columns="ffn_hidden_size", cut=1, bias="mlp_bias")

MLP = (
    *linear(
        "mlp.linear_fc1",
        {"mlp.gate_proj": "ffn_hidden_size", "mlp.up_proj": "ffn_hidden_size"},
        columns="hidden_size",
        layout="glu",
        cut=0,
        bias="mlp_bias",
    ),
    *DOWN,
)

FUSED_MLP = (
    *linear(
        "mlp.linear_fc1",
        ("mlp.gate_up_proj", ("ffn_hidden_size", "ffn_hidden_size")),
        columns="hidden_size",
        layout="glu",
        cut=0,
        bias="mlp_bias",
    ),
    *DOWN,
)


def plain_mlp(up: str, down: str, *, inside: str = HF_LAYER) -> tuple[Rule, ...]:
    """Return the rules for the two linear layers of an MLP without a gate."""
    return (
        *linear(
            "mlp.linear_fc1", {up: "ffn_hidden_size"}, columns="hidden_size", cut=0, bias="mlp_bias", inside=inside
        ),
        *linear(
            "mlp.linear_fc2", {down: "hidden_size"}, columns="ffn_hidden_size", cut=1, bias="mlp_bias", inside=inside
        ),
    )


DENSE = ROOT + NORMS + ATTENTION + MLP

WINDOWS = {"full_attention", "sliding_attention"}
"""Values of ``layer_types`` that are supported."""

HF_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
"""Maps names of activations in ``config.json`` to names in :class:`~dpo_engine.model.architecture.Architecture`."""


def activation(config: HFConfig, name: str = "hidden_act", default: str = "silu") -> str:
    """Read the activation of the MLP from the field ``name``."""
    value = config.get(name, default)
    if value in HF_ACTIVATIONS:
        return HF_ACTIVATIONS[value]
    if value in ACTIVATIONS:  # registered by a plugin
        return value
    known = ", ".join(HF_ACTIVATIONS)
    config.problem(f"{name}={value!r}: the engine's MLP does not support this activation, but supports {known}")
    return "silu"


def biases(config: HFConfig, attention: bool = False, mlp: bool | None = None) -> dict[str, bool]:
    """Read ``attention_bias``, which applies to all linear layers of attention, and ``mlp_bias``.

    attention, mlp   defaults of the two fields; ``mlp`` is None if the family has no field ``mlp_bias``, and no biases
                     in the MLP
    """
    bias = config.flag("attention_bias", attention)
    found = {"qkv_bias": bias, "out_bias": bias}
    return found if mlp is None else {**found, "mlp_bias": config.flag("mlp_bias", mlp)}


def softcap(config: HFConfig, name: str, default: float | None = None) -> float | None:
    """Read a soft cap; null means that there is none."""
    return None if config.values.get(name, default) is None else config.number(name, default)


def sliding(config: HFConfig, period: int | None = None, first: int = 0) -> tuple[int, ...]:
    """Return the indices of the layers with a sliding window, from ``layer_types``.

    period, first  if ``config.json`` omits the field, every layer from ``first`` on has a window, except for every
                   ``period``-th layer of the model; if ``period`` is None, there are no exceptions
    """
    count = config.count("num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        return tuple(layer for layer in range(first, count) if period is None or (layer + 1) % period)
    if not isinstance(kinds, list) or len(kinds) != count or {*map(str, kinds)} - WINDOWS:
        config.problem(
            f"layer_types: must have {count} entries, each {' or '.join(sorted(WINDOWS))}; use another model"
        )
        return ()
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")


def dense(
    config: HFConfig,
    *,
    head_dim: int | None = None,
    num_kv_heads: int | None = None,
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    tied: bool = False,
    theta: float = 10000.0,
    partial: float = 1.0,
    **facts: Any,
) -> Architecture:
    """Read the architecture of a dense decoder from the fields that most families share.

    The defaults are used if ``config.json`` omits a field. They must be the family's defaults in transformers.

    head_dim       default of this field; None: hidden_size / num_attention_heads
    num_kv_heads   default of ``num_key_value_heads``; None: num_attention_heads
    eps            name and default of the field for the norms' epsilon
    tied           default of ``tie_word_embeddings``
    theta, partial defaults of ``rope_theta`` and ``partial_rotary_factor``
    facts          other fields of :class:`~dpo_engine.model.architecture.Architecture`; if they include ``rope_theta``,
                   the rotary fields of ``config.json`` are not read
    """
    if "activation" not in facts:
        config.only("hidden_act", "silu", "the MLP of this family uses SiLU; other activations are not supported")
    heads = config.count("num_attention_heads")
    hidden = config.count("hidden_size")
    width = config.count("head_dim", head_dim or max(hidden // heads, 1))
    positions = Rope() if "rope_theta" in facts else rope(config, theta=theta, partial=partial)
    turned = int(width * positions.share)
    return Architecture(
        model_type=config.get("model_type"),
        num_layers=config.count("num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_kv_heads=config.count("num_key_value_heads", num_kv_heads or heads),
        head_dim=width,
        ffn_hidden_size=config.count("intermediate_size"),
        vocab_size=config.count("vocab_size"),
        norm_eps=config.number(*eps),
        tied_embeddings=config.flag("tie_word_embeddings", tied),
        max_positions=config.count("max_position_embeddings"),
        rotary_dim=None if turned == width else turned,
        **{
            "qkv_bias": False,
            "qk_norm": False,
            "rope_theta": positions.theta,
            "rope_scaling": positions.scaling,
            **facts,
        },
    )
