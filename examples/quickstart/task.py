"""Three kinds of questions for the quickstart. Each question has one right answer and one plausible wrong answer.

The wrong answer is the opposite of what the question asks for: letters sorted from z to a, a list that is not reversed,
or the smallest digit. The base model can give both answers, and preference training decides which one it gives.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

LETTERS = "abcdefghijklmnopqrst"
DIGITS = "0123456789"
KINDS = ("sort", "reverse", "largest")


@dataclass(frozen=True)
class Question:
    """A prompt, its right and wrong answers, and the set of its letters or digits, regardless of their order."""

    prompt: str
    right: str
    wrong: str
    items: frozenset[str]


def ask(rng: random.Random, kind: str) -> Question:
    """Make a random question of one kind about four different letters or digits."""
    items = rng.sample(DIGITS if kind == "largest" else LETTERS, 4)
    text = " ".join(items)
    if kind == "sort":
        prompt, right, wrong = f"Sort {text} ?", sorted(items), sorted(items, reverse=True)
    elif kind == "reverse":
        prompt, right, wrong = f"Reverse {text} ?", items[::-1], items
    else:
        prompt, right, wrong = f"Largest of {text} ?", max(items), min(items)
    return Question(prompt, " ".join(right), " ".join(wrong), frozenset(items))


def stream(rng: random.Random, without: set[frozenset[str]]) -> Iterator[Question]:
    """Yield an endless stream of questions of alternating kinds. Skip questions whose ``items`` are in ``without``."""
    while True:
        for kind in KINDS:
            question = ask(rng, kind)
            while question.items in without:
                question = ask(rng, kind)
            yield question


def take(questions: Iterator[Question], count: int) -> list[Question]:
    """Return the next ``count`` distinct questions."""
    taken: dict[str, Question] = {}
    while len(taken) < count:
        question = next(questions)
        taken.setdefault(question.prompt, question)
    return list(taken.values())
