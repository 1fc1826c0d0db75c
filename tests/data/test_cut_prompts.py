"""Tests of finding the tokens that were cut from a prompt.

The cut tokens and the remaining tokens together form the whole prompt.
"""

import json

import pytest

from dpo_engine.config.run import Config
from dpo_engine.data.cut_prompts import cut_prompts
from dpo_engine.data.tokenize import build_dataset
from dpo_engine.data.tokenizer import load_tokenizer
from support.tiny_tokenizers import byte_level


@pytest.fixture
def make(tmp_path):
    """Return a function that tokenizes records and returns the data section, the pairs and the tokenizer."""

    def tokenized(rows, *, bos=False, **data):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer", bos=bos))
        raw = {"model": {"path": "x"}, "train": {"output_dir": "x"}}
        section = Config.parse({**raw, "data": {"train": "x", "validation": str(path), "max_length": 40, **data}}).data
        pairs, _ = build_dataset(section.validation, tokenizer, section, tmp_path / "cache")
        return section, pairs, tokenizer

    return tokenized


ROWS = [
    {"prompt": "short ", "chosen": "yes", "rejected": "no"},
    {"prompt": "word " * 60 + "end ", "chosen": "yes yes", "rejected": "no"},
    {"prompt": "other " * 60 + "end ", "chosen": "yes", "rejected": "no no"},
]


@pytest.mark.parametrize("score", ["response", "all"])
@pytest.mark.parametrize("bos", [False, True])
def test_the_cut_and_the_rest_are_the_whole_prompt(make, bos, score):
    section, pairs, tokenizer = make(ROWS, bos=bos, score=score)
    found = cut_prompts(pairs, [0, 2], section, tokenizer)
    assert found[0] == [] and set(found) == {0, 2}
    pair, start = pairs[2], [tokenizer.bos_id] * bos
    left = [*pair.prompt, *pair.chosen]
    assert len(left) <= 40 and left[: len(start)] == start
    whole = tokenizer.encode(ROWS[2]["prompt"] + "yes")
    assert found[2] + left[len(start) : -1] == whole, "the last token is the EOS"


def test_nothing_is_read_if_no_pair_reaches_a_limit(make, tmp_path):
    section, pairs, tokenizer = make(ROWS)
    (tmp_path / "pairs.jsonl").unlink()
    assert cut_prompts(pairs, [0], section, tokenizer) == {0: []}
    assert cut_prompts(pairs, [0, 1], section, tokenizer) == {0: [], 1: None}, "without the file, the cut is unknown"


def test_a_changed_file_has_no_such_pair(make, tmp_path):
    section, pairs, tokenizer = make(ROWS)
    (tmp_path / "pairs.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[0]) + "\n")
    assert cut_prompts(pairs, [1, 2], section, tokenizer) == {1: None, 2: None}
