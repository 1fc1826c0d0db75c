"""What a Hugging Face checkpoint's ``config.json`` says about its model, as neutral facts. No torch, no Megatron."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dpo_engine.errors import ConfigError, shorten
from dpo_engine.registry import Registry
from dpo_engine.strict_json import BadJson, read_object

FAMILIES = Registry("model family")
"""``model_type`` of a ``config.json`` to the class that reads it; see :mod:`dpo_engine.model.families`."""


LARGEST = 2**24
"""No model has more of anything that ``config.json`` counts."""


@dataclass(frozen=True)
class Architecture:
    """The facts that fix a decoder's arithmetic and the shapes of its weights.

    head_dim         may differ from hidden_size / num_attention_heads
    norm_eps         added to the mean square inside every RMS norm
    qkv_bias         the query, key and value projections have biases (no other linear ever has)
    qk_norm          queries and keys are normalised per head
    rope_theta       base of the rotary frequencies
    rope_scaling     None, or ``rope_type`` ``linear`` or ``llama3`` with its numbers
    max_positions    longest row, in tokens, that the checkpoint declares itself good for
    sliding_window   tokens that a position attends back to, None for all of them
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

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (or all value heads) together."""
        return self.num_kv_heads * self.head_dim

    @property
    def matrix_parameters(self) -> int:
        """Parameters that every token is multiplied by: the layers' linears and the output layer."""
        attention = self.hidden_size * 2 * (self.query_size + self.kv_size)
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size
        return self.num_layers * layer + self.vocab_size * self.hidden_size

    @property
    def digest(self) -> str:
        """A name for these facts: equal exactly when all of them are."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: "Architecture") -> list[str]:
        """``field=theirs instead of ours`` for every fact that changes a value or a shape.

        Limits on the length are left out: within them nothing depends on them.
        """
        limits = {"max_positions", "sliding_window"}
        return [
            f"{field.name}={getattr(other, field.name)!r} instead of {getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name not in limits and getattr(self, field.name) != getattr(other, field.name)
        ]


class HFConfig:
    """Typed access to the fields of a ``config.json``, collecting every problem instead of stopping at the first.

    A field that is absent or null has its default; one without a default must be there. After a problem the value
    returned is only a place-holder, and :meth:`finish` raises.
    """

    def __init__(self, values: dict[str, Any], where: str):
        self.values = values
        self.where = where
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        """Note that ``text`` is wrong with this file."""
        self.problems.append(f"{self.where}: {text}")

    def get(self, name: str, default: Any = None) -> Any:
        """The raw value, or ``default`` where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number from 1 to `LARGEST`."""
        value = self.get(name, default)
        if type(value) is int and 1 <= value <= LARGEST:
            return value
        limit = f"of at most {LARGEST}" if type(value) is int and value > LARGEST else "of at least 1"
        self.problem(f"{name}={shorten(repr(value), 60)}: must be a whole number {limit}; correct it in config.json")
        return 1

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.get(name, default)
        if type(value) in (int, float) and 0 < value < math.inf:
            return float(value)
        self.problem(f"{name}={shorten(repr(value), 60)}: must be a number above 0; correct it in config.json")
        return 1.0

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if type(value) is bool:
            return value
        self.problem(f"{name}={shorten(repr(value), 60)}: must be true or false; correct it in config.json")
        return default

    def only(self, name: str, allowed: Any, why: str) -> None:
        """Note a problem unless the field is absent, null or ``allowed``."""
        value = self.get(name, allowed)
        if value != allowed:
            self.problem(f"{name}={shorten(repr(value), 60)}: {why}")

    def finish(self) -> None:
        """Raises :class:`~dpo_engine.errors.ConfigError` with every problem noted so far."""
        if self.problems:
            raise ConfigError(self.problems)


def read_config_json(directory: str | Path, key: str = "model.path") -> HFConfig:
    """The ``config.json`` in ``directory``.

    key   the configuration key that named the directory, for messages

    Raises :class:`~dpo_engine.errors.ConfigError` when there is no such file or it is not a JSON object.
    """
    where = f"{key}={directory}"
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise ConfigError(f"{where}: no such directory; give that of a Hugging Face checkpoint")
    if not path.is_file():
        raise ConfigError(f"{where}: has no config.json; give the directory of a Hugging Face checkpoint")
    try:
        return HFConfig(read_object(path), where)
    except (OSError, BadJson) as failure:
        raise ConfigError(f"{where}: config.json cannot be read ({failure}); fetch it again") from None


def read_architecture(directory: str | Path, key: str = "model.path") -> Architecture:
    """The architecture of the Hugging Face checkpoint in ``directory``, read by the family of its ``model_type``.

    key   the configuration key that named the directory, for messages

    Raises :class:`~dpo_engine.errors.ConfigError` with every problem: an unknown ``model_type``, values out of range,
    features that the engine's layers do not have.
    """
    config = read_config_json(directory, key)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"{config.where}: {FAMILIES.describe_unknown(model_type)}; a plugin can register another")
    config.only(
        "quantization_config", None, "quantised weights cannot be trained; give the checkpoint they were made from"
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
    if arch.head_dim % 2:
        config.problem(f"head_dim={arch.head_dim}: rotary positions need an even number; correct config.json")
