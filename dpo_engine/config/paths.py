"""Expand `~` and environment variables in the paths of a run."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator

from dpo_engine.config.section import Text

REFERENCE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\}|\()", re.ASCII)
"""A variable in a path, as in a shell: `$NAME` or `${NAME}`. The pattern also matches `$(`, which paths must not
contain. Any other dollar sign is literal."""


def expand(text: str) -> str:
    """Return a path with `~`, `~user`, `$NAME` and `${NAME}` expanded. A path without them is returned unchanged.

    Expanding the result again changes nothing. A recorded configuration can therefore be loaded on another machine.

    Raises `ValueError` if the path cannot be expanded, for example because a variable is unset or empty. The message is
    the rule that the path violates, and the way out.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2] or ""
        if not name.isidentifier():
            raise ValueError(
                f"a path with variables of the form $NAME or ${{NAME}}, not '{found[0]}'; write the path in full"
            )
        if not os.environ.get(name):
            raise ValueError(
                f"a path whose variables are set, but {name} is unset or empty; set {name}, or write the path in full"
            )
        return os.environ[name]

    expanded = REFERENCE.sub(value, text)
    if expanded.startswith("~"):
        home, _, rest = expanded.partition("/")
        expanded = os.path.expanduser(expanded)
        if expanded.startswith("~"):
            what = "HOME is not set" if home == "~" else f"there is no user {home[1:]}"
            raise ValueError(f"a path whose home directory is known, but {what}; write the path in full")
    if expanded != text and REFERENCE.search(expanded):
        raise ValueError(
            f"a path whose variables expand to text without variables, but it expands to {expanded}; write the path in "
            "full"
        )
    return expanded


Place = Annotated[Text, AfterValidator(expand)]
"""A path in a run's configuration."""
