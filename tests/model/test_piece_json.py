"""Tests of converting a bare sentencepiece model to `tokenizer.json`.

For a BPE or unigram model, `conversions` yields one or two candidates. The last candidate must produce the ids of
sentencepiece itself. The first candidate must produce the ids of the engine's tokenizer.
"""

import io

import pytest
import sentencepiece

from dpo_engine.data.piece_json import conversions
from support.tiny_tokenizers import LINES, piece_model

TEXTS = (
    "which number is larger",
    "  two  spaces\n\n\nand lines \t.",
    " one",
    "9.11 or 12345",
    "def f(x):\n    return x",
    "naïve café, 你好, ﬁne ２",
    "trailing \n",
    "\n",
    " ",
    "",
)
AS_IS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
MARKS = {"user_defined_symbols": ["<|turn|>", "<|turn|>x"], "control_symbols": ["[INST]"]}


def unigram(path, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20),
        model_writer=model,
        model_type="unigram",
        vocab_size=340,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize(
    "make, options",
    [
        (piece_model, {}),
        (piece_model, AS_IS),
        (piece_model, {"add_dummy_prefix": False}),
        (piece_model, {**AS_IS, **MARKS}),
        (piece_model, MARKS),
        (unigram, {}),
        (unigram, {"byte_fallback": True, **AS_IS}),
    ],
)
def test_ids_are_those_of_sentencepiece(make, options, tmp_path):
    path = make(tmp_path / "m.model", **options)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    made = list(conversions(path))
    texts = [*TEXTS, *(["a <|turn|>which<|turn|>xa"] if "user_defined_symbols" in options else [])]
    assert [made[-1].tokenizer.encode(text).ids for text in texts] == [model.encode(text) for text in texts]
    # A sentencepiece model that prepends a space and keeps all spaces doubles the leading space of a text. For such a
    # model, the engine's tokenizer removes the leading space from the text before sentencepiece reads the text. made[0]
    # must produce the same ids as the engine's tokenizer.
    doubles = model.encode(" a", out_type=str)[1:2] == model.encode("a", out_type=str)
    assert doubles == (options.get("add_dummy_prefix", True) and "remove_extra_whitespaces" in options)
    wanted = [model.encode(text.removeprefix(" ") if doubles else text) for text in texts]
    assert [made[0].tokenizer.encode(text).ids for text in texts] == wanted


def test_control_pieces_are_special_tokens(tmp_path):
    path = piece_model(tmp_path / "m.model", **MARKS)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    made = next(conversions(path))
    assert made.names == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    whole = made.tokenizer.encode("<s>which</s>[INST]is")
    wanted = [1, *model.encode("which"), 2, model.piece_to_id("[INST]"), *model.encode("is")]
    assert whole.ids == wanted and made.tokenizer.decode(wanted) == "which is"


def test_other_model_types_have_no_conversion(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, model_type="char", vocab_size=30, minloglevel=2
    )
    (tmp_path / "m.model").write_bytes(model.getvalue())
    assert list(conversions(tmp_path / "m.model")) == []
