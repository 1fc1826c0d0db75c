"""Named ranges of a step, for profilers. Outside of profiled steps, a range does nothing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

Open = Callable[[str], AbstractContextManager[Any]]

OFF: AbstractContextManager[Any] = nullcontext()

_open: Open | None = None


def part(name: str) -> AbstractContextManager[Any]:
    """Return a context manager that marks a part of a step, such as ``with part("optimizer"): ...``."""
    return OFF if _open is None else _open(name)


def mark_with(open_range: Open | None) -> None:
    """Mark ranges with ``open_range(name)`` from now on; None: do not mark them."""
    global _open
    _open = open_range


class MegatronTimers:
    """Stand-in for the timers of Megatron's schedules. It marks the ranges that those timers would measure.

    Assign an instance to the field ``timers`` of the model's config. A schedule then calls
    ``timers(name, ...).start(...)`` and later ``timers(name).stop()``.
    """

    NAMES = {"forward-compute": "forward", "backward-compute": "backward"}

    def __init__(self) -> None:
        self._timers: dict[str, _Timer] = {}

    def __call__(self, name: str, *level: Any, **levels: Any) -> "_Timer":
        """Return the timer for a name. The level, by which Megatron selects the timers to print, has no effect."""
        return self._timers.setdefault(name, _Timer(self.NAMES.get(name, name)))


class _Timer:
    def __init__(self, name: str):
        self.name = name
        self.range: AbstractContextManager[Any] = OFF

    def start(self, **options: Any) -> None:
        self.range = part(self.name)
        self.range.__enter__()

    def stop(self, **options: Any) -> None:
        self.range.__exit__(None, None, None)
