"""Tests of splitting a text into one piece per token. With any tokenizer, the joined pieces are the decoded text."""

import pytest

from dpo_engine.data.pieces import text_pieces
from dpo_engine.data.tokenizer import load_tokenizer
from support.tiny_tokenizers import byte_level, piece_model

TEXTS = (
    "which number is larger ?",
    " of  them\n\tand\r\nothers ",
    "\N{OWL}\N{SNOWMAN} caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{FAMILY}\N{ZERO WIDTH JOINER}\N{BOY}",
    "</script><b>\N{RIGHT-TO-LEFT OVERRIDE}x",
    "",
)


@pytest.mark.parametrize("make", [byte_level, piece_model])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(make, text, tmp_path):
    tokenizer = load_tokenizer(make(tmp_path / "tokenizer.model"))
    ids = tokenizer.encode(text)
    pieces = text_pieces(ids, tokenizer)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("make", [byte_level, piece_model])
def test_the_time_is_linear(make, tmp_path, monkeypatch):
    """Check that all calls of `decode` together get fewer than 12 ids per token of the text.

    A method whose time is quadratic in the number of tokens would decode far more ids.
    """
    tokenizer = load_tokenizer(make(tmp_path / "tokenizer.model"))
    ids = tokenizer.encode(" of them \N{OWL}" * 300)
    lengths = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    text_pieces(ids, tokenizer)
    assert sum(lengths) < 12 * len(ids)


def test_incomplete_characters_and_odd_decoders(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer"))
    owl = tokenizer.encode("a\N{OWL}")
    assert text_pieces(owl, tokenizer) == ["a", "", "", "", "\N{OWL}"]
    assert text_pieces(owl[:-1], tokenizer) == ["a", "", "", "\N{REPLACEMENT CHARACTER}"], "the owl is incomplete"

    class Reversing:
        """A decoder that reverses the text. The text of the first ids is therefore the end of the whole text."""

        def decode(self, ids):
            return "".join(map(chr, reversed([97 + i for i in ids])))

    pieces = text_pieces([0, 1, 2], Reversing())
    assert len(pieces) == 3 and "".join(pieces) == "cba"
