"""Data formats for several scored responses to one prompt, with three rules for forming pairs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from dpo_engine.data.columns import facts, with_system
from dpo_engine.data.conversation import Message, check_text, split_conversations
from dpo_engine.data.pair import FEW, FORMATS, JUDGED, NUMBERS, Pair, as_text, fit_weight, number
from dpo_engine.data.records import BadRecord
from dpo_engine.strict_json import kind

FIELDS = ("prompt", "responses", "scores")
MAX_RESPONSES = 512
"""Maximum number of responses to one prompt. The limit is needed because the number of pairs can grow with the square
of the number of responses."""


class Scored(NamedTuple):
    """The text or the turns of a response, and its score."""

    response: str | Sequence[Message]
    score: float


Rule = Callable[[Sequence[Scored]], Iterable[tuple[Scored, Scored]]]


@FORMATS.register("ranked", fields=FIELDS)
def ranked(row: dict[str, Any]) -> list[Pair]:
    """`responses` with `scores`: one pair, of the best and the worst response.

    If several responses have the best or the worst score, the earliest of them is used.
    `prompt` and the responses are as in "text", or as in "messages" if any of them is a list.
    """
    return _pairs(row, _extremes)


@FORMATS.register("ranked_adjacent", several=True, fields=FIELDS)
def ranked_adjacent(row: dict[str, Any]) -> list[Pair]:
    """Records as in "ranked": pair each response with all responses of the next lower score."""
    return _pairs(row, _adjacent)


@FORMATS.register("ranked_all", several=True, fields=FIELDS)
def ranked_all(row: dict[str, Any]) -> list[Pair]:
    """Records as in "ranked": pair each response with all responses of a lower score."""
    return _pairs(row, lambda best_first: itertools.combinations(best_first, 2))


def _pairs(row: dict[str, Any], rule: Rule) -> list[Pair]:
    """Form the pairs of a record. If all scores are equal, there are no pairs.

    rule  selects the pairs from the responses, which are sorted from the highest to the lowest score

    The record's weight is divided evenly among its pairs, because comparisons of the same responses are not
    independent, and a prompt with more responses should not have more influence. If pairs are dropped later because
    they are too long, the remaining pairs share the whole weight (:attr:`Pair.divided`).

    Source: InstructGPT (https://arxiv.org/abs/2203.02155), section 3.5, where each comparison's loss is divided by the
    number of comparisons of its prompt.
    Raises :class:`BadRecord`.
    """
    given = facts(row, conversation=_is_conversation(row))
    for name in NUMBERS:
        if name in given:
            what = "is computed from scores" if name in JUDGED else "applies to a single pair"
            raise BadRecord(f"{name} {what}; remove this field from records with a field 'responses'")
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
            tools=given.get("tools"),
            template_options=given.get("template_options"),
            divided=len(matched),
        )
        for better, worse in matched
    ]


def _extremes(best_first: Sequence[Scored]) -> Iterable[tuple[Scored, Scored]]:
    return [(best_first[0], min(best_first, key=lambda item: item.score))]


def _adjacent(best_first: Sequence[Scored]) -> Iterable[tuple[Scored, Scored]]:
    levels = [list(equals) for _, equals in itertools.groupby(best_first, key=lambda item: item.score)]
    return (pair for better, worse in itertools.pairwise(levels) for pair in itertools.product(better, worse))


def _read(row: dict[str, Any]) -> tuple[Any, list[Scored]]:
    """Return the prompt (text or turns) and the scored responses. Raises :class:`BadRecord`."""
    for name in ("responses", "scores"):
        _require(row, name)
        if not isinstance(row[name], list):
            raise BadRecord(f"{name} must be a list, not {kind(row[name])}")
    prompt, *responses = with_system(row, row.get("prompt"), *row["responses"])
    if len(responses) != len(row["scores"]):
        counts = f"responses and scores differ in length: {len(responses)} and {len(row['scores'])}"
        raise BadRecord(f"{counts}; give one score per response")
    if len(responses) > MAX_RESPONSES:
        raise BadRecord(f"responses has {len(responses)} items; at most {MAX_RESPONSES} are allowed")
    if len(responses) < 2:
        raise BadRecord(f"responses has {len(responses)} item{'' if responses else 's'}; a pair needs at least 2")
    scores = [number(f"scores[{place}]", score) for place, score in enumerate(row["scores"])]
    named = {f"responses[{place}]": response for place, response in enumerate(responses)}
    if _is_conversation(row):
        prompt, turns = split_conversations(prompt, named)
        texts = [as_text(response) for response in turns]
    else:
        _require(row, "prompt")
        check_text("prompt", prompt)
        texts = [check_text(name, response) for name, response in named.items()]
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        same = first.setdefault(text.strip() if isinstance(text, str) else repr(text), place)
        if scores[same] != scores[place]:
            raise BadRecord(
                f"responses[{same}] and responses[{place}] are equal up to surrounding whitespace, but have different "
                f"scores ({scores[same]:g} and {scores[place]:g})"
            )
    return prompt, [Scored(*item) for item in zip(texts, scores, strict=True)]


def _is_conversation(row: dict[str, Any]) -> bool:
    responses = row.get("responses")
    return any(
        isinstance(part, list) for part in (row.get("prompt"), *(responses if isinstance(responses, list) else ()))
    )


def _require(row: dict[str, Any], name: str) -> None:
    if name not in row:
        shown = ", ".join(itertools.islice(row, FEW)) or "no fields"
        raise BadRecord(f"missing field {name!r} (found {shown})")
