"""Read a Hugging Face ``config.json`` into a framework-neutral model description. Needs neither torch nor Megatron."""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_engine.errors import ConfigError
from dpo_engine.model.hf_config import HFConfig as HFConfig
from dpo_engine.model.hf_config import read_config_json as read_config_json
from dpo_engine.model.mixture import Experts, Latent
from dpo_engine.registry import Registry

FAMILIES = Registry("model family")
"""Maps a ``model_type`` to the class that reads a ``config.json`` of this type; see
:mod:`dpo_engine.model.families`."""


@dataclass(frozen=True)
class Architecture:
    """The properties that determine a decoder's computation and the shapes of its weights.

    head_dim         size of a head, which can differ from hidden_size / num_attention_heads
    norm_eps         epsilon of every norm, which is added to the mean square or to the variance
    qkv_bias         whether the query, key and value projections have biases
    qk_norm          whether queries and keys are normalized per head
    rope_theta       base of the rotary frequencies
    rope_scaling     None, or a dict with ``rope_type`` and the parameters of that type
    max_positions    maximum sequence length according to ``config.json``, in tokens
    sliding_window   maximum number of tokens that a token attends to in layers with a window, including itself; None:
                     no layer has a window

    The defaults of the following fields describe Llama. A field that has its default is not part of the digest, so
    adding a field does not change the digests of known models.

    rotary_dim          number of dimensions of each head that are rotated; None: all
    rotary_interleaved  True: dimensions 2i and 2i + 1 are rotated together. False: dimensions i and i + rotary_dim/2
    nope_layers         indices of the layers without rotary positions
    sliding_layers      indices of the layers with a sliding window; (): all layers with rotary positions; None: no
                        layers
    sliding_rope_theta, sliding_rope_scaling  ``rope_theta`` and ``rope_scaling`` of the layers with a sliding window,
                                              if these layers have a base or a scaling of their own
    norm                ``rms``; ``layer``, which also subtracts the mean; or the name of a norm that a plugin registers
    norm_bias           whether norms have biases
    norm_offset         number that is added to the weights of norms
    norm_place          where the norms of hidden states are: ``before`` attention and MLP, ``after`` them, or ``both``
    parallel            None: the MLP's input contains the attention's output. ``one norm``: attention and MLP read the
                        output of the same norm. ``two norms``: they have separate norms, which have the same input
    whole_qk_norm       whether one norm covers the queries of all heads, and another norm covers the keys of all
                        heads
    norm_after_rope     whether queries and keys are normalized after they are rotated
    out_bias            whether the output projection of attention has a bias
    mlp_bias            whether the linear layers of the MLP have biases
    activation          ``silu``, ``gelu``, ``gelu_tanh`` (the approximation of GELU), ``relu2`` (squared ReLU), or the
                        name of an activation that a plugin registers
    gated               whether the MLP has a gate
    attention_scale     factor of attention scores; None: 1 / sqrt(head_dim)
    attention_softcap   soft cap c of attention scores, which changes a score x to ``c * tanh(x / c)``; None: no cap
    logit_softcap       soft cap of logits, in the same form; None: no cap
    learned_positions   whether a learned vector for each position is added to the embeddings; queries and keys are then
                        not rotated
    attention_sinks     whether each head has an additional key, whose score is learned and whose value vector is zero
    embedding_scale     factor of the embeddings
    residual_scale      factor of the outputs of attention and MLP
    logit_scale         factor of the logits
    experts             the mixture of experts; None in a dense model
    latent              sizes of latent attention; None if queries, keys and values are linear in the hidden states
    """

    model_type: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_positions: int
    sliding_window: int | None = None
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    nope_layers: tuple[int, ...] = ()
    sliding_layers: tuple[int, ...] | None = ()
    sliding_rope_theta: float | None = None
    sliding_rope_scaling: dict[str, Any] | None = None
    norm: str = "rms"
    norm_bias: bool = False
    norm_offset: float = 0.0
    norm_place: str = "before"
    parallel: str | None = None
    whole_qk_norm: bool = False
    norm_after_rope: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    gated: bool = True
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    attention_sinks: bool = False
    learned_positions: bool = False
    experts: Experts | None = None
    latent: Latent | None = None

    def layers(self, kind: str | None = None) -> list[int]:
        """Return the indices of the layers of a kind: ``experts``, ``dense`` (without experts), or None for all."""
        mixed = self.experts.layers if self.experts else ()
        return [layer for layer in range(self.num_layers) if kind is None or (layer in mixed) == (kind == "experts")]

    @property
    def ropes(self) -> list[tuple[float, dict[str, Any] | None]]:
        """Base and scaling of each kind of rotary positions; :meth:`rope_kind` returns an index into this list."""
        found = [(self.rope_theta, self.rope_scaling)]
        if self.sliding_rope_theta is not None:
            found.append((self.sliding_rope_theta, self.sliding_rope_scaling))
        return found

    def rope_kind(self, layer: int) -> int | None:
        """Return the kind of a layer's rotary positions, an index into :attr:`ropes`; None if the layer has none."""
        if self.learned_positions or layer in self.nope_layers:
            return None
        return int(self.sliding_rope_theta is not None and self.window(layer) is not None)

    def window(self, layer: int) -> int | None:
        """Return the sliding window of a layer, in tokens; None if the layer has no window."""
        if self.sliding_window is None or self.sliding_layers is None:
            return None
        slides = layer in self.sliding_layers if self.sliding_layers else layer not in self.nope_layers
        return self.sliding_window if slides else None

    @cached_property
    def windows(self) -> list[int | None]:
        """The sliding window of each layer; None for a layer without a window."""
        return [self.window(layer) for layer in range(self.num_layers)]

    @property
    def has_windows(self) -> bool:
        """Whether any layer has a sliding window."""
        return any(self.windows)

    @property
    def plain_attention(self) -> bool:
        """Whether all layers have plain causal attention, without a window, a soft cap or sinks."""
        return not (self.has_windows or self.attention_softcap or self.attention_sinks)

    @property
    def pre_norms(self) -> bool:
        """Whether there are norms before attention and MLP."""
        return self.norm_place != "after"

    @property
    def post_norms(self) -> bool:
        """Whether there are norms after attention and MLP."""
        return self.norm_place != "before"

    @property
    def mlp_norm(self) -> bool:
        """Whether the MLP's input passes through a norm that attention does not share."""
        return self.pre_norms and self.parallel != "one norm"

    @property
    def qk_norms(self) -> bool:
        """Whether queries and keys are normalized, per head or all heads together."""
        return self.qk_norm or self.whole_qk_norm

    @property
    def suits_transformer_engine(self) -> bool:
        """Whether Transformer Engine's modules support this architecture.

        They support only RMS norms without an offset. These norms can be in three places: before attention, before the
        MLP, and in attention, for the queries and keys of each head. The modules do not support layers whose MLP has
        the same input as attention. Latent attention, and experts with biases or a clamp, exist only as native modules
        of the engine.
        """
        return (
            self.norm == "rms"
            and self.norm_place == "before"
            and not (self.norm_offset or self.parallel or self.whole_qk_norm or self.latent)
            and not (self.experts and self.experts.special)
        )

    @property
    def query_size(self) -> int:
        """Total width of the query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Total width of the key heads; without latent attention, also the total width of the value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def value_size(self) -> int:
        """Total width of the heads' outputs, which the output projection of attention reads."""
        return self.num_attention_heads * self.latent.value if self.latent else self.query_size

    @property
    def latent_kv_size(self) -> int:
        """With latent attention, total width of all heads' values and of the non-rotary parts of their keys."""
        return self.num_attention_heads * (self.latent.plain + self.latent.value)

    @property
    def qkv_size(self) -> int:
        """Total width of the query, key and value heads, without latent attention."""
        return self.query_size + 2 * self.kv_size

    @property
    def mlp_matrices(self) -> int:
        """Number of matrices in an MLP, each with hidden_size * ffn_hidden_size elements."""
        return 2 + self.gated

    @property
    def matrix_parameters(self) -> int:
        """Number of matrix parameters that a token uses: in linear layers, in its experts, and in the output layer."""
        rules = [rule for rule in FAMILIES[self.model_type].rules if "{l}" in rule.parameter and rule.applies(self)]
        layers = sum(rule.parameters(self) * rule.uses(self) for rule in rules if rule.columns is not None)
        return layers + self.vocab_size * self.hidden_size

    def __hash__(self) -> int:
        return hash(self.digest)  # rope_scaling is a dictionary, which has no hash

    @cached_property
    def digest(self) -> str:
        """Digest of :attr:`facts`. Two architectures have the same digest if and only if their facts are equal."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def facts(self) -> dict[str, Any]:
        """The fields as JSON values. Fields that have their defaults are omitted, except ``sliding_window``.

        ``sliding_layers`` is also omitted if it is None. The last four fields of ``experts`` are omitted if they have
        their defaults.
        """
        llama = {field.name: field.default for field in fields(self) if field.name != "sliding_window"}
        values = json.loads(json.dumps(asdict(self)))
        if not self.sliding_layers:  # () and None have the same digest: no two models differ only in this
            del values["sliding_layers"]
        if self.experts is not None:
            later = {name: vars(Experts)[name] for name in ("router_bias", "biases", "clamp", "slope")}
            values["experts"] = {k: v for k, v in values["experts"].items() if k not in later or v != later[k]}
        return {name: value for name, value in values.items() if getattr(self, name) != llama.get(name, MISSING)}

    def differences(self, other: "Architecture") -> list[str]:
        """Describe each difference in a field that affects computed values or shapes.

        A description is ``field=A instead of B``, where A is the value in ``other``, and B the value in this
        architecture.

        ``max_positions`` is compared only if positions are learned, because it is then the size of a tensor. Otherwise,
        it is a limit that has no effect on shorter sequences.
        """
        limits = set() if self.learned_positions else {"max_positions"}
        return [
            f"{field.name}={getattr(other, field.name)!r} instead of {getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name not in limits and getattr(self, field.name) != getattr(other, field.name)
        ]


def read_architecture(directory: str | Path, key: str = "model.path") -> Architecture:
    """Read the architecture of the Hugging Face checkpoint in ``directory``.

    key   configuration key whose value is the directory, for error messages

    The model family that is registered for the checkpoint's ``model_type`` reads ``config.json``.

    Raises :class:`~dpo_engine.errors.ConfigError` for an unknown ``model_type``, for values out of range, and for
    features that the engine's layers do not support.
    """
    config = read_config_json(directory, key)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"{config.where}: {FAMILIES.describe_unknown(model_type)}; a plugin can register a family")
    packed = getattr(FAMILIES[model_type], "packed", None)
    given = config.get("quantization_config")
    if packed is None or not isinstance(given, dict) or given.get("quant_method") != packed:
        config.only(
            "quantization_config", None, "quantized weights cannot be trained; use the original unquantized checkpoint"
        )
    arch = FAMILIES[model_type].architecture(config)
    config.finish()
    _check_heads(arch, config)
    config.finish()
    return arch


def _check_heads(arch: Architecture, config: HFConfig) -> None:
    if arch.num_attention_heads % arch.num_kv_heads:
        config.problem(
            f"num_key_value_heads={arch.num_kv_heads}: must divide num_attention_heads={arch.num_attention_heads}; "
            "correct config.json"
        )
    if arch.rotary_dim is None and arch.head_dim % 2:
        config.problem(f"head_dim={arch.head_dim}: must be even for rotary embeddings; correct config.json")
    if arch.rotary_dim is not None and (arch.rotary_dim % 2 or not arch.rotary_dim):
        config.problem(
            f"partial_rotary_factor: rotates {arch.rotary_dim} of {arch.head_dim} dimensions, but must rotate an even "
            "number above 0; correct config.json"
        )
    scaling = arch.rope_scaling or {}
    width = (arch.rotary_dim or arch.head_dim) // 2
    if scaling.get("rope_type") == "longrope" and len(scaling["short_factor"]) != width:
        config.problem(
            f"short_factor: its length is {len(scaling['short_factor'])}, but must be {width}, the number of "
            "frequencies of a head; correct config.json"
        )
    if arch.out_bias and not arch.qkv_bias:
        config.problem(
            "attention has a bias in its output projection, but none in its query, key and value projections. "
            "Megatron's layers do not support this combination; use another model"
        )
