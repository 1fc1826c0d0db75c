"""Choose pairs of an evaluation to show: the worst pairs, pairs that training changed, and random pairs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

LOWEST, TO_WRONG, TO_RIGHT = "lowest reward margin", "became wrong", "became right"
RANDOM = "random"


def choose_pairs(columns: Mapping[str, np.ndarray], count: int, *, seed: int = 0) -> dict[int, str]:
    """Choose pairs to show, about the same number of each kind.

    columns  the columns of an :class:`~dpo_engine.reporting.pair_file.Evaluation`
    count    number of pairs to choose

    Each pair is chosen at most once. If a kind has too few pairs, random pairs replace the missing ones. Kinds are
    filled in this order:

    - ``lowest reward margin``: the pairs with the smallest reward margins
    - ``became wrong``: pairs whose chosen response is more likely than the rejected one under the reference, but
      less likely under the policy; the largest changes come first
    - ``became right``: pairs whose chosen response is less likely than the rejected one under the reference, but
      more likely under the policy; the largest changes come first
    - ``most changed``: the pairs whose log-probability margins under policy and reference differ the most, up or down
    - ``random``: pairs that are drawn with the random seed ``seed``

    Without a reference, only ``lowest reward margin`` and ``random`` exist.

    Returns  a mapping from the row of each chosen pair to its kind, in ascending order of rows
    """
    margin = columns["margin"]
    orders = {LOWEST: np.argsort(margin, kind="stable").tolist()}
    policy = columns["chosen_logps"] - columns["rejected_logps"]
    reference = columns["ref_chosen_logps"] - columns["ref_rejected_logps"]
    if np.isfinite(reference).all():
        change = policy - reference
        largest = [int(i) for i in np.argsort(-np.abs(change), kind="stable")]
        orders[TO_WRONG] = [i for i in largest if reference[i] > 0 > policy[i]]
        orders[TO_RIGHT] = [i for i in largest if reference[i] < 0 < policy[i]]
        orders["most changed"] = [i for i in largest if change[i] != 0]
    drawn = np.random.default_rng(seed).permutation(len(margin)).tolist()
    share = -(-count // (len(orders) + 1))
    chosen: dict[int, str] = {}
    for kind, order in orders.items():
        new = [i for i in order if i not in chosen][:share]
        chosen.update(dict.fromkeys(new[: count - len(chosen)], kind))
    chosen.update(dict.fromkeys([i for i in drawn if i not in chosen][: count - len(chosen)], RANDOM))
    return dict(sorted(chosen.items()))
