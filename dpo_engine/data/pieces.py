"""Split the text of token ids into one piece per token."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_engine.data.tokenizer import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Character that decoders write for bytes that do not form a whole character."""
MOST_PREFIXES = 2048
"""Maximum number of prefixes that are decoded if the pieces cannot be found token by token."""


def text_pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return the text of each token. The concatenation of these pieces is the text of all tokens.

    If a token ends within a character, its piece is empty, unless it is the last token. The piece of the token that
    completes the character contains the whole character.
    """
    ids = [int(i) for i in ids]
    whole = tokenizer.decode(ids)
    pieces = _by_window(ids, tokenizer)
    return pieces if "".join(pieces) == whole else _by_prefix(ids, whole, tokenizer)


def _by_window(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """Decode each token together with the previous one, because some decoders drop a space at the start of a text."""
    pieces: list[str] = []
    start = read = 0
    for end in range(1, len(ids) + 1):
        before, after = tokenizer.decode(ids[start:read]), tokenizer.decode(ids[start:end])
        if after.endswith(INCOMPLETE) and end < len(ids):
            pieces.append("")
            continue
        pieces.append(after[len(before) :])
        start, read = read, end
    return pieces


def _by_prefix(ids: list[int], whole: str, tokenizer: Tokenizer) -> list[str]:
    """Decode prefixes of the tokens. The piece of a token is the text that the token adds to the previous prefix.

    If there are more than `MOST_PREFIXES` tokens, they are divided into groups of equal size. Only the last group may
    be smaller. The last token of a group then gets the text of the whole group.
    """
    pieces = [""] * len(ids)
    step, found = -(-len(ids) // MOST_PREFIXES), 0
    for end in [*range(step, len(ids), step), len(ids)] if ids else []:
        text = tokenizer.decode(ids[:end]) if end < len(ids) else whole
        if len(text) > found and whole.startswith(text):
            pieces[end - 1], found = whole[found : len(text)], len(text)
    return pieces
