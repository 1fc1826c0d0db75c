"""Building blocks of model families: rules for the weight table, and a reader for the config fields of dense decoders.

A rule maps one parameter of the model to the Hugging Face tensors that it consists of. A rule gives sizes as names of
:class:`~dpo_engine.model.architecture.Architecture` attributes. One table therefore gives the names, shapes and slices
of all tensors, for loading and for saving, even before a model is built.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from dpo_engine.model.architecture import Architecture, HFConfig

LAYER = "decoder.layers.{l}."
HF_LAYER = "model.layers.{l}."


class HFTensor(NamedTuple):
    """Name of a tensor in a Hugging Face checkpoint, and the shape that it must have for a given architecture."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One parameter of the model and the checkpoint tensors that it consists of.

    parameter   name in Megatron's local layer spec; ``{l}`` is the layer number, counted from 0 over all stages
    tensors     names of the tensors in the checkpoint; several tensors are stacked along the rows
    rows        for each tensor, its number of rows, or the Architecture attribute with this number
    columns     the number of columns, or its Architecture attribute, the same for all tensors; None for vectors
    layout      order of the rows of several tensors: ``plain`` (one tensor after the other), ``qkv`` (interleaved by
                key/value head) or ``glu`` (interleaved by tensor-parallel rank). ``vocab`` is a single tensor, followed
                by padding rows
    cut         axis that is sharded over tensor-parallel ranks: 0, 1, or None for a replicated parameter
    when        boolean Architecture attribute that is true if the model has the parameter; None if every model has it
    tied_to     parameter that this one is a copy of if the embeddings are tied
    adapter     whether the parameter belongs to an adapter, whose tensors are in a PEFT adapter
    """

    parameter: str
    tensors: tuple[str, ...]
    rows: tuple[str | int, ...]
    columns: str | int | None = None
    layout: str = "plain"
    cut: int | None = None
    when: str | None = None
    tied_to: str | None = None
    adapter: bool = False

    def applies(self, arch: Architecture) -> bool:
        """Whether a checkpoint of ``arch`` must contain the tensors of this rule."""
        return (self.when is None or getattr(arch, self.when)) and not (self.tied_to and arch.tied_embeddings)

    def row_counts(self, arch: Architecture) -> list[int]:
        """Return the number of rows of each tensor."""
        return [size(arch, name) for name in self.rows]

    def hf_tensors(self, arch: Architecture, layer: int | None = None) -> list[HFTensor]:
        """Return the tensors of the rule in the given layer, with their shapes."""
        rest = () if self.columns is None else (size(arch, self.columns),)
        return [
            HFTensor(name.format(l=layer), (rows, *rest))
            for name, rows in zip(self.tensors, self.row_counts(arch), strict=True)
        ]


def size(arch: Architecture, value: str | int) -> int:
    """Return a size that is given as a number or as the name of an Architecture attribute."""
    return value if isinstance(value, int) else getattr(arch, value)


def expected_tensors(rules: tuple[Rule, ...], arch: Architecture) -> Iterator[tuple[HFTensor, Rule]]:
    """Yield every tensor that a checkpoint of ``arch`` must contain, with the rule that uses it."""
    for rule in rules:
        if rule.applies(arch):
            for layer in range(arch.num_layers) if "{l}" in rule.parameter else [None]:
                for tensor in rule.hf_tensors(arch, layer):
                    yield tensor, rule


def vector(parameter: str, tensor: str, rows: str, **facts: Any) -> Rule:
    """Return the rule for a norm weight of the transformer layers, which is replicated on all tensor-parallel ranks.

    facts   other fields of the rule, such as ``when``
    """
    return Rule(f"{LAYER}{parameter}.weight", (f"{HF_LAYER}{tensor}.weight",), (rows,), **facts)


def linear(
    parameter: str,
    tensors: dict[str, str],
    *,
    columns: str,
    cut: int,
    layout: str = "plain",
    bias: str | None = None,
) -> tuple[Rule, ...]:
    """Return the rules for the weight and the bias of a linear layer that is part of every transformer layer.

    tensors   maps each name in the checkpoint, without ``.weight``, to the Architecture attribute with its row count
    bias      boolean Architecture attribute that is true if there is a bias; None if there never is one
    """
    names = [HF_LAYER + name for name in tensors]
    rows = tuple(tensors.values())

    def part(kind: str, columns: str | None, when: str | None) -> Rule:
        stored = tuple(f"{name}.{kind}" for name in names)
        return Rule(f"{LAYER}{parameter}.{kind}", stored, rows, columns, layout, cut, when)

    weight = part("weight", columns, None)
    return (weight,) if bias is None else (weight, part("bias", None, bias))


ROOT = (
    Rule(
        "embedding.word_embeddings.weight",
        ("model.embed_tokens.weight",),
        ("vocab_size",),
        "hidden_size",
        layout="vocab",
        cut=0,
    ),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden_size",)),
    Rule(
        "output_layer.weight",
        ("lm_head.weight",),
        ("vocab_size",),
        "hidden_size",
        layout="vocab",
        cut=0,
        tied_to="embedding.word_embeddings.weight",
    ),
)

NORMS = (
    vector("input_layernorm", "input_layernorm", "hidden_size"),
    vector("pre_mlp_layernorm", "post_attention_layernorm", "hidden_size"),
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
    *linear("self_attention.linear_proj", {"self_attn.o_proj": "hidden_size"}, columns="query_size", cut=1),
)

QK_NORM = (
    vector("self_attention.q_layernorm", "self_attn.q_norm", "head_dim", when="qk_norm"),
    vector("self_attention.k_layernorm", "self_attn.k_norm", "head_dim", when="qk_norm"),
)

MLP = (
    *linear(
        "mlp.linear_fc1",
        {"mlp.gate_proj": "ffn_hidden_size", "mlp.up_proj": "ffn_hidden_size"},
        columns="hidden_size",
        layout="glu",
        cut=0,
    ),
    *linear("mlp.linear_fc2", {"mlp.down_proj": "hidden_size"}, columns="ffn_hidden_size", cut=1),
)

DENSE = ROOT + NORMS + ATTENTION + MLP


def dense(
    config: HFConfig,
    *,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    head_dim: int | None = None,
    num_kv_heads: int | None = None,
    sliding_window: int | None = None,
) -> Architecture:
    """Read the architecture of a dense decoder with gated SiLU MLPs; all such families have the same field names.

    head_dim       value if ``config.json`` omits the field, as in transformers; None: hidden_size / num_attention_heads
    num_kv_heads   value if ``config.json`` omits the field, as in transformers; None: num_attention_heads
    """
    config.only("hidden_act", "silu", "the engine's MLP uses gated SiLU; other activations are not supported")
    heads = config.count("num_attention_heads")
    hidden = config.count("hidden_size")
    theta, scaling = rope(config)
    return Architecture(
        model_type=config.get("model_type"),
        num_layers=config.count("num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_kv_heads=config.count("num_key_value_heads", num_kv_heads or heads),
        head_dim=config.count("head_dim", head_dim or max(hidden // heads, 1)),
        ffn_hidden_size=config.count("intermediate_size"),
        vocab_size=config.count("vocab_size"),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tied_embeddings=config.flag("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=config.count("max_position_embeddings"),
        sliding_window=sliding_window,
    )


SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope(config: HFConfig) -> tuple[float, dict[str, Any] | None]:
    """Read the base and the scaling of the rotary frequencies. Return ``(rope_theta, rope_scaling)``.

    There are two forms of these fields: ``rope_theta`` and ``rope_scaling`` at the top level, or a ``rope_parameters``
    object that contains both. If a file has both forms, ``rope_scaling`` takes precedence, as in transformers.
    """
    values = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(values, dict):
        config.problem(f"rope_scaling={values!r}: must be an object; correct config.json")
        return 1.0, None
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in SCALINGS:
        config.problem(f"rope_type={kind!r}: only {', '.join(SCALINGS)} are supported; use another model")
        return 1.0, None
    nested = [name for name, value in values.items() if isinstance(value, dict)]
    if nested:
        config.problem(f"rope_parameters.{nested[0]}: per-layer rotary frequencies are not supported")
    inner = HFConfig({**_top_level(config, kind), **{k: v for k, v in values.items() if v is not None}}, config.where)
    inner.only("partial_rotary_factor", 1.0, "only rotary embeddings over whole heads are supported")
    theta = inner.number("rope_theta", 10000.0)
    numbers = {name: inner.number(name) for name in SCALINGS[kind]}
    if kind == "llama3" and not inner.problems and not numbers["low_freq_factor"] < numbers["high_freq_factor"]:
        inner.problem(
            f"low_freq_factor={numbers['low_freq_factor']}: must be below "
            f"high_freq_factor={numbers['high_freq_factor']}; correct config.json"
        )
    config.problems += inner.problems
    return theta, {"rope_type": kind, **numbers} if numbers else None


def _top_level(config: HFConfig, kind: str) -> dict[str, Any]:
    """Return the rotary fields that older files have at the top level; they are defaults for the inner object."""
    found = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor") if config.get(name) is not None}
    if kind == "llama3":
        found["original_max_position_embeddings"] = config.get(
            "original_max_position_embeddings", config.get("max_position_embeddings")
        )
    return found
