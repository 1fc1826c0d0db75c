"""Tests of the list of planted bugs, `tests/mutations.md`: the code and the tests that it names still exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
WINGS = {"objective", "scoring", "batching", "optim", "checkpoint", "data", "model", "training", "platform"}


def rows():
    """Return the cells of each row of the tables, without the header rows."""
    lines = (ROOT / "tests" / "mutations.md").read_text(encoding="utf-8").splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if re.match(r"\| `", line)]
    return [[cell.strip() for cell in row] for row in cells]


def functions_in(path):
    """Return the names of all functions and methods in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def old_lines(planted):
    """Return the lines of code that a bug replaces.

    The cell ``planted`` has the form `` `old; old` → `new; new` ``. If the bug only deletes code, the form is
    `` `old; old` → nothing ``. A description and a colon can come before the code.
    """
    old, _ = re.search(r"`([^`]+)` → (`[^`]+`|nothing)$", planted).groups()
    return [line.strip() for line in old.replace(r"\|", "|").split(";") if line.strip()]


def test_files_contain_the_old_code():
    for file, planted, _ in rows():
        text, place = (ROOT / "dpo_engine" / file.strip("`")).read_text(encoding="utf-8"), 0
        for line in old_lines(planted):
            place = text.find(line, place)
            assert place >= 0, f"{file} does not contain {line}; plant the bug in the present code, and correct the row"
            place += len(line)


def test_named_files_and_tests_exist():
    named = rows()
    for file, *_, test in named:
        assert (ROOT / "dpo_engine" / file.strip("`")).is_file(), file
        if test != "none: equivalent":
            path, name = re.fullmatch(r"`(tests/[\w/]+\.py)::(\w+)`", test).groups()
            assert name in functions_in(ROOT / path), test
    assert len(named) >= 40 and {file.strip("`").partition("/")[0] for file, *_ in named} >= WINGS
