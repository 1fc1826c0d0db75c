"""Look up the configuration keys of other systems and find the equivalent key of dpo-engine.

The tables are in ``migration.yaml``, next to this module. They have two uses. If a run file has an unknown key that is
in a table, the error message suggests the equivalent key (:func:`foreign_key`). The page ``docs/migrating.md`` is
generated from the tables (:func:`migration_pages`); after changing the tables, regenerate the page with ``python
docs/generate.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml


@dataclass(frozen=True)
class Entry:
    """One row of a table."""

    keys: tuple[str, ...]
    """the other system's keys, as dotted paths in its own configuration"""
    here: str | None
    """our dotted key, or ``key=value``; None if we have no equivalent"""
    note: str
    """how the meaning differs, or what to do instead, in Markdown"""

    @property
    def target(self) -> str | None:
        """Our dotted key, without a value; None if we have no equivalent."""
        return self.here and self.here.partition("=")[0]

    @property
    def way_out(self) -> str:
        """The text for an error message: our key and the part of the note before its first semicolon.

        If we have no equivalent key, the text is the whole note.
        """
        note = self.note.replace("`", "")
        if self.here is None:
            return note
        brief = note.partition(";")[0]
        words = f"use {self.here}" if "=" in self.here else f"called {self.here} here"
        return f"{words} ({brief})" if brief else words


@dataclass(frozen=True)
class System:
    """Another system: its name, the versions and files that its table is based on, its keys, and differences in
    meaning."""

    name: str
    versions: str
    entries: tuple[Entry, ...]
    meaning: tuple[str, ...]


def foreign_key(path: str) -> str | None:
    """Return the end of the error message about an unknown key that is a key of another system.

    path  dotted key that a user wrote; list indices are ignored

    The function looks up the whole key first. If no system has this key, the function looks for a section whose name is
    the whole key, and finally for the last component of the key (:func:`_by_last_component`). A key such as
    ``train.beta`` is found by its last component.

    Returns  a phrase such as ``called train.micro_batch_size here (counted in pairs)``, or None if the key
             is one of our own in :func:`_own_keys`, or if no entry is found
    """
    path = re.sub(r"\[\d+\]", "", path)
    if path in _own_keys():
        return None
    entry = _by_path().get(path)
    if entry is None and path in _sections():
        names = " and ".join(_sections()[path])
        return f"a section of {names}; docs/migrating.md lists the keys to use instead"
    entry = entry or _by_last_component().get(path.rpartition(".")[2])
    return entry.way_out if entry else None


def migration_pages() -> str:
    """Return the text of ``docs/migrating.md``, in Markdown."""
    tables, parts = _tables(), [_document()["introduction"].rstrip()]
    for system in tables:
        parts.append(f"## {system.name}")
        parts.append(f"Based on {system.versions}." if system.versions else _document()["other"]["note"])
        rows = [f"| {_code(entry.keys)} | {_code([entry.here or ''])} | {entry.note} |" for entry in system.entries]
        parts.append("\n".join(["| key | key here | note |", "|---|---|---|", *rows]))
        if system.meaning:
            parts.append(f"### What differs in meaning: {system.name}")
            parts.append("\n".join(f"- {sentence}" for sentence in system.meaning))
    return "\n\n".join(parts) + "\n"


def systems() -> tuple[System, ...]:
    """Return the systems that have their own table."""
    return tuple(system for system in _tables() if system.versions)


def _code(keys: Any) -> str:
    return ", ".join(f"`{key}`" if key else "none" for key in keys)


@cache
def _document() -> dict[str, Any]:
    return yaml.safe_load(files(__package__).joinpath("migration.yaml").read_text(encoding="utf-8"))


@cache
def _tables() -> tuple[System, ...]:
    """Return the tables of all systems. The last table has names that do not belong to a particular system."""
    tables = [*_document()["systems"], {"name": "Other names", "versions": "", **_document()["other"]}]
    return tuple(
        System(table["name"], table["versions"], tuple(_entries(table["keys"])), tuple(table.get("meaning", ())))
        for table in tables
    )


def _entries(table: dict[str, list[str | None]]) -> Iterator[Entry]:
    for keys, (here, *note) in table.items():
        yield Entry(tuple(keys.split(", ")), here, *note or ("",))


ONLY_OURS = frozenset({"megatron.optimizer"})
"""Our keys that are also found as keys of other systems, by their last component, but mean something else there."""


@cache
def _own_keys() -> frozenset[str]:
    """Return our own keys that occur in the tables, the sections that contain these keys, and `ONLY_OURS`."""
    targets = {entry.target for system in _tables() for entry in system.entries if entry.target}
    parts = [target.split(".") for target in targets]
    return frozenset(".".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1)) | ONLY_OURS


@cache
def _by_path() -> dict[str, Entry]:
    """Map each whole key to its entry. If several systems have the same key, the first system's entry is used."""
    found: dict[str, Entry] = {}
    for system in _tables():
        for entry in system.entries:
            for key in entry.keys:
                found.setdefault(key, entry)
    return found


@cache
def _sections() -> dict[str, list[str]]:
    """Map each section in other systems' configurations to the names of the systems that have the section."""
    found: dict[str, list[str]] = {}
    for system in systems():
        parts = [key.split(".") for entry in system.entries for key in entry.keys]
        for section in sorted({".".join(part[:depth]) for part in parts for depth in range(1, len(part))}):
            found.setdefault(section, []).append(system.name)
    return found


@cache
def _by_last_component() -> dict[str, Entry]:
    """Map last components of keys to entries.

    All keys without a section are included. The last component of a nested key is included under two conditions. First,
    all nested keys with this last component correspond to the same key of ours, or none of them has an equivalent.
    Second, the component is neither ``name`` nor the last component of a key of ours; for example, ``path`` is not
    included, because ``model.path`` is our key. Our keys in the section ``loss`` do not count, so a ``beta`` in any
    section of another system can be found.
    """
    own = {key.rpartition(".")[2] for key in _own_keys() if not key.startswith("loss.")} | {"name"}
    nested: dict[str, list[Entry]] = {}
    for key, entry in _by_path().items():
        above, _, last = key.rpartition(".")
        if above and last not in own:
            nested.setdefault(last, []).append(entry)
    agreed = {last: found[0] for last, found in nested.items() if len({entry.target for entry in found}) == 1}
    return {**agreed, **{key: entry for key, entry in _by_path().items() if "." not in key}}
