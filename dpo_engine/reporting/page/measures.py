"""Compute measures of a run's newest evaluation, for the verdict and the charts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dpo_engine.errors import DataError
from dpo_engine.reporting.intervals import DIFFERENCE, SHARE, Estimate, estimates
from dpo_engine.reporting.page.run_files import RunFiles
from dpo_engine.reporting.pair_file import Evaluation, read_evaluation

BINS = np.linspace(0.5, 1.0, 11)
"""Edges of the bins of the reliability curve."""
RESAMPLES = 1000
MOST_SOURCES = 30
SMALLEST = 10
"""Minimum number of pairs for `along_length` and `against_length`."""


class Change(NamedTuple):
    """Change of the accuracy since an earlier step, on the same pairs."""

    step: int
    before: float
    difference: Estimate


class Group(NamedTuple):
    """The number of pairs of a group, and their reward accuracy."""

    pairs: int
    accuracy: Estimate


@dataclass(frozen=True)
class Measures:
    """Estimates over the pairs of an evaluation.

    earlier    function that returns the evaluation at a given step, or None if there is no readable file
    first      the run's first evaluated step; None if it is unknown
    per_token  whether the loss compares log-probabilities per token
    """

    evaluation: Evaluation
    earlier: Callable[[int], Evaluation | None] = lambda step: None
    first: int | None = None
    per_token: bool = False

    @classmethod
    def of(cls, run: RunFiles) -> Measures | None:
        """Return the measures of a run's newest readable evaluation, or None if no evaluation can be read."""

        def earlier(step: int) -> Evaluation | None:
            try:
                return read_evaluation(run.files[step])
            except (KeyError, DataError):
                return None

        first = min(run.files, default=None)
        return cls(run.evaluation, earlier, first, run.per_token) if run.evaluation else None

    @property
    def count(self) -> int:
        return len(self.evaluation)

    @property
    def step(self) -> int:
        return int(self.evaluation.facts.get("step", 0))

    def column(self, name: str) -> np.ndarray:
        return self.evaluation.columns[name]

    @cached_property
    def prompts(self) -> np.ndarray:
        """An integer id of each pair's prompt [n]. Integers are faster to compare than the hashes in ``prompt_id``."""
        return np.unique(self.column("prompt_id").astype(str), return_inverse=True)[1]

    @cached_property
    def has_reference(self) -> bool:
        return bool(np.isfinite(self.reference_margin).all())

    @cached_property
    def policy_margin(self) -> np.ndarray:
        """Log-probability of the chosen response minus that of the rejected one, under the policy [n], in nats."""
        return self.column("chosen_logps") - self.column("rejected_logps")

    @cached_property
    def reference_margin(self) -> np.ndarray:
        """Log-probability of the chosen response minus that of the rejected one, under the reference [n], in nats.

        Without a reference, all elements are nan.
        """
        return self.column("ref_chosen_logps") - self.column("ref_rejected_logps")

    @cached_property
    def length_difference(self) -> np.ndarray:
        """Tokens of chosen minus tokens of rejected [n]."""
        return self.column("chosen_tokens").astype(int) - self.column("rejected_tokens").astype(int)

    def _estimate(
        self, *values: np.ndarray, centers: Sequence[float | None], rows: np.ndarray | slice = slice(None)
    ) -> list[Estimate]:
        stacked = np.stack([value[rows] for value in values], axis=1)
        where = self.column("weight")[rows], self.prompts[rows]
        return estimates(stacked, *where, centers=centers, resamples=RESAMPLES)

    def _accuracy(self, rows: np.ndarray) -> Estimate:
        return self._estimate(self.right, centers=[SHARE], rows=rows)[0]

    @property
    def compares_tokens(self) -> bool:
        """Whether accuracies compare log-probabilities per token. They do for a per-token loss without a reference.

        The rewards of such a loss are sums over tokens, so the longer response usually has the lower reward.
        """
        return self.per_token and not self.has_reference

    @property
    def margin_name(self) -> str:
        return "reward margin per token" if self.compares_tokens else "reward margin"

    @cached_property
    def reward_margin(self) -> np.ndarray:
        """Chosen reward minus rejected reward [n]. If :attr:`compares_tokens`, both are rewards per token."""
        if not self.compares_tokens:
            return self.column("margin")
        chosen, rejected = (self.column(f"{side}_rewards") / self._lengths(side) for side in ("chosen", "rejected"))
        return chosen - rejected

    def _lengths(self, side: str) -> np.ndarray:
        return np.maximum(self.column(f"{side}_tokens"), 1)

    @cached_property
    def right(self) -> np.ndarray:
        """For each pair, 1 if its reward margin is above 0, 0.5 if it is 0, and 0 if it is below 0 [n]."""
        return 0.5 * (1 + np.sign(self.reward_margin)) if self.compares_tokens else self.column("accuracy")

    @cached_property
    def since_first(self) -> Change | None:
        """The change of the accuracy since the first evaluation.

        None if this is the first evaluation, or if the pairs of the first evaluation are unknown or different.
        """
        before = self.earlier(self.first) if self.first is not None and self.first < self.step else None
        if before is None or before.columns["id"].tolist() != self.column("id").tolist():
            return None
        other = Measures(before, per_token=self.per_token)
        difference = self._estimate(self.right - other.right, centers=[DIFFERENCE])[0]
        return Change(self.first, self._mean(other.right), difference)

    @cached_property
    def _all(self) -> dict[str, Estimate]:
        values = {"accuracy": self.right, "margin": self.reward_margin}
        values["policy"] = 0.5 * (1 + np.sign(self.policy_margin))
        if self.has_reference:
            chosen = self.column("chosen_logps") - self.column("ref_chosen_logps")
            rejected = self.column("rejected_logps") - self.column("ref_rejected_logps")
            reference = 0.5 * (1 + np.sign(self.reference_margin))
            values |= {"reference": reference, "gain": values["policy"] - reference}
            values |= {"chosen": chosen, "rejected": rejected, "fell": 0.5 * (1 - np.sign(chosen))}
        centers = {"gain": DIFFERENCE} | dict.fromkeys(("accuracy", "policy", "reference", "fell"), SHARE)
        found = self._estimate(*values.values(), centers=[centers.get(name) for name in values])
        return dict(zip(values, found, strict=True))

    @property
    def accuracy(self) -> Estimate:
        return self._all["accuracy"]

    @property
    def margin(self) -> Estimate:
        return self._all["margin"]

    @property
    def policy_ranking(self) -> float:
        """Share of pairs whose chosen response is more likely under the policy; a tie counts as half."""
        return self._all["policy"].mean

    @property
    def reference_ranking(self) -> float:
        return self._all["reference"].mean

    @property
    def ranking_gain(self) -> Estimate:
        return self._all["gain"]

    @property
    def chosen_change(self) -> Estimate:
        """Log-probability of the chosen response under the policy minus that under the reference."""
        return self._all["chosen"]

    @property
    def rejected_change(self) -> Estimate:
        return self._all["rejected"]

    @property
    def chosen_fell(self) -> Estimate:
        return self._all["fell"]

    @property
    def drift(self) -> float:
        """Mean absolute change of both responses' log-probabilities, per token, in nats."""
        return self.drift_of("chosen", "rejected")

    def drift_of(self, *sides: str) -> float:
        """Return the :attr:`drift` of one side or of both sides."""
        moved = sum(abs(self.column(f"{side}_logps") - self.column(f"ref_{side}_logps")) for side in sides)
        return self._mean(moved / sum(self.column(f"{side}_tokens") for side in sides))

    @property
    def to_right(self) -> int:
        return int(((self.reference_margin < 0) & (self.policy_margin > 0)).sum())

    @property
    def to_wrong(self) -> int:
        return int(((self.reference_margin > 0) & (self.policy_margin < 0)).sum())

    def loss_rise(self, step: int) -> Estimate | None:
        """Return the paired change of the loss since ``step``.

        None if the pairs at that step are unknown or different."""
        before = self.earlier(step)
        if before is None or before.columns["id"].tolist() != self.column("id").tolist():
            return None
        return self._estimate(self.column("loss") - before.columns["loss"], centers=[None])[0]

    @cached_property
    def equal_lengths(self) -> int:
        return int((self.length_difference == 0).sum())

    @cached_property
    def _longer_wins(self) -> float:
        weights = self.column("weight")
        return float((0.5 * (1 + np.sign(self.length_difference)) * weights).sum() / weights.sum())

    @property
    def length_rule(self) -> str:
        """Which response is chosen in more of the pairs: the ``longer`` or the ``shorter`` one.

        If longer and shorter responses are chosen equally often, the reward margins decide: ``longer`` if they favor
        longer responses on the whole, otherwise ``shorter``.
        """
        if self._longer_wins == 0.5:
            return "longer" if (self.length_difference * self.reward_margin).sum() >= 0 else "shorter"
        return "longer" if self._longer_wins > 0.5 else "shorter"

    @property
    def length_accuracy(self) -> float:
        """Share of pairs for which `length_rule` is right. A pair with responses of equal length counts as half."""
        return max(self._longer_wins, 1 - self._longer_wins)

    def _by_length(self, sign: int) -> Estimate | None:
        sign = sign if self.length_rule == "longer" else -sign
        rows = np.sign(self.length_difference) == sign
        return self._accuracy(rows) if rows.sum() >= SMALLEST else None

    @cached_property
    def along_length(self) -> Estimate | None:
        """Reward accuracy over the pairs for which `length_rule` is right; None for fewer than `SMALLEST` pairs."""
        return self._by_length(1)

    @cached_property
    def against_length(self) -> Estimate | None:
        """Reward accuracy over the pairs for which `length_rule` is wrong; None for fewer than `SMALLEST` pairs."""
        return self._by_length(-1)

    @cached_property
    def sources(self) -> dict[str, Group]:
        """A mapping from names of sources to groups, largest group first. There are at most `MOST_SOURCES` groups."""
        column = self.column("source").astype(str)
        names, place, counts = np.unique(column, return_inverse=True, return_counts=True)
        return {
            str(names[i]): Group(int(counts[i]), self._accuracy(place == i))
            for i in np.argsort(-counts, kind="stable")[:MOST_SOURCES]
        }

    @cached_property
    def probability(self) -> np.ndarray:
        """Probability that the chosen response is better, according to the reward margin [n].

        *Source*: the Bradley-Terry model, sigmoid(margin); DPO (arXiv 2305.18290) eq. 1.
        """
        return 0.5 * (1 + np.tanh(0.5 * self.reward_margin))

    @property
    def brier(self) -> float:
        """Weighted mean of the squared error of `probability`. *Source*: Brier (1950)."""
        return self._mean((1 - self.probability) ** 2)

    @property
    def confidence(self) -> float:
        """Weighted mean of each pair's confidence, which is the larger of its :attr:`probability` p and 1 - p."""
        return self._mean(np.maximum(self.probability, 1 - self.probability))

    def _mean(self, values: np.ndarray) -> float:
        weights = self.column("weight")
        return float((values * weights).sum() / weights.sum())

    @cached_property
    def _binned(self) -> tuple[np.ndarray, np.ndarray]:
        """The confidence of each pair, and the index of its bin."""
        confidence = np.maximum(self.probability, 1 - self.probability)
        return confidence, np.clip(np.searchsorted(BINS, confidence, side="right") - 1, 0, len(BINS) - 2)

    @cached_property
    def reliability(self) -> list[tuple[float, float, int]]:
        """Mean confidence, accuracy, and number of pairs, for each non-empty bin of the confidence."""
        confidence, place = self._binned
        weights, found = self.column("weight"), []
        for i in np.unique(place):
            rows = place == i
            share = weights[rows] / weights[rows].sum()
            accuracy = float(share @ self.right[rows])
            found.append((float(share @ confidence[rows]), accuracy, int(rows.sum())))
        return found

    @property
    def calibration_error(self) -> float:
        """Weighted expected calibration error over the bins. *Source*: Guo et al. (arXiv 1706.04599) eq. 3."""
        confidence, place = self._binned
        weights = self.column("weight")
        return float(np.abs(np.bincount(place, weights * (confidence - self.right))).sum() / weights.sum())


def percent(value: float) -> str:
    """Format a fraction as a percentage."""
    return f"{100 * value:.1f}%"


def signed(value: float, digits: int = 3) -> str:
    """Format a number with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def pairs_text(count: int) -> str:
    return f"{count:,} pair{'' if count == 1 else 's'}"
