"""Tests of `dpo-engine inspect`: the parts of a pair and the tokens of each part, terminal colors, and bad records."""

import json
import os
import pty
import subprocess
import sys

import pytest
import transformers

from dpo_engine import cli, inspect
from dpo_engine.config.run import Config
from support.malformed import RIGHT, USER, WRONG
from support.tiny_tokenizers import CHATML, byte_level

WHY = {"role": "user", "content": "Why?"}
ROW = {
    "prompt": [USER],
    "chosen": [{"role": "assistant", "content": "The first one."}, WHY, RIGHT],
    "rejected": [WRONG],
}


@pytest.fixture
def run(tiny_hf, tmp_path):
    """Return a function that returns the configuration of a run.

    ``run(rows, **data)`` writes the records ``rows`` to the run's data file. ``data`` sets keys of the section `data`.
    """
    tokenizer = byte_level(tmp_path / "tokenizer")

    def make(rows, **data):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sections = {
            "model": {"path": str(tiny_hf()), "tokenizer": str(tokenizer)},
            "data": {"train": str(path), "max_length": 200, **data},
            "train": {"output_dir": str(tmp_path / "out")},
        }
        return Config(**sections)

    return make


def kinds(pieces):
    return [(piece.kind, piece.text, len(piece.tokens)) for piece in pieces]


def test_pieces_of_a_pair(run, tmp_path):
    (pair,) = inspect(run([ROW]))
    library = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")

    def count(text):
        return len(library(text)["input_ids"])

    header, between = "<|im_start|>assistant\n", "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    prompt = f"<|im_start|>user\n{USER['content']}<|im_end|>\n{header}"
    assert pair.place == f"{tmp_path / 'pairs.jsonl'}:1" and pair.note == ""
    assert kinds(pair.prompt) == [("prompt", prompt, count(prompt))]
    assert [piece.kind for piece in pair.chosen] == ["shared", "scored", "not scored", "scored"]
    assert (
        "".join(piece.text for piece in pair.chosen) == f"The first one.<|im_end|>{between}{RIGHT['content']}<|im_end|>"
    )
    assert pair.chosen[2].text == between
    assert pair.rejected[0].text == pair.chosen[0].text and pair.rejected[-1].kind == "scored"
    assert library.convert_tokens_to_ids(pair.prompt[0].tokens) == library(prompt)["input_ids"]


def test_cut_prompts_and_scored_prompts(run):
    row = {**ROW, "prompt": [{"role": "user", "content": "which is larger? " * 50}]}
    whole, (cut,), (everything,) = (inspect(run([row], **data)) for data in ({"max_length": 900}, {}, {"score": "all"}))
    assert [piece.kind for piece in cut.prompt] == ["cut", "prompt"]
    assert "".join(piece.text for piece in cut.prompt) == whole[0].prompt[0].text
    longest = max(sum(len(piece.tokens) for piece in part) for part in (cut.chosen, cut.rejected))
    assert len(cut.prompt[1].tokens) + longest == 200
    assert [(piece.kind, len(piece.tokens)) for piece in everything.prompt[:2]] == [
        ("cut", len(cut.prompt[0].tokens)),
        ("prompt", 1),
    ]
    assert everything.prompt[2].kind == "scored" and {p.kind for p in everything.chosen} == {"shared", "scored"}


def test_unusable_records_are_shown_with_the_reason(run, tmp_path):
    long = {**ROW, "rejected": [{"role": "assistant", "content": "larger " * 400}]}
    shown = inspect(run([ROW, {**ROW, "rejected": 3}, long, ROW]), pairs=9)
    assert [pair.place.rpartition(":")[2] for pair in shown] == ["1", "2", "3", "4"]
    assert "rejected must be" in shown[1].note and not shown[1].prompt
    assert shown[2].note == "dropped: a response too long for data.max_length" and shown[2].chosen
    assert len(inspect(run([ROW] * 9), pairs=2)) == 2


def test_terminal_output(run, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(run([ROW, {**ROW, "prompt": [{**USER, "content": "\x1b[31mred"}]}]).to_yaml())
    terminal, end = pty.openpty()
    environment = {**os.environ, "COLUMNS": "160", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "dpo_engine", "inspect", str(path), "--pairs", "2"]
    shown = subprocess.Popen(command, stdin=end, stdout=end, stderr=subprocess.PIPE, env=environment)
    os.close(end)
    output = b""
    while True:
        try:
            output += os.read(terminal, 65536)
        except OSError:  # on Linux, this error means that the program has closed its side of the pseudoterminal
            break
    assert shown.wait(timeout=60) == 0, shown.stderr.read()
    text = output.decode()
    assert "\x1b[32m" in text and "\x1b[36m" in text  # green and cyan
    assert "\\x1b[31mred" in text and "\x1b[31mred" not in text


def test_names_of_tokens(run, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(run([ROW]).to_yaml())
    assert cli.main(["inspect", str(path), "--tokens"]) == 0
    out = capsys.readouterr().out
    assert "'<|im_start|>' 'u' 's' 'er' 'Ċ'" in out and "\x1b" not in out
    assert cli.main(["check", str(path)]) == 0
    assert f"{tmp_path / 'pairs.jsonl'}:1\n" in capsys.readouterr().out


def test_a_template_fault_is_shown(run, tmp_path):
    template = tmp_path / "cut.jinja"
    template.write_text(CHATML.replace("message.content }}", "message.content[:3] }}"))
    (pair,) = inspect(run([ROW], chat_template=str(template)))
    assert pair.note.startswith("the chat template drops text of chosen: 'The first one.'")
