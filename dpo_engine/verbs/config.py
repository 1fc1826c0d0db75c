"""``dpo-engine config``: print a run as YAML with a comment about each key, or print the JSON Schema of a run."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from dpo_engine.config.keys import Key, as_yaml, keys
from dpo_engine.config.rules import loss_problems
from dpo_engine.config.run import Config, import_plugins
from dpo_engine.config.sections import LossConfig
from dpo_engine.errors import ConfigError
from dpo_engine.objective.losses import LOSSES, loss_options, with_defaults

WIDTH = 110
"""Maximum line width of a comment, in columns."""


def commented(config: Config | None = None) -> str:
    """Return a run as YAML. A comment above each key gives the key's meaning and other allowed values.

    Options of the loss have no comments.

    config  the run; None: return the defaults, with the required keys commented out

    Raises :class:`~dpo_engine.errors.ConfigError` for a plugin that cannot be imported, or an invalid loss.
    """
    values = config.model_dump(mode="json") if config else {}
    if config and (problems := import_plugins(config.plugins) or loss_problems(config)):
        raise ConfigError(problems)
    parts = []
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            lines = list(_section(field.annotation, values.get(name), filled=config is not None))
            parts.append("\n".join([f"{name}:", *textwrap.indent("\n".join(lines), "  ").split("\n")]))
        else:
            key, *inner = (key for key in keys() if key.path.partition(".")[0] == name)
            parts.append(
                "\n".join([*comment(key), *_described(inner), _line(name, values.get(name, field.default), key)])
            )
    return "\n\n".join(parts) + "\n"


def schema() -> str:
    """Return the JSON Schema of a run, for editors and validators.

    The schema allows any key in ``loss``, because each loss has its own options.
    """
    return json.dumps(Config.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


def comment(key: Key) -> list[str]:
    """Return the comment lines for a key: its meaning and its other allowed values."""
    others = f" (or {', '.join(key.choices)})" if key.choices else ""
    return [f"# {line}" for line in textwrap.wrap(key.meaning + others, WIDTH - 4)]


def _section(section: type[BaseModel], values: dict[str, Any] | None, *, filled: bool) -> Iterator[str]:
    for key in keys(section):
        above, _, name = key.path.rpartition(".")
        if above:  # a key in a list item, or in an optional section
            yield from (f"#   {line}" for line in _wrapped(f"{above}.{name} ({key.default}): {key.meaning}"))
            continue
        yield from comment(key)
        yield _line(name, values[name] if values else section.model_fields[name].default, key, filled=filled)
    if section is LossConfig:
        yield from _options((values or {}).get("name", LossConfig().name), values or {})


def _options(name: str, values: dict[str, Any]) -> Iterator[str]:
    """Yield the options of the loss ``name``, with default values for the options that the run does not set."""
    loss = LOSSES[name]
    given = {option: values[option] for option in loss_options(loss) if option in values}
    yield f"# Options of loss {name}:"
    for option, value in with_defaults(loss, given).items():
        yield _entry(option, value)


def _described(inner: Sequence[Key]) -> list[str]:
    """Return comment lines about the keys of an optional section."""
    texts = [f"{key.path.partition('.')[2]} ({key.default}): {key.meaning}" for key in inner]
    return [f"#   {line}" for text in texts for line in _wrapped(text)]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - 8, subsequent_indent="  ")


def _line(name: str, value: Any, key: Key, *, filled: bool = True) -> str:
    return f"# {name}:" if key.default == "required" and not filled else _entry(name, value)


def _entry(name: str, value: Any) -> str:
    return f"{name}: {as_yaml(list(value) if isinstance(value, tuple) else value)}"
