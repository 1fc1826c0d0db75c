"""Read a run's YAML file (YAML 1.2 scalars, no duplicate keys) with its base files, and apply `a.b=c` overrides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo_engine.config.paths import expand
from dpo_engine.config.sections import LossConfig
from dpo_engine.errors import ConfigError, shorten

MAX_BYTES = 2**18
MAX_VALUES = 200_000
MAX_DEPTH = 64
MAX_DIGITS = 100
TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"
UNDERWAY = (0, 0)


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads scalars as YAML 1.2 defines them, and also `1_000` as a number and `<<` as a merge key.

    PyYAML itself follows YAML 1.1, and reads `1e-6` as a string, `off` as false, `010` as 8 and `1:30` as 90.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, text: str):
        super().__init__(text)
        self.duplicates: list[tuple[int, str]] = []

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        if isinstance(node, yaml.MappingNode):
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    line = key.start_mark.line + 1
                    if key.value in seen:
                        self.duplicates.append(
                            (line, f"the key {key.value} was already set on line {seen[key.value]}; set it once")
                        )
                    seen.setdefault(key.value, line)
        return super().construct_mapping(node, deep)

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        values, depth = _measure(node, {})
        if depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=TOO_DEEP, problem_mark=node.start_mark)
        if values > MAX_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"aliases expand to more than {MAX_VALUES:,} values", problem_mark=node.start_mark
            )
        return self.construct_document(node)

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number with {len(node.value):,} digits, more than {MAX_DIGITS}", node.start_mark
            )
        return int(node.value, 0 if node.value[:2] in ("0x", "0o") else 10)

    def construct_decimal(self, node: yaml.ScalarNode) -> float:
        text = node.value.lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return the number of values and of nesting levels that a document has once its aliases are expanded.

    A small file with nested aliases can expand to any size, so this function counts without expanding anything.
    """
    found = known.get(id(node))
    if found == UNDERWAY:
        raise yaml.MarkedYAMLError(problem="an alias refers to a node that contains it", problem_mark=node.start_mark)
    if found is None:
        known[id(node)] = UNDERWAY
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in children for part in pair]
        measured = [_measure(child, known) for child in children]
        found = (1 + sum(values for values, _ in measured), 1 + max((depth for _, depth in measured), default=0))
        known[id(node)] = found
    return found


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    # PyYAML finds resolvers by the first character of a scalar. For an empty scalar, the lookup key is "", which the
    # table above writes as "\0".
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_decimal)


def parse(text: str, name: str) -> Any:
    """Return the value of one YAML document. Error messages start with `name`, followed by the line number if known.

    Raises `ConfigError` if the text is not valid YAML or has duplicate keys; each duplicate key gets one line.
    """
    loader = None
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except RecursionError as error:
        raise ConfigError(f"{name}: is not valid YAML ({TOO_DEEP}); use fewer levels") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        what = shorten(getattr(error, "problem", None) or str(error).splitlines()[0].lower(), 100)
        raise ConfigError(f"{where}: is not valid YAML ({what}); fix it") from error
    finally:
        if loader is not None:
            loader.dispose()
    if loader.duplicates:
        raise ConfigError([f"{name}:{line}: {what}" for line, what in sorted(loader.duplicates)])
    return value


def read(path: str | Path, below: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the mapping in a YAML file. If the mapping has a key `base`, merge the mapping into that of the base file.

    below  files that inherit from this file; they are needed to detect a cycle

    Raises `ConfigError` if a file cannot be read or does not contain a YAML mapping, if `base` is not the path of a
    file, or if the base files form a cycle.
    """
    own = _read_one(path)
    if "base" not in own:
        return own
    base = own.pop("base")
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{path}: base={base}: must be the path of a YAML file, relative to the folder of {path}; correct or "
            "remove the key base"
        )
    try:
        place = Path(path).parent / expand(base)
    except ValueError as error:
        raise ConfigError(f"{path}: base={base}: must be {error}") from error
    below = [*below, Path(path).resolve()]
    if place.resolve() in below:
        raise ConfigError(f"{path}: base={base}: creates a cycle of base files; remove the key base from one of them")
    if not place.is_file():
        raise ConfigError(f"{path}: base={base}: {place} is not a file; set a path relative to the folder of {path}")
    return inherit(read(place, below), own)


def inherit(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return `own` merged into `base`. Mappings are merged key by key; other values, such as lists, are replaced.

    If `own` has a section `loss`, this section is special, because each loss has its own options. If `own` and `base`
    name different losses, the section `loss` of `own` replaces that of `base`; otherwise, the two sections are merged.
    In both cases, keys with the value null are then removed from the section `loss`, so these keys get their defaults.
    """
    merged = _merged(base, own)
    loss, under = own.get("loss"), base.get("loss") or {}
    if isinstance(loss, dict) and isinstance(under, dict):
        if loss.get("name", _loss_of(under)) != _loss_of(under):
            under = {}
        merged["loss"] = {name: option for name, option in {**under, **loss}.items() if option is not None}
    return merged


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = {**base}
    for key, value in own.items():
        under = base.get(key)
        merged[key] = _merged(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return merged


def _loss_of(section: dict[str, Any]) -> Any:
    return section.get("name", LossConfig.model_fields["name"].default)


def _read_one(path: str | Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path}: is larger than {MAX_BYTES >> 10} KiB; pass the path of a run's YAML file")
        text = content.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); pass the path of a run's YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text; pass the path of a run's YAML file") from error
    value = parse(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: is a {_kind(value)}, not a mapping; write sections such as `model:` with keys")
    return value


def override(raw: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Apply overrides `a.b=c` (or `a[0].b=c`) to `raw`, in order. Each value is YAML and replaces the old value.

    Return the problems found, in the same order.
    """
    problems = []
    for text in overrides:
        dotted, equals, value = text.partition("=")
        keys = [int(key) if key.isdecimal() else key for key in re.sub(r"\[(\d+)\]", r".\1", dotted.strip()).split(".")]
        if not equals or "" in keys:
            problems.append(f"{text}: is not a valid override; write key.path=value, for example parallel.tp=2")
            continue
        try:
            problem = _set(raw, keys, parse(value, dotted), dotted)
        except ConfigError as error:
            problems.extend(error.problems)
        else:
            problems.extend(f"{text}: {problem}" for problem in [problem] if problem)
    return problems


def _set(raw: dict[str, Any], keys: list[str | int], value: Any, dotted: str) -> str | None:
    """Set `value` under `keys`, creating mappings as needed. Return None, or the reason why it cannot be set."""
    place: Any = raw
    for depth, key in enumerate(keys):
        above = ".".join(map(str, keys[:depth]))
        last = depth == len(keys) - 1
        if isinstance(place, list):
            if not isinstance(key, int) or key >= len(place):
                way_out = (
                    f"use an index from 0 to {len(place) - 1}, or set the whole list" if place else "set the whole list"
                )
                return f"{above} has length {len(place)}; {way_out}"
        elif not isinstance(place, dict):
            return f"{above}={place} is a {_kind(place)} and has no keys; override {above} itself"
        else:
            key = str(key)
        if last:
            place[key] = value
        elif isinstance(place, dict):
            if place.get(key) is None:
                place[key] = {}
            place = place[key]
        else:
            place = place[key]
    return None


def _kind(value: Any) -> str:
    return "list" if isinstance(value, list) else "mapping" if isinstance(value, dict) else "single value"
