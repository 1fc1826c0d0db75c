"""Tests of README.md, CONTRIBUTING.md and the pages of docs/: tables, commands, YAML and records are valid.

The files that these pages name exist, and the site builds.
"""

import json
import re
import runpy
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dpo_engine import cli
from dpo_engine.config.file import override, parse
from dpo_engine.config.run import Config
from dpo_engine.data.formats import FORMATS, detect, read_pairs
from dpo_engine.objective.losses import LOSSES
from dpo_engine.reporting.comparison import LENGTH_EDGES
from dpo_engine.reporting.intervals import RESAMPLES
from dpo_engine.reporting.pair_file import SCHEMA

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {"README.md": ROOT / "README.md", "CONTRIBUTING.md": ROOT / "CONTRIBUTING.md"}
PAGES |= {path.name: path for path in sorted(DOCS.glob("*.md"))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
SMALLEST = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "train": {"output_dir": "o"}}


def blocks(language: str) -> list[tuple[str, str]]:
    """Return the fenced code blocks of a language as (name of the page, text)."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(name, block) for name, text in TEXTS.items() for block in fence.findall(text)]


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 200


def test_generated_parts_are_up_to_date():
    generate = runpy.run_path(str(DOCS / "generate.py"))
    for name, text in generate["pages"]().items():
        assert TEXTS[name] == text, f"docs/{name}: run python docs/generate.py"


def test_the_generator_reports_a_page_that_is_not_up_to_date(tmp_path, capsys, monkeypatch):
    generate = runpy.run_path(str(DOCS / "generate.py"))
    for page in generate["pages"]():
        (tmp_path / page).write_text(TEXTS[page])
    monkeypatch.setitem(generate["main"].__globals__, "DOCS", tmp_path)
    assert generate["main"](["--check"]) == 0
    page = tmp_path / "configuration.md"
    page.write_text(page.read_text().replace("`optim.lr`", "`optim.rate`"))
    assert generate["main"](["--check"]) == 1
    assert capsys.readouterr().out == "docs/configuration.md: is out of date; run python docs/generate.py\n"
    assert generate["main"]([]) == 0 and page.read_text() == TEXTS["configuration.md"]


def test_every_loss_has_its_formula():
    table = TEXTS["losses.md"].split("## Formulas")[1].split("## Options")[0]
    cells = [
        line.split("|")[1] for line in table.splitlines() if line.startswith("| `") and "loss.name" not in line[:14]
    ]
    rows = [re.findall(r"`(\w+)`", cell) for cell in cells]
    listed = [name for row in rows for name in row]
    assert len(listed) == len(set(listed))
    assert all(len({id(LOSSES[name]) for name in row}) == 1 for row in rows)
    assert set(listed) == {name for name, loss in LOSSES.items() if loss.__module__.startswith("dpo_engine.")}


def test_every_column_of_an_evaluation_is_described():
    page = TEXTS["evaluation.md"]
    table = page[page.index("| column |") :].split("\n\n")[0]
    assert [
        name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])
    ] == SCHEMA.names
    words = " ".join(page.split())
    assert f"up to {', '.join(map(str, LENGTH_EDGES))}" in words and f"{RESAMPLES:,} bootstrap" in words


def lines(language: str) -> list[tuple[str, str]]:
    """Return the commands in the blocks of a language as (name of the page, command), without comments."""
    return [
        (name, command)
        for name, block in blocks(language)
        for line in block.splitlines()
        if (command := re.split(r" {2,}", line)[0].strip())
    ]


MADE = ("launch/site.env", ".venv", "path/to/", "tests/data", "tests/nullgpu/build")


@pytest.mark.parametrize(("page", "command"), lines("bash"))
def test_commands_name_what_exists(page, command):
    assert subprocess.run(["bash", "-n", "-c", command], capture_output=True).stderr == b""
    for word in shlex.split(command):
        if "/" in word and "=" not in word and not word.startswith(MADE):
            assert (ROOT / word).exists(), word
    if "dpo_engine" in shlex.split(command):
        asked = cli._parse(shlex.split(command)[shlex.split(command).index("dpo_engine") + 1 :])
        Config.load(ROOT / asked.run, asked.overrides)


def engine_commands() -> list[tuple[str, str]]:
    """Return the commands that start dpo-engine, as (name of the page, command).

    The commands come from code blocks without a language.
    """
    start = re.compile(r"(DPO_FAULT=\S+ )?(dpo-engine|torchrun) ")
    return [(page, line) for page, line in lines("") if start.match(line)]


@pytest.mark.parametrize(("page", "command"), engine_commands())
def test_commands_of_the_engine_are_valid(page, command):
    words = shlex.split(command)
    arguments = words[words.index("dpo-engine" if "dpo-engine" in words else "dpo_engine") + 1 :]
    assert arguments[0] in cli.VERBS
    asked = cli._parse(arguments)
    raw = {section: dict(values) for section, values in SMALLEST.items()}
    assert override(raw, getattr(asked, "overrides", [])) == []
    Config.parse(raw)


def test_the_readme_lists_every_verb():
    listed = re.findall(r"^dpo-engine (\w+)  ", TEXTS["README.md"], re.MULTILINE)
    assert sorted(listed) == sorted(cli.VERBS)
    assert set(re.findall(r"^\| `dpo-engine (\w+)`", TEXTS["quickstart.md"], re.MULTILINE)) == set(cli.VERBS)


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_yaml_is_a_run_or_a_part_of_one(page, text):
    raw = parse(text, page)
    assert set(raw) <= {*Config.model_fields, "base"}
    raw.pop("base", None)
    Config.parse(
        {
            **SMALLEST,
            **{
                name: {**SMALLEST.get(name, {}), **value} if isinstance(value, dict) else value
                for name, value in raw.items()
            },
        }
    )


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_compiles_and_imports_what_exists(page, text):
    compile(text, page, "exec")
    for module, names in re.findall(r"^from (dpo_\S+) import (.+)$", text, re.MULTILINE):
        for name in names.split(", "):
            assert hasattr(__import__(module, fromlist=[name]), name), name


def test_data_formats_are_registered_and_their_records_are_read(tmp_path):
    rows = re.findall(r"^\| `(\w+)` \| `(\{.*?\})`", TEXTS["data.md"], re.MULTILINE)
    assert {name for name, _ in rows} == set(FORMATS) - {"auto"}
    for name, record in rows:
        path = tmp_path / f"{name}.jsonl"
        path.write_text(record + "\n")
        alike = "ranked" if name.startswith("ranked_") else name  # three formats read the same kind of record
        assert detect(json.loads(record)) is FORMATS[alike]
        ((line, pairs),) = read_pairs(path, name)
        assert line == 1 and pairs and all(pair.chosen != pair.rejected for pair in pairs)


def test_files_that_pages_name_exist():
    name = re.compile(r"`((?:tests|docs|launch|benchmarks|examples|kernels|constraints|docker|dpo_engine)/[\w./-]+)`")
    for page, text in TEXTS.items():
        for path in name.findall(text) if page != "migrating.md" else ():  # migrating.md names other systems' files
            assert path.startswith(MADE) or (ROOT / path).exists(), f"{page}: {path}"
    for path in re.findall(r"`((?:\w+/)+\w+\.py)`", TEXTS["design.md"]):
        assert (ROOT / path).exists() or (ROOT / "dpo_engine" / path).exists(), path
    for path in set(re.findall(r"`(test_\w+\.py)`", TEXTS["reliability.md"])):
        assert (ROOT / "tests" / "faults" / path).is_file(), path


class Requests(HTMLParser):
    """A parser that collects the URLs that a browser requests when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(given.get("src") or "")
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(given.get("href") or "")


def test_the_site_builds_strictly_and_requests_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert {path.parent.name for path in pages} >= {
        name.removesuffix(".md") for name in TEXTS if name in {path.name for path in DOCS.glob("*.md")} - {"index.md"}
    }
    for page in pages:
        requests = Requests()
        requests.feed(page.read_text(encoding="utf-8"))
        assert requests.found and not [url for url in requests.found if re.match(r"(https?:)?//", url)], page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {path.name for path in DOCS.glob("*.md")}
