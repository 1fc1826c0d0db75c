"""The README and what a release is made of say what is true: keys, files, commands, formats, pins."""

import html
import json
import re
import shlex
import subprocess
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dpo_engine import cli
from dpo_engine.config.run import Config
from dpo_engine.data.formats import FORMATS, detect, read_pairs
from dpo_engine.objective.losses import LOSSES
from dpo_engine.reporting.comparison import LENGTH_EDGES
from dpo_engine.reporting.intervals import RESAMPLES
from dpo_engine.reporting.pair_file import SCHEMA

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def flat(annotation: typing.Any) -> list[typing.Any]:
    """An annotation and everything it is made of, the values of a `Literal` excepted."""
    parts = () if typing.get_origin(annotation) is typing.Literal else typing.get_args(annotation)
    return [annotation, *(inner for part in parts for inner in flat(part))]


def plain(value: typing.Any) -> str:
    """A value as in YAML."""
    return value if isinstance(value, str) else format(value, "g") if isinstance(value, float) else json.dumps(value)


def reference_table(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """The README's table of keys, from the schema itself: the default, then the other choices, then what it means."""
    lines = []
    for name, field in section.model_fields.items():
        parts = flat(field.annotation)
        if field.description:
            choices = [value for part in parts if typing.get_origin(part) is typing.Literal for value in part.__args__]
            choices += [True, False] if bool in parts else []
            default = "required" if field.default is PydanticUndefined else plain(field.default)
            words = [default, *(plain(value) for value in choices if plain(value) != default)]
            meaning = html.escape(field.description, quote=False)
            lines.append(f"| `{prefix}{name}` | {' / '.join(words)} | {meaning} |")
        for part in parts:
            if isinstance(part, type) and issubclass(part, BaseModel):
                lines += reference_table(part, f"{prefix}{name}.")
    return lines


def test_the_readme_lists_every_key():
    expected = "\n".join(reference_table())
    start = README.index("| `model.path`")
    assert README[start:].split("\n\n")[0] == expected, f"the table of keys should be:\n{expected}"


def test_the_readme_lists_every_loss():
    table = README[README.index("| losses |") :].split("\n\n")[0]
    listed = re.findall(r"`(\w+)`", table)
    assert set(listed) <= set(LOSSES) and len(listed) == len(set(listed))
    ours = {id(loss) for loss in LOSSES.values() if loss.__module__.startswith("dpo_engine.")}
    assert {id(LOSSES[name]) for name in listed} == ours  # by identity, as a loss may have several names


def test_the_readme_lists_every_file():
    listed = set(re.findall(r"[\w/]*\w+\.py", README[README.index("## The files") :]))
    names = {Path(name).name for name in listed}
    expected = {path.name for path in (ROOT / "dpo_engine").rglob("*.py") if not path.name.startswith("__")}
    families = {"llama.py", "mistral.py", "qwen2.py", "qwen3.py"}
    assert expected - families <= names
    assert not {name for name in names - expected if not any(ROOT.rglob(name))}


def test_the_readme_lists_every_column_of_an_evaluation():
    table = README[README.index("| column |") :].split("\n\n")[0]
    listed = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert listed == SCHEMA.names
    words = " ".join(README.split())
    assert f"up to {', '.join(map(str, LENGTH_EDGES))}" in words and f"{RESAMPLES:,} bootstrap" in words


def commands() -> list[str]:
    """Every line of the README's shell blocks, comments off."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("command", commands())
def test_the_readmes_commands_name_what_exists(command):
    assert subprocess.run(["bash", "-n", "-c", command], capture_output=True).stderr == b""
    for word in shlex.split(command):
        if "/" in word and "=" not in word and word != "launch/site.env":
            assert (ROOT / word).exists(), word
    if "dpo_engine" in command:
        asked = cli._parse(shlex.split(command)[shlex.split(command).index("dpo_engine") + 1 :])
        Config.load(ROOT / asked.run, asked.overrides)


def test_the_readmes_data_formats_are_registered_and_its_records_read(tmp_path):
    rows = re.findall(r"^\| `(\w+)` \| `(\{.*?\})`", README, re.MULTILINE)
    assert {name for name, _ in rows} == set(FORMATS) - {"auto"}
    for name, record in rows:
        path = tmp_path / f"{name}.jsonl"
        path.write_text(record + "\n")
        alike = "ranked" if name.startswith("ranked_") else name  # three rules for one kind of record
        assert detect(json.loads(record)) is FORMATS[alike]
        ((line, pairs),) = read_pairs(path, name)
        assert line == 1 and pairs and all(pair.chosen != pair.rejected for pair in pairs)


def tracked() -> list[Path]:
    """Files that git has or would have."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_files_name_no_machine_and_no_package_index():
    # Written so that no pattern finds itself: this file is searched too.
    index = re.compile(r"--(extra-)?index[-]url|find[-]links|\w\.[a-z]{2,}(:\d+)?/(\S*/)?(simpl[e]|wh[l])\b|\.wh[l]\b")
    place = re.compile(r"(?<![\w.$}~])/(home|root|work|mnt|Users|scratch)/")
    for path in tracked():
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            assert not index.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            assert not place.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_constraints_pin_every_requirement():
    requirements = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL)[1]
    required = set(re.findall(r'^ +"([a-z0-9-]+)', requirements, re.MULTILINE))
    assert {"torch", "megatron-core", "transformers"} <= required
    for path in sorted((ROOT / "constraints").glob("*.txt")):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.]+(; python_version [<>=]+ \"3\.\d+\")?", line) for line in lines)
        assert required <= {line.split("==")[0] for line in lines}, path.name


def test_the_reliability_document_names_what_there_is():
    from dpo_engine.faults import NUMBERS, PHASES

    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `([a-z-]+)` \| (.+) \|$", text, re.M)) == {**PHASES, **NUMBERS}
    for name in set(re.findall(r"`(test_\w+\.py)`", text)):
        assert (ROOT / "tests" / "faults" / name).is_file(), name
