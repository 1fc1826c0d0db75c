"""Keys of other systems, and what they are called here.

``migration.yaml`` beside this module holds the tables. An unknown key of a run's file is answered from them
(:func:`foreign_key`), and ``docs/migrating.md`` is generated from them (:func:`migration_pages`); after a change of the
tables, write the page again with
``python -m dpo_engine.migration > docs/migrating.md``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml


@dataclass(frozen=True)
class Entry:
    """One line of a table."""

    keys: tuple[str, ...]
    """the other system's keys, dotted as it nests them"""
    here: str | None
    """our dotted key, or ``key=value``; None where there is none"""
    note: str
    """where the meaning differs, or what to do instead; Markdown"""

    @property
    def target(self) -> str | None:
        """Our dotted key, without a value."""
        return self.here and self.here.partition("=")[0]

    @property
    def way_out(self) -> str:
        """The entry in the words of an error message: our key, with the note up to its first semicolon, or the note."""
        note = self.note.replace("`", "")
        if self.here is None:
            return note
        brief = note.partition(";")[0]
        words = f"use {self.here}" if "=" in self.here else f"called {self.here} here"
        return f"{words} ({brief})" if brief else words


@dataclass(frozen=True)
class System:
    """Another system: its name, what was read of it, its keys, and what differs in meaning."""

    name: str
    versions: str
    entries: tuple[Entry, ...]
    meaning: tuple[str, ...]


def foreign_key(path: str) -> str | None:
    """Say what a key of another system is called here, as the end of a line about an unknown key.

    path  dotted key that a user wrote; list indices are ignored

    A key is looked up as it stands, then as a section that holds other keys, then by its last component, so that
    ``train.beta`` is found too. A last component means nothing where systems disagree about it. Our own keys are never
    answered.

    Returns  a phrase such as ``called train.micro_batch_size here (counted in pairs)``, or None for a key of nobody
    """
    path = re.sub(r"\[\d+\]", "", path)
    if path in _own_keys():
        return None
    entry = _by_path().get(path)
    if entry is None and path in _sections():
        names = " and ".join(_sections()[path])
        return f"a section of {names}; docs/migrating.md says what its keys are called here"
    entry = entry or _by_last_component().get(path.rpartition(".")[2])
    return entry.way_out if entry else None


def migration_pages() -> str:
    """The Markdown of ``docs/migrating.md``."""
    tables, parts = _tables(), [_document()["introduction"].rstrip()]
    for system in tables:
        parts.append(f"## {system.name}")
        parts.append(f"Read: {system.versions}." if system.versions else _document()["other"]["note"])
        rows = [f"| {_code(entry.keys)} | {_code([entry.here or ''])} | {entry.note} |" for entry in system.entries]
        parts.append("\n".join(["| their key | here | note |", "|---|---|---|", *rows]))
        if system.meaning:
            parts.append(f"### What differs in meaning: {system.name}")
            parts.append("\n".join(f"- {sentence}" for sentence in system.meaning))
    return "\n\n".join(parts) + "\n"


def systems() -> tuple[System, ...]:
    """The systems with a table of their own."""
    return tuple(system for system in _tables() if system.versions)


def _code(keys: Any) -> str:
    return ", ".join(f"`{key}`" if key else "none" for key in keys)


@cache
def _document() -> dict[str, Any]:
    return yaml.safe_load(files(__package__).joinpath("migration.yaml").read_text(encoding="utf-8"))


@cache
def _tables() -> tuple[System, ...]:
    """All systems, and last the names that belong to none of them."""
    tables = [*_document()["systems"], {"name": "Other names", "versions": "", **_document()["other"]}]
    return tuple(
        System(table["name"], table["versions"], tuple(_entries(table["keys"])), tuple(table.get("meaning", ())))
        for table in tables
    )


def _entries(table: dict[str, list[str | None]]) -> Iterator[Entry]:
    for keys, (here, *note) in table.items():
        yield Entry(tuple(keys.split(", ")), here, *note or ("",))


@cache
def _own_keys() -> frozenset[str]:
    """Our keys and sections, as far as the tables name them."""
    targets = {entry.target for system in _tables() for entry in system.entries if entry.target}
    parts = [target.split(".") for target in targets]
    return frozenset(".".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1))


@cache
def _by_path() -> dict[str, Entry]:
    """Entries by their whole key; of several systems with the same key, the first."""
    found: dict[str, Entry] = {}
    for system in _tables():
        for entry in system.entries:
            for key in entry.keys:
                found.setdefault(key, entry)
    return found


@cache
def _sections() -> dict[str, list[str]]:
    """Sections that hold other systems' keys, with the names of these systems."""
    found: dict[str, list[str]] = {}
    for system in systems():
        parts = [key.split(".") for entry in system.entries for key in entry.keys]
        for section in sorted({".".join(part[:depth]) for part in parts for depth in range(1, len(part))}):
            found.setdefault(section, []).append(system.name)
    return found


@cache
def _by_last_component() -> dict[str, Entry]:
    """Entries by the last component of their key.

    A key that is not nested stands for itself. Of nested ones, those count that lead to one key of ours, and whose last
    component is none of our own words, such as ``path`` or ``name``.
    """
    own = {key.rpartition(".")[2] for key in _own_keys() if not key.startswith("loss.")} | {"name"}
    nested: dict[str, list[Entry]] = {}
    for key, entry in _by_path().items():
        above, _, last = key.rpartition(".")
        if above and last not in own:
            nested.setdefault(last, []).append(entry)
    agreed = {last: found[0] for last, found in nested.items() if len({entry.target for entry in found}) == 1}
    return {**agreed, **{key: entry for key, entry in _by_path().items() if "." not in key}}


if __name__ == "__main__":
    sys.stdout.write(migration_pages())
