"""Prepare the pairs of a page's table: numbers, prompt, and both responses token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dpo_engine.reporting.page.charts import Judged
from dpo_engine.reporting.page.foreign import visible
from dpo_engine.reporting.shown_pairs import LOWEST, TO_RIGHT, TO_WRONG
from dpo_engine.reporting.token_file import TokenText

MOST_PAIRS = 500
"""Maximum number of pairs in the table, of all runs together."""
MOST_TOKENS = 300_000
"""Maximum number of tokens on the page, in all responses together.

Tokens that share a text (see :func:`tokens`) count as one token."""
LONGEST_PROMPT = 2000
LONGEST_CUT = 500
LONGEST_TOKEN = 300
"""Maximum lengths on the page, in characters: of a prompt, of text cut from the start of a prompt, and of a token."""
OLD_KINDS = {"most wrong": LOWEST, "flipped to wrong": TO_WRONG, "flipped to right": TO_RIGHT}
"""Names of kinds in files that earlier versions wrote, mapped to the current names."""
NUMBERS = ("margin", "chosen_rewards", "rejected_rewards", "chosen_tokens", "rejected_tokens")


def pair_rows(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Return the pairs whose tokens are known, for the table.

    Each pair has ``run``, ``index``, ``id``, ``kinds``, ``source``, :data:`NUMBERS`, ``policy`` and ``reference`` (the
    log-probability margins under both models, in nats), ``change`` (``policy`` minus ``reference``), ``prompt``, and
    ``cut`` (the text that was cut from the start of the prompt, or its last :data:`LONGEST_CUT` characters; None if the
    text is unknown). ``chosen`` and ``rejected`` contain the results of :func:`tokens`.
    """
    found = [(place, *item) for place, item in enumerate(judged) if item.measures and item.run.tokens]
    shown = sum(len(run.tokens) for _, run, _ in found) // 3
    kept = max(1, MOST_PAIRS // len(found)) if found else 0
    budget = MOST_TOKENS // max(1, 2 * min(shown, MOST_PAIRS))
    rows = []
    for place, run, m in found:
        where = {name: row for row, name in enumerate(m.column("id").tolist())}
        for parts in _triples(run.tokens)[:kept]:
            row = where.get(parts["chosen"].id)
            if row is None:
                continue
            known = {name: float(f"{m.column(name)[row]:.5g}") for name in NUMBERS}
            change = m.policy_margin[row] - m.reference_margin[row]
            rows.append(
                {
                    "run": place,
                    "index": int(m.column("index")[row]),
                    "id": parts["chosen"].id,
                    "kinds": _kinds(parts["chosen"].shown, m.reference_margin[row], m.policy_margin[row]),
                    "source": visible(str(m.column("source")[row]).rpartition("/")[2], 80),
                    **known,
                    "policy": _number(m.policy_margin[row], small=True),
                    "reference": _number(m.reference_margin[row], small=True),
                    "change": _number(change, small=True),
                    "prompt": visible("".join(parts["prompt"].text), LONGEST_PROMPT),
                    "cut": None if parts["prompt"].cut is None else visible(parts["prompt"].cut[-LONGEST_CUT:]),
                    **{side: tokens(parts[side], budget) for side in ("chosen", "rejected")},
                }
            )
    return rows


def _kinds(shown: str, reference: float, policy: float) -> list[str]:
    """Return the kinds of a pair: why it was selected and, if its ranking changed, "became right" or "became wrong"."""
    kinds = [visible(OLD_KINDS.get(shown, shown), 40)]
    flipped = TO_RIGHT if reference < 0 < policy else TO_WRONG if policy < 0 < reference else None
    return kinds if flipped is None or flipped in kinds else [*kinds, flipped]


def flips(judged: Sequence[Judged]) -> dict[str, int]:
    """Return how many pairs became right, and how many became wrong, in all runs with known tokens and a reference."""
    known = [m for run, m in judged if m and run.tokens and m.has_reference]
    return {TO_RIGHT: sum(m.to_right for m in known), TO_WRONG: sum(m.to_wrong for m in known)}


def _triples(texts: Sequence[TokenText]) -> list[dict[str, TokenText]]:
    """Return the prompt, chosen, and rejected text of each pair, by side. Omit pairs that lack one of these texts."""
    pairs: dict[str, dict[str, TokenText]] = {}
    for text in texts:
        pairs.setdefault(text.id, {})[text.side] = text
    return [pair for pair in pairs.values() if len(pair) == 3]


def tokens(text: TokenText, most: int) -> dict[str, Any]:
    """Return a response's tokens for the page, as a list of texts.

    most   maximum number of texts. Tokens beyond these texts are counted, but not returned

    A token without text, such as one that ends within a character, shares the text of the next token that has text.
    Tokens without text at the end of the response share an empty text. Every other text belongs to one token.

    Returns  a dictionary: ``t`` (the texts); ``v`` (the log-probability of each text under the policy); ``r`` (the
             log-probability of each text under the reference, or None if these log-probabilities are unknown);
             ``more`` (number of tokens that are not returned); ``sum`` (sum of the policy's log-probabilities over all
             scored tokens); and ``refsum`` (the same sum for the reference; None if ``r`` is None). In ``v`` and
             ``r``, a text that is not scored has the log-probability None
    """
    logps, others = np.array(text.logps, dtype=float), text.ref_logps
    reference = None if others is None else np.array(others, dtype=float)
    scored = np.array(text.scored, dtype=bool)
    groups = list(_groups(text.text))
    found: dict[str, Any] = {"t": [], "v": [], "r": None if reference is None else []}
    for start, stop in groups[:most]:
        inside = scored[start:stop]
        found["t"].append(visible("".join(text.text[start:stop]), LONGEST_TOKEN))
        for name, values in (("v", logps), ("r", reference)):
            if values is not None:
                part = values[start:stop][inside]
                found[name].append(_number(part.sum()) if len(part) else None)
    found["more"] = len(text.text) - (groups[min(most, len(groups)) - 1][1] if groups else 0)
    found["sum"] = _number(logps[scored].sum())
    found["refsum"] = None if reference is None else _number(reference[scored].sum())
    return found


def _groups(pieces: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield ranges of tokens to show together. A token without text is joined with the next token that has text.

    If the last tokens of a response have no text, these tokens form a range of their own.
    """
    start = 0
    for place, piece in enumerate(pieces):
        if piece:
            yield start, place + 1
            start = place + 1
    if start < len(pieces):
        yield start, len(pieces)


def _number(value: Any, *, small: bool = False) -> float | int | None:
    """Round a number to three decimals. Return None for a number that is not finite.

    With ``small``, round a number whose absolute value is below 0.1 to three significant digits instead.
    """
    value = float(value)
    if not np.isfinite(value):
        return None
    value = float(f"{value:.3g}") if small and abs(value) < 0.1 else round(value, 3)
    return int(value) if value == int(value) and abs(value) < 2**31 else value


def judged_differently(first: Judged, second: Judged, most: int = 50) -> tuple[list[dict[str, Any]], int]:
    """Return the pairs that two runs rank differently by their reward, largest difference of margins first.

    Returns  at most ``most`` pairs, with ``index``, ``source``, the margins ``first`` and ``second``, and ``prompt``
             (empty if its text is unknown); and the number of all pairs that the runs rank differently
    """
    if first.measures is None or second.measures is None:
        return [], 0
    a, b = first.measures, second.measures
    there = {name: row for row, name in enumerate(b.column("id").tolist())}
    rows = [(row, there[name]) for row, name in enumerate(a.column("id").tolist()) if name in there]
    found = [(i, j) for i, j in rows if a.column("accuracy")[i] != b.column("accuracy")[j]]
    found.sort(key=lambda item: -abs(a.column("margin")[item[0]] - b.column("margin")[item[1]]))
    prompts = {
        text.id: visible("".join(text.text), 200)
        for run in (first.run, second.run)
        for text in run.tokens
        if text.side == "prompt"
    }
    shown = [
        {
            "index": int(a.column("index")[i]),
            "source": visible(str(a.column("source")[i]).rpartition("/")[2], 80),
            "first": float(a.column("margin")[i]),
            "second": float(b.column("margin")[j]),
            "prompt": prompts.get(a.column("id")[i], ""),
        }
        for i, j in found[:most]
    ]
    return shown, len(found)
