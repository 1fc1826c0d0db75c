"""Convert a bare sentencepiece model to a tokenizer of the tokenizers library, which can be saved as `tokenizer.json`.

If a directory has only a `*.model` file, transformers reads this file with the settings of the model family's tokenizer
class. The token ids therefore often differ from those of sentencepiece. In contrast, a `tokenizer.json` contains all
settings of the tokenizer.

Limitation: a `tokenizer.json` cannot express everything that sentencepiece does. The caller must compare the ids of a
few texts with those of sentencepiece.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer

SPACE = "▁"
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


class Converted(NamedTuple):
    """A candidate conversion.

    tokenizer  the tokenizer, with the unknown piece and all control pieces as special tokens
    names      texts of the bos, eos, unk and pad tokens, by their keys in `tokenizer_config.json`
    """

    tokenizer: Tokenizer
    names: dict[str, str]


def conversions(path: str | Path) -> Iterator[Converted]:
    """Yield conversions of the sentencepiece model at `path`. They differ in their handling of a leading space.

    If the model type is neither BPE nor unigram, there are no conversions.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(Path(path).read_bytes())
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE):
        return
    names = _names(sentencepiece.SentencePieceProcessor(model_file=str(path)))
    prefix = proto.normalizer_spec.add_dummy_prefix
    special = [piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL)]
    whole = sorted((piece.piece for piece in proto.pieces if piece.type == USER_DEFINED), key=len, reverse=True)
    prepend = normalizers.Prepend(SPACE)
    for variant in [[normalizers.Replace(Regex(r"\A "), ""), prepend], [prepend]] if prefix else [[]]:
        made = Tokenizer(_model(proto, keeps_whole=bool(whole)))
        made.normalizer = normalizers.Sequence([*_cleaning(proto), *variant, normalizers.Replace(" ", SPACE)])
        # User-defined pieces do not become added tokens, because the text after an added token would get its own space
        # prefix.
        if whole:
            made.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, whole))), "isolated")
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        made.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        made.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
        yield Converted(made, names)


def _names(model: sentencepiece.SentencePieceProcessor) -> dict[str, str]:
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id(), "pad": model.pad_id()}
    return {f"{name}_token": model.id_to_piece(i) for name, i in ids.items() if i >= 0}


def _cleaning(proto: Any) -> list[Normalizer]:
    """Return the model's normalization of characters and spaces."""
    spec = proto.normalizer_spec
    steps: list[Normalizer] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    return steps


def _model(proto: Any, *, keeps_whole: bool) -> models.Model:
    """Convert the sentencepiece model `proto` to a model of the tokenizers library, with the same pieces.

    With ``keeps_whole``, a BPE model turns a text that is equal to a piece into one token.
    """
    pieces, trainer = proto.pieces, proto.trainer_spec
    if trainer.model_type == UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in pieces]
        return models.Unigram(scored, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    vocabulary = {piece.piece: i for i, piece in enumerate(pieces)}
    return models.BPE(
        vocabulary,
        _merges(pieces),
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=keeps_whole,
    )


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Return all pairs of pieces that together form a piece, in sentencepiece's order.

    The pairs are sorted by the score of the piece that they form, from high to low, and then by the id of this piece.
    """
    ordinary = {piece.piece: (-piece.score, i) for i, piece in enumerate(pieces) if piece.type == NORMAL}
    found = [
        (rank, ordinary[piece[:at]], piece[:at], piece[at:])
        for piece, rank in ordinary.items()
        for at in range(1, len(piece))
        if piece[:at] in ordinary and piece[at:] in ordinary
    ]
    return [(left, right) for *_, left, right in sorted(found)]
