"""Registries that map names to implementations: losses, data formats, model families, kernel backends."""

import difflib
from collections.abc import Callable
from typing import Any

from dpo_engine.errors import printable, shorten


class UnknownName(ValueError):
    """An unregistered name; the message lists the registered ones."""


class Registry(dict[str, Any]):
    """A dict filled by a decorator; there is one for each kind of plugin.

    ``@LOSSES.register("margin", needs_reference=True)`` stores the object under each given name and sets the
    keyword arguments on it as attributes. Looking up an unknown name raises :class:`UnknownName`.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def register(self, *names: str, **facts: Any) -> Callable[[Any], Any]:
        """Return a decorator that stores its object under each of ``names``.

        Raises ``ValueError`` when another object already has one of the names.
        """

        def add(entry: Any) -> Any:
            for name in names:
                if name in self and self[name] is not entry:
                    raise ValueError(f"{self.kind} {name!r} is already registered by {self[name].__module__}")
            for fact, value in facts.items():
                setattr(entry, fact, value)
            self.update(dict.fromkeys(names, entry))
            return entry

        return add

    def __missing__(self, name: str) -> Any:
        raise UnknownName(self.describe_unknown(name))

    def describe_unknown(self, name: str) -> str:
        """Return the message for an unregistered name: the closest registered name, then all of them."""
        near = difflib.get_close_matches(str(name), self, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"unknown {self.kind} {shorten(printable(repr(name)), 60)}; {hint}registered: {', '.join(sorted(self))}"
