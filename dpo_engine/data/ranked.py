"""Several scored responses to one prompt, and the pairs that three rules make of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from dpo_engine.data.conversation import check_text, one_prompt
from dpo_engine.data.pair import FEW, FORMATS, JUDGED, NUMBERS, Pair, facts, fit_weight, number
from dpo_engine.data.records import BadRecord
from dpo_engine.strict_json import kind

MAX_RESPONSES = 512
"""To one prompt: the pairs that are made of them grow with their square."""


class Scored(NamedTuple):
    """A response's text and its score."""

    response: str
    score: float


Rule = Callable[[Sequence[Scored]], Iterable[tuple[Scored, Scored]]]


@FORMATS.register("ranked")
def ranked(row: dict[str, Any]) -> list[Pair]:
    """`responses` with `scores`: the best against the worst; of equal scores, the response that comes first.

    `prompt` and each response are as in "text", or as in "messages" where any of them is a list.
    """
    return _pairs(row, _extremes)


@FORMATS.register("ranked_adjacent", several=True)
def ranked_adjacent(row: dict[str, Any]) -> list[Pair]:
    """The same records: each response against those of the next lower score."""
    return _pairs(row, _adjacent)


@FORMATS.register("ranked_all", several=True)
def ranked_all(row: dict[str, Any]) -> list[Pair]:
    """The same records: each response against those of every lower score."""
    return _pairs(row, lambda best_first: itertools.combinations(best_first, 2))


def _pairs(row: dict[str, Any], rule: Rule) -> list[Pair]:
    """The pairs that ``rule`` makes of a record's responses, best first; none where all scores are equal.

    The record's weight is divided among its pairs: comparisons of the same responses are not independent, and a prompt
    should not count for more because more responses to it were written.

    Source: InstructGPT (https://arxiv.org/abs/2203.02155), section 3.5, which weighs a prompt's comparisons so.
    Raises :class:`BadRecord`.
    """
    given = facts(row)
    for name in NUMBERS:
        if name in given:
            what = "comes from the scores" if name in JUDGED else "is of a single pair"
            raise BadRecord(f"{name} {what}; leave it out of a record with responses")
    prompt, responses = _read(row)
    best_first = sorted(responses, key=lambda item: -item.score)
    matched = [(better, worse) for better, worse in rule(best_first) if better.score > worse.score]
    weight = fit_weight(given.get("weight", 1.0)) / max(1, len(matched))
    return [
        Pair(
            prompt,
            better.response,
            worse.response,
            weight=weight,
            margin=better.score - worse.score,
            chosen_reward=better.score,
            rejected_reward=worse.score,
        )
        for better, worse in matched
    ]


def _extremes(best_first: Sequence[Scored]) -> Iterable[tuple[Scored, Scored]]:
    return [(best_first[0], min(best_first, key=lambda item: item.score))]


def _adjacent(best_first: Sequence[Scored]) -> Iterable[tuple[Scored, Scored]]:
    levels = [list(equals) for _, equals in itertools.groupby(best_first, key=lambda item: item.score)]
    return (pair for better, worse in itertools.pairwise(levels) for pair in itertools.product(better, worse))


def _read(row: dict[str, Any]) -> tuple[Any, list[Scored]]:
    """The prompt, text or turns, and the scored responses. Raises :class:`BadRecord` naming the response at fault."""
    for name in ("responses", "scores"):
        _require(row, name)
        if not isinstance(row[name], list):
            raise BadRecord(f"{name} is {kind(row[name])}, not a list")
    responses, prompt = row["responses"], row.get("prompt")
    if len(responses) != len(row["scores"]):
        raise BadRecord(f"responses has {len(responses)} items and scores {len(row['scores'])}; give each its score")
    if len(responses) > MAX_RESPONSES:
        raise BadRecord(f"responses has {len(responses)} items; at most {MAX_RESPONSES} can be compared")
    if len(responses) < 2:
        raise BadRecord(f"responses has {len(responses)} items; a comparison takes at least two")
    scores = [number(f"scores[{place}]", score) for place, score in enumerate(row["scores"])]
    named = {f"responses[{place}]": response for place, response in enumerate(responses)}
    if any(isinstance(part, list) for part in (prompt, *responses)):
        prompt, texts = one_prompt(prompt, named)
    else:
        _require(row, "prompt")
        check_text("prompt", prompt)
        texts = [check_text(name, response) for name, response in named.items()]
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        same = first.setdefault(text.strip(), place)
        if scores[same] != scores[place]:
            raise BadRecord(
                f"responses[{same}] and responses[{place}] are the same but for blanks around them, with different "
                f"scores, {scores[same]:g} and {scores[place]:g}"
            )
    return prompt, [Scored(*item) for item in zip(texts, scores, strict=True)]


def _require(row: dict[str, Any], name: str) -> None:
    if name not in row:
        shown = ", ".join(itertools.islice(row, FEW)) or "no fields"
        raise BadRecord(f"field {name!r} is missing; the record has {shown}")
