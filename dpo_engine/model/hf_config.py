"""Read a Hugging Face ``config.json``, and report all problems in one error. Needs neither torch nor Megatron."""

import math
from pathlib import Path
from typing import Any

from dpo_engine.data.hub import model_directory
from dpo_engine.errors import ConfigError, shorten
from dpo_engine.strict_json import BadJson, read_object

LARGEST = 2**24
"""Upper limit for every count in ``config.json``. No real model exceeds it, so a larger value is an error."""


class HFConfig:
    """Typed access to the fields of a ``config.json``. All problems are collected before an error is raised.

    A field that is absent or null gets its default; a field without a default is required. If a field has a problem,
    the method that reads the field returns a placeholder. :meth:`finish` raises one error with all problems.
    """

    def __init__(self, values: dict[str, Any], where: str):
        self.values = values
        self.where = where
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        """Record a problem with this file."""
        self.problems.append(f"{self.where}: {text}")

    def get(self, name: str, default: Any = None) -> Any:
        """Return the unchecked value of a field, or ``default`` if the field is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int | None = None) -> int:
        """Return the value of a field that must be a whole number from 1 to `LARGEST`."""
        value = self.get(name, default)
        if type(value) is int and 1 <= value <= LARGEST:
            return value
        limit = f"at most {LARGEST}" if type(value) is int and value > LARGEST else "at least 1"
        self.problem(f"{name}={shorten(repr(value), 60)}: must be a whole number, {limit}; correct it in config.json")
        return 1

    def number(self, name: str, default: float | None = None) -> float:
        """Return the value of a field that must be a finite number above 0."""
        value = self.get(name, default)
        if type(value) in (int, float) and 0 < value < math.inf:
            return float(value)
        self.problem(f"{name}={shorten(repr(value), 60)}: must be a number above 0; correct it in config.json")
        return 1.0

    def flag(self, name: str, default: bool) -> bool:
        """Return the value of a field that must be true or false."""
        value = self.get(name, default)
        if type(value) is bool:
            return value
        self.problem(f"{name}={shorten(repr(value), 60)}: must be true or false; correct it in config.json")
        return default

    def only(self, name: str, allowed: Any, why: str) -> None:
        """Record a problem if the field has a value other than ``allowed``; ``why`` explains the problem."""
        value = self.get(name, allowed)
        if value != allowed:
            self.problem(f"{name}={shorten(repr(value), 60)}: {why}")

    def finish(self) -> None:
        """Raise :class:`~dpo_engine.errors.ConfigError` with every problem recorded so far, if there are any."""
        if self.problems:
            raise ConfigError(self.problems)


MEGATRON_FILES = (".metadata", "metadata.json", "common.pt", "latest_checkpointed_iteration.txt")
"""Files by which a distributed checkpoint of Megatron or torch is recognized."""


def read_config_json(directory: str | Path, key: str = "model.path") -> HFConfig:
    """Read the ``config.json`` in ``directory``, which can also be a Hub id.

    key   configuration key whose value is the directory, for error messages

    Raises :class:`~dpo_engine.errors.ConfigError` if the file does not exist or is not a JSON object.
    """
    where = f"{key}={directory}"
    directory = model_directory(directory, key)
    path = directory / "config.json"
    if not directory.is_dir():
        raise ConfigError(f"{where}: no such directory; set it to the directory of a Hugging Face checkpoint")
    if not path.is_file():
        if any((Path(directory) / name).exists() for name in MEGATRON_FILES):
            raise ConfigError(
                f"{where}: is a distributed checkpoint of Megatron or torch, and such checkpoints are never loaded, "
                "because their index is a pickle; convert this one to a Hugging Face checkpoint first (see Models in "
                "the documentation)"
            )
        raise ConfigError(f"{where}: has no config.json; set it to the directory of a Hugging Face checkpoint")
    try:
        return HFConfig(read_object(path), where)
    except (OSError, BadJson) as failure:
        raise ConfigError(f"{where}: config.json cannot be read ({failure}); download it again") from None
