"""Find the tokens that were cut from the start of prompts. The files of token pairs do not contain these tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from dpo_engine.config.data_section import DataConfig
from dpo_engine.data.dataset import PairDataset, TokenPair
from dpo_engine.data.encode import Encoded, Limits, encode_pairs
from dpo_engine.data.formats import read_pairs
from dpo_engine.data.pair import Pair
from dpo_engine.data.records import BadLines
from dpo_engine.data.tokenizer import Tokenizer
from dpo_engine.errors import ConfigError, DataError


def at_limit(pair: TokenPair, data: DataConfig) -> bool:
    """Return whether the start of a pair's prompt may have been cut, because the pair reaches a length limit.

    With `data.score: all`, the length of the prompt is not stored, so any pair may have reached `max_prompt_length`.
    """
    if data.truncation == "drop":
        return False
    prompt = data.max_prompt_length is not None and (len(pair.prompt) == data.max_prompt_length or data.score == "all")
    return prompt or len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) >= data.max_length


def cut_prompts(
    pairs: PairDataset, indices: Sequence[int], data: DataConfig, tokenizer: Tokenizer
) -> dict[int, list[int] | None]:
    """Return the ids that were cut from the prompts of held-out pairs.

    If a pair reaches a limit, its record is read and tokenized again. A source is not read if none of its pairs reaches
    a limit.

    pairs    held-out pairs
    indices  indices of pairs in ``pairs``

    Returns  a mapping from each index to the ids that were cut: an empty list if nothing was cut, or None if the record
             of the pair can no longer be found
    """
    found: dict[int, list[int] | None] = {int(index): [] for index in indices}
    wanted: dict[int, dict[int, list[int]]] = {}
    for index in found:
        pair = pairs[index]
        if at_limit(pair, data):
            found[index] = None
            wanted.setdefault(pair.source, {}).setdefault(pair.line, []).append(index)
    limits = Limits.of(data)
    unlimited = dataclasses.replace(
        limits, max_length=2**31, max_prompt_length=None, max_completion_length=None, score="response"
    )
    for source, places in wanted.items():
        try:
            for line, records in _records(data, source, set(places)):
                whole, fitted = (encode_pairs(records, tokenizer, kind, source=source) for kind in (unlimited, limits))
                ids = dict(filter(None, map(_cut, whole, fitted, [tokenizer.bos_id] * len(whole))))
                for index in places[line]:
                    found[index] = ids.get(pairs[index].digest)
        except (DataError, ConfigError, OSError):  # the files have changed since they were tokenized
            continue
    return found


def _records(data: DataConfig, number: int, lines: set[int]) -> Iterator[tuple[int, list[Pair]]]:
    """Yield the line and the pairs of each record that is on one of the given lines of a source."""
    source = (data.validation or data.train)[number]
    left = set(lines)
    for line, pairs in read_pairs(source.path, source.format, BadLines(skip=True), source.columns):
        if line in left:
            yield line, pairs
            left.remove(line)
        if not left:
            return


def _cut(whole: object, fitted: object, bos_id: int | None) -> tuple[str, list[int]] | None:
    """Return the digest of a pair and the ids that were cut from its prompt.

    whole, fitted  the results of tokenizing the pair without and with the length limits

    Returns None if one of the results has no pair.
    """
    if not (isinstance(whole, Encoded) and isinstance(fitted, Encoded)) or whole.pair is None or fitted.pair is None:
        return None
    prompt, kept = whole.pair.prompt, fitted.pair
    # With `data.score: all`, the stored response begins with the rest of the prompt. Therefore, compare the total
    # lengths of prompt and response, not the lengths of the prompts.
    count = len(prompt) + len(whole.pair.chosen) - len(kept.prompt) - len(kept.chosen)
    first = int(prompt[0] == bos_id and kept.prompt[0] == bos_id)
    return kept.digest, np.asarray(prompt[first : first + count]).tolist()
