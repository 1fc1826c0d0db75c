"""Write the generated parts of the documentation: python docs/generate.py [--check]

On a page, each generated part is between ``<!-- generated: NAME -->`` and ``<!-- end of NAME -->``. The whole page
``docs/migrating.md`` is generated. With ``--check``, nothing is written, and the exit code is 1 if a page is out of
date.
"""

import html
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from dpo_engine.config.keys import as_yaml, keys
from dpo_engine.faults import NUMBERS, PHASES
from dpo_engine.migration import migration_pages
from dpo_engine.model.families import FAMILIES
from dpo_engine.objective.contract import Loss
from dpo_engine.objective.losses import LOSSES, loss_facts, loss_options, with_defaults
from dpo_engine.training.metrics import METRICS

DOCS = Path(__file__).parent


def key_table() -> str:
    """Return a table of every configuration key, with its default, its other choices, and its meaning."""
    rows = []
    for key in keys():
        meaning = html.escape(key.meaning, quote=False).replace("|", "\\|")
        rows.append(f"| `{key.path}` | {' / '.join([key.default, *key.choices])} | {meaning} |")
    return "\n".join(["| key | default / other choices | meaning |", "|---|---|---|", *rows])


def loss_table() -> str:
    """Return a table of the engine's losses, each with its names, options, value at the first step, and file."""
    rows, seen = [], set()
    for loss in LOSSES.values():
        if id(loss) in seen or not loss.__module__.startswith("dpo_engine."):
            continue
        seen.add(id(loss))
        first, *others = [name for name, entry in LOSSES.items() if entry is loss]
        names = f"`{first}`" + (f" ({', '.join(f'`{name}`' for name in others)})" if others else "")
        file = loss.__module__.rpartition(".")[2]
        rows.append(f"| {names} | {_options(loss)} | {_first_value(loss)} | `{file}.py` |")
    head = "| `loss.name` | options: default / other choices | initial loss | file in `dpo_engine/objective/` |"
    return "\n".join([head, "|---|---|---|---|", *rows])


def metric_table() -> str:
    """Return a table of every metric that a run reports."""
    return "\n".join(
        ["| metric | meaning |", "|---|---|", *(f"| `{name}` | {meaning} |" for name, meaning in METRICS.items())]
    )


def family_table() -> str:
    """Return a table of the model families: their models, and how their layers differ from those of Llama."""
    rows = []
    for name, family in FAMILIES.items():
        module = sys.modules[family.__module__]
        if module.__name__.startswith("dpo_engine."):
            models, layers = (inspect.getdoc(thing).split("\n\n")[0].removesuffix(".") for thing in (module, family))
            rows.append(f"| `{name}` | {models} | {' '.join(layers.split())} |".replace("``", "`"))
    return "\n".join(["| `model_type` | models | layers |", "|---|---|---|", *sorted(rows)])


def fault_table() -> str:
    """Return a table of every phase and every value that ``DPO_FAULT`` can name."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in {**PHASES, **NUMBERS}.items()]
    return "\n".join(["| name | when the fault occurs, or which value it changes |", "|---|---|", *rows])


def _options(loss: Loss) -> str:
    """Return the options of a loss, each with its default and, if its values can be listed, the other values."""
    hints = get_type_hints(loss, include_extras=True)
    options = []
    for name, option in loss_options(loss).items():
        default = "required" if option.default is inspect.Parameter.empty else as_yaml(option.default)
        hint = hints[name]
        choices = get_args(hint) if get_origin(hint) is Literal else (False, True) if hint is bool else ()
        others = [text for text in map(as_yaml, choices) if text != default]
        options.append(f"`{name}` {' / '.join([default, *others])}")
    return ", ".join(options) or "none"


def _first_value(loss: Loss) -> str:
    """Return the value of a loss with default options at the first step, when policy and reference are identical.

    If this value is not known in advance, return the reason in words.
    """
    options = with_defaults(loss, {})
    if options.keys() != loss_options(loss).keys():
        return "depends on its options"
    facts = loss_facts(loss, options)
    if not facts.needs_reference:
        return "depends on the model"
    return "depends on the data" if facts.at_init is None else format(facts.at_init, ".4g")


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "configuration.md": {"keys": key_table},
    "models.md": {"families": family_table},
    "losses.md": {"losses": loss_table},
    "metrics.md": {"metrics": metric_table},
    "reliability.md": {"faults": fault_table},
}
"""The generated parts of each page: the name of a part, and the function that generates the part."""


def pages() -> dict[str, str]:
    """Return the up-to-date text of every page that has a generated part, keyed by file name."""
    texts = {"migrating.md": migration_pages()}
    for page, parts in PARTS.items():
        text = (DOCS / page).read_text(encoding="utf-8")
        for name, make in parts.items():
            start, end = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
            pattern = re.compile(f"{re.escape(start)}\n.*?{re.escape(end)}", re.DOTALL)
            text, count = pattern.subn(lambda _: f"{start}\n\n{make()}\n\n{end}", text)  # noqa: B023  the lambda is called immediately
            if count != 1:
                raise SystemExit(f"docs/{page}: has {count} parts named {name}, but must have exactly one")
        texts[page] = text
    return texts


def main(arguments: list[str]) -> int:
    stale = [page for page, text in pages().items() if (DOCS / page).read_text(encoding="utf-8") != text]
    if arguments == ["--check"]:
        sys.stdout.write("".join(f"docs/{page}: is out of date; run python docs/generate.py\n" for page in stale))
        return int(bool(stale))
    for page, text in pages().items():
        (DOCS / page).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
