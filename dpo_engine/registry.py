"""Registries, which map names to implementations of losses, data formats, model families, activations, norms,
callbacks, sinks, schedules and optimizers.
"""

import difflib
from collections.abc import Callable
from typing import Any

from dpo_engine.errors import printable, shorten

SHOWN = 20
"""Largest number of registered names that a message lists in full."""


class UnknownName(ValueError):
    """The name is not registered; the message lists registered names."""


class Registry(dict[str, Any]):
    """A dict from names to implementations, filled by a decorator. Each kind of plugin has its own registry.

    ``@LOSSES.register("margin", needs_reference=True)`` stores the decorated object under each given name, and sets the
    keyword arguments as attributes of the object. Looking up an unknown name raises :class:`UnknownName`.

    kind      noun that messages use for an entry; ``plural`` is its plural, by default the noun with an ``s``
    passes    number of positional arguments that the engine passes to an entry; the other parameters are its options
    reserved  names of keyword parameters that are not options, because the engine passes them
    """

    def __init__(self, kind: str, *, plural: str | None = None, passes: int = 0, reserved: tuple[str, ...] = ()):
        super().__init__()
        self.kind, self.plural = kind, plural or f"{kind}s"
        self.passes, self.reserved = passes, reserved

    def register(self, *names: str, **facts: Any) -> Callable[[Any], Any]:
        """Return a decorator that stores the decorated object under each of ``names``.

        The decorator raises ``ValueError`` if another object is already registered under one of the names.
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
        """Return the error message for an unregistered name, with the closest name and the registered names."""
        near = difflib.get_close_matches(str(name), self, 1)
        lead = f"did you mean {near[0]}? Registered" if near else "registered"
        names = sorted(self)
        listed = ", ".join(names) if len(names) <= SHOWN else f"{', '.join(names[:3])} and {len(names) - 3} more"
        return f"unknown {self.kind} {shorten(printable(repr(name)), 60)}; {lead}: {listed}"
