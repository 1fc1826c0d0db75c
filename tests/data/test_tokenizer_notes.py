"""Tests: tokenizer.json decides the token ids, and the log shows where transformers' tokenizer class disagrees."""

import json
import shutil

import pytest
import tokenizers
import transformers

from dpo_engine.config.run import Config
from dpo_engine.data.tokenizer import load_tokenizer
from dpo_engine.data.tokenizer_files import SAMPLES, different_reading
from dpo_engine.errors import ConfigError
from dpo_engine.verbs.summary import summarize
from support.tiny_tokenizers import CHATML, byte_level

TEXTS = [*SAMPLES, "in 1999 they're  here", "\n\n  x = 12.50\t# caf\u00e9"]


@pytest.fixture
def qwen2(tmp_path):
    """Return a qwen2 directory whose tokenizer.json keeps digits together, while transformers' class splits them."""
    path = byte_level(tmp_path / "qwen2")
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return path


def own_ids(path):
    own = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    return [own.encode(text, add_special_tokens=False).ids for text in TEXTS]


def test_ids_are_those_of_tokenizer_json_and_the_log_shows_both_readings(qwen2):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(qwen2), load_tokenizer(qwen2)
    assert theirs.encode(SAMPLES[0], add_special_tokens=False) != own_ids(qwen2)[0]  # transformers' class differs
    assert ours.encode_all(TEXTS) == own_ids(qwen2)
    assert (ours.chat_template, ours.name_of(ours.eos_id)) == (CHATML, "<|im_end|>")
    release = (
        f"tokenizer: Qwen2Tokenizer of transformers {transformers.__version__} tokenizes {SAMPLES[0]!r} differently "
        "than tokenizer.json does: from token "
    )
    assert ours.note.startswith(release) and ours.note.endswith("; using tokenizer.json")
    at = int(ours.note.removeprefix(release).split()[0])
    as_read, as_meant = (
        " ".join(map(repr, theirs.convert_ids_to_tokens(ids[at : at + 4])))
        for ids in (theirs.encode(SAMPLES[0], add_special_tokens=False), own_ids(qwen2)[0])
    )
    assert f" on, the tokens are {as_read} instead of {as_meant}; " in ours.note and as_read != as_meant


def test_the_same_reading_has_no_note(tmp_path):
    path = byte_level(tmp_path / "plain")
    tokenizer = load_tokenizer(path)
    assert tokenizer.note is None and tokenizer.encode_all(TEXTS) == own_ids(path)


def test_truncation_and_an_unreadable_tokenizer_json_give_no_note(tmp_path):
    path = byte_level(tmp_path / "short")
    raw = json.loads((path / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (path / "tokenizer.json").write_text(json.dumps(raw))
    assert load_tokenizer(path).note is None
    (path / "tokenizer.json").write_text("{}")  # a format that the tokenizers library does not know
    assert different_reading(path, load_tokenizer(byte_level(tmp_path / "plain"))._inner) is None


def test_a_release_that_cannot_use_tokenizer_json_is_refused(qwen2, monkeypatch):
    theirs = transformers.AutoTokenizer.from_pretrained(qwen2)
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", lambda path, **options: theirs)
    says = (
        r"^model\.tokenizer=.*/qwen2: Qwen2Tokenizer of transformers [\d.]+ tokenizes 'what is 7 .* differently than "
        r"tokenizer\.json does: from token \d+ on, the tokens are "
    )
    with pytest.raises(ConfigError, match=says + ".* instead of .*; use another transformers release$"):
        load_tokenizer(qwen2)


@pytest.mark.parametrize("own", [True, False], ids=["the model's tokenizer", "model.tokenizer"])
def test_check_shows_the_note(own, tiny_hf, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n')
    model = byte_level(shutil.copytree(tiny_hf("qwen2", vocab_size=400), tmp_path / "model"))
    raw = {
        "model": {"path": str(model)} | ({} if own else {"tokenizer": str(model)}),
        "data": {"train": str(tmp_path / "a.jsonl"), "max_length": 32},
        "train": {"output_dir": str(tmp_path / "out")},
    }
    lines = summarize(Config.parse(raw), 1)
    assert [line for line in lines if line.endswith("; using tokenizer.json")] == [
        f"  data    {load_tokenizer(model).note}"
    ]
    assert any("export" in line and "does not reproduce the training tokenizer" in line for line in lines)
