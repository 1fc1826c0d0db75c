"""Fault tests: malformed lines in preference files are refused, or counted and skipped, on two ranks."""

import dataclasses
import json
import os

import pytest

from support.jobs import run_job
from support.malformed import ALSO_GOOD, CONVERSATIONS, GOOD, KINDS, Malformed, between, dump
from support.tiny_tokenizers import CHATML

DEFAULT = {"cut line", "invalid UTF-8", "different prompts"}
SAME_TOKENS = Malformed(
    "same tokens",
    between(dump({**GOOD, "chosen": "a\u00a0b", "rejected": "a b"})),
    "chosen and rejected have identical tokens",
)
ALL = [
    dataclasses.replace(bad, content=between(b"x" * (17 << 20))) if bad.kind == "endless line" else bad
    for bad in [*KINDS, SAME_TOKENS]
]


def named(kinds):
    """Return one test parameter for each malformed file. Kinds that are not in `DEFAULT` are marked slow."""
    return [pytest.param(bad, id=bad.kind, marks=() if bad.kind in DEFAULT else pytest.mark.slow) for bad in kinds]


@pytest.fixture
def job(run_yaml, tmp_path):
    """Return a function: ``job(content)`` writes ``pairs.jsonl``, and trains on it with two ranks.

    The working directory of the ranks is the folder of ``pairs.jsonl``.
    """

    def run(content: bytes, **data):
        (tmp_path / "pairs.jsonl").write_bytes(content)
        (tmp_path / "chat.jinja").write_text(CHATML)
        sizes = {"train": ["pairs.jsonl"], "validation": None, "max_length": 200, **data}
        yaml = run_yaml(data=sizes, train={"output_dir": "out", "global_batch_size": 4, "epochs": 1})
        return run_job(["train", yaml.name], 2, tmp_path / "log", before=lambda: os.chdir(tmp_path))

    return run


def settings(bad):
    return {"chat_template": "chat.jinja"} if bad in CONVERSATIONS else {}


@pytest.mark.parametrize("bad", named(bad for bad in ALL if bad.says))
def test_bad_line_is_refused_with_one_line_and_exit_code_3(bad, job):
    found = job(bad.content, **settings(bad))
    (line,) = found.said.splitlines()
    assert found.codes == [3, 3]
    assert line.startswith(f"pairs.jsonl:{bad.line}: ") and bad.says in line and len(line) <= 200 and line.isprintable()
    assert line.endswith("; to skip bad records, set data.on_bad_line=skip")


@pytest.mark.parametrize("bad", named(ALL))
def test_bad_line_is_skipped_and_the_rest_trained_on(bad, job, tmp_path):
    found = job(bad.content, on_bad_line="skip", **settings(bad))
    if not bad.kept:
        assert found.codes == [3, 3] and len(found.said.splitlines()) == 1
        assert found.said.startswith("pairs.jsonl: contains no usable pair; line 1: is UTF-16")
        return
    assert found.codes == [0, 0], found.said
    counted = f"{bad.kept} pairs from 3 records"
    assert counted in found.output[0]
    if bad.says is not None:
        assert "1 bad line skipped" in found.output[0] and f"pairs.jsonl:{bad.line}: " in found.output[0]
        assert bad.says in found.output[0]
    (metrics,) = (json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines())
    assert metrics["step"] == 1


@pytest.mark.parametrize("kind", ["not JSON", pytest.param("same tokens", marks=pytest.mark.slow)])
def test_bad_line_that_only_the_tokenizing_rank_reads(kind, job):
    """Every rank checks the first records, but only one rank reads the rest. All ranks exit with that rank's error."""
    (bad,) = (bad for bad in ALL if bad.kind == kind)
    rows = [dump({**GOOD, "prompt": f"Which of {n}?"}) for n in range(20)]
    found = job(b"\n".join(rows) + b"\n" + bad.content)
    (line,) = found.said.splitlines()
    assert found.codes == [3, 3] and line.startswith("pairs.jsonl:22: ") and bad.says in line


@pytest.mark.slow
def test_first_five_of_many_bad_lines_are_shown(job):
    found = job(dump(GOOD) + b"\n" + b"no\n" * 3000 + dump(ALSO_GOOD), on_bad_line="skip")
    assert found.codes == [0, 0] and "3,000 bad lines skipped, first 5:" in found.output[0]
    assert found.output[0].count("pairs.jsonl:") == 5


@pytest.mark.slow
@pytest.mark.parametrize("skip", [False, True], ids=["error", "skip"])
def test_gigabyte_line_without_a_newline(skip, job, tmp_path):
    huge = tmp_path / "huge.jsonl"
    huge.write_bytes(between(b"")[: len(dump(GOOD)) + 1])
    os.truncate(huge, 2**30)
    with huge.open("ab") as stream:
        stream.write(b"\n" + dump(ALSO_GOOD) + b"\n")
    found = job(b"", train=["huge.jsonl"], on_bad_line="skip" if skip else "error")
    if skip:
        assert found.codes == [0, 0] and "huge.jsonl:2: the line is longer than 16 MiB" in found.output[0]
    else:
        assert found.codes == [3, 3] and found.said.startswith("huge.jsonl:2: the line is longer than 16 MiB")
    assert max(found.seconds) < (20 if skip else 10)
