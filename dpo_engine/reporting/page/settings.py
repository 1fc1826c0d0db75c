"""List the settings of runs: the whole configuration, what differs from the defaults, and what differs between runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_engine.config.keys import as_yaml, keys
from dpo_engine.reporting.page.foreign import visible
from dpo_engine.reporting.page.run_files import RunFiles

UNLISTED = "(in the code of the loss or plugin)"


class Setting(NamedTuple):
    """A configuration key of a run, with its value and its default (or why no default is shown).

    changed whether the value differs from the default; also True for a required key, which has no default
    shown   whether the list of changed settings contains the key. This list contains the keys for which ``changed`` is
            True, and the keys whose default is unknown (such as the options of a loss)
    """

    path: str
    value: str
    default: str
    changed: bool
    shown: bool
    meaning: str


def settings(run: RunFiles) -> list[Setting]:
    """Return every key of a run's configuration, in the order of the file."""
    known = {key.path: key for key in keys()}
    found = []
    for path, value in flat(run.config):
        key, text = known.get(path), as_yaml(value)
        default = "(no default)" if key and key.default == "required" else key.default if key else UNLISTED
        changed = key is not None and text != default
        shown = changed or key is None
        meaning = visible(key.meaning, 400) if key else ""
        found.append(Setting(visible(path, 200), visible(text, 400), default, changed, shown, meaning))
    return found


def flat(nested: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of each key."""
    for name, value in nested.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def differing(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Return the keys whose values differ between runs, with the values. Output and cache directories are omitted."""
    tables = [dict(flat(run.config)) for run in runs]
    paths = dict.fromkeys(path for table in tables for path in table)
    found = []
    for path in paths:
        values = [visible(as_yaml(table[path]), 100) if path in table else "—" for table in tables]
        if len(set(values)) > 1 and path not in ("train.output_dir", "data.cache_dir"):
            found.append((path, values))
    return found


def rank_grid(layout: Mapping[str, int] | None, most: int = 4) -> dict[str, Any] | None:
    """Return the grid of ranks to draw, or None if the layout is unknown.

    most   maximum number of data-parallel copies to draw

    Megatron-Core numbers ranks in the order tp, cp, dp, pp: the ranks of a tensor-parallel group have consecutive
    numbers.

    Returns  a dictionary: ``copies`` (for each copy to draw, a list of stages; a stage is a list of rows, one for each
             context-parallel rank; a row is a list of ranks), ``more`` (number of copies that are not drawn), and the
             sizes of the layout
    """
    if layout is None:
        return None
    tp, pp, cp, dp = (layout[name] for name in ("tp", "pp", "cp", "dp"))
    copies = [
        [[[t + tp * (c + cp * (d + dp * stage)) for t in range(tp)] for c in range(cp)] for stage in range(pp)]
        for d in range(min(dp, most))
    ]
    return {"copies": copies, "more": dp - len(copies), **layout}
