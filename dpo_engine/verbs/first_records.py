"""Encode the first records of a source. Find records that the run would drop, and responses that repeat the prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

from dpo_engine.config.run import Config
from dpo_engine.config.sections import Source
from dpo_engine.data.encode import REPEATED, Encoded, Limits, dropped_text, encode_pairs
from dpo_engine.data.formats import read_pairs
from dpo_engine.data.records import BadLines
from dpo_engine.data.tokenizer import Tokenizer

FIRST_RECORDS = 8
MOST_RECORDS = 1000
"""Maximum number of usable records in which `check` looks for a pair that is not dropped."""


def all_dropped(source: Source, tokenizer: Tokenizer, config: Config) -> Counter[str] | None:
    """Return the number of dropped pairs by reason, if all pairs of a source are dropped.

    Return None if a pair is kept. At most `MOST_RECORDS` usable records are searched. If all pairs in these records are
    dropped, but the source has more usable records, also return None.

    Raises :class:`~dpo_engine.errors.DataError` and :class:`~dpo_engine.errors.ConfigError` as :func:`read_pairs` and
    :func:`encode_pairs` do.
    """
    dropped: Counter[str] = Counter()
    for number, made in enumerate(_encoded(source, tokenizer, config)):
        if number == MOST_RECORDS or any(one.pair for one in made):
            return None
        dropped.update(one.dropped for one in made)
    return dropped


def record_warnings(config: Config, tokenizer: Tokenizer) -> list[str]:
    """Return a line for each source whose first records are all dropped, or all repeat the prompt in both responses.

    Call this for a run that `check` has found valid.
    """
    found = []
    for key, sources in (("train", config.data.train), ("validation", config.data.validation or ())):
        for source in sources:
            made = list(islice(_encoded(source, tokenizer, config), FIRST_RECORDS))
            pairs = [one for part in made for one in part]
            records = f"data.{key}: {source.path}: "
            records += f"the first {len(made):,} records" if len(made) > 1 else "the first record"
            if pairs and not any(one.pair for one in pairs):
                found.append(f"{records} would be dropped{dropped_text(Counter(one.dropped for one in pairs))}")
            elif pairs and all(one.repeated for one in pairs):
                found.append(f"{records} would give pairs {REPEATED}")
    return found


def _encoded(source: Source, tokenizer: Tokenizer, config: Config) -> Iterator[list[Encoded]]:
    """Yield the encoded pairs of each usable record, including pairs that the run would drop."""
    bad, limits = BadLines(skip=config.data.on_bad_line == "skip"), Limits.of(config.data)
    for _, pairs in read_pairs(source.path, source.format, bad, source.columns):
        yield [one for one in encode_pairs(pairs, tokenizer, limits, source=0) if isinstance(one, Encoded)]
