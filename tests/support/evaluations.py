"""Build evaluations in memory from values that a test chooses."""

import numpy as np

from dpo_engine.reporting.pair_file import Evaluation

FACTS = {
    "step": 4,
    "model": "m",
    "loss": {"name": "sigmoid", "beta": 0.1},
    "reference": "r",
    "dtype": "float32",
    "data": "d",
    "engine": "0",
}


def evaluation(margins, *, ids=None, facts=None, **columns):
    """Build an evaluation with one pair for each margin.

    By default, each pair has weight 1, its own prompt of 4 tokens, and responses of 8 tokens.

    ids       ids of the pairs; None: the pairs are numbered
    facts     facts that are added to ``FACTS``, or that replace facts of the same name
    columns   for each named column, the values that replace the default values
    """
    margin = np.asarray(margins, dtype=float)
    count = len(margin)
    names = [f"{i:032x}" for i in range(count)] if ids is None else ids
    made = {
        "id": np.array(names, dtype=object),
        "prompt_id": np.array([f"p{name}" for name in names], dtype=object),
        "source": np.array(["a.jsonl"] * count, dtype=object),
        "index": np.arange(count),
        "weight": np.ones(count),
        "prompt_tokens": np.full(count, 4, dtype=np.int32),
        "chosen_tokens": np.full(count, 8, dtype=np.int32),
        "rejected_tokens": np.full(count, 8, dtype=np.int32),
        "chosen_logps": -5.0 + margin,
        "rejected_logps": np.full(count, -5.0),
        "ref_chosen_logps": np.full(count, -5.0),
        "ref_rejected_logps": np.full(count, -5.0),
        "chosen_rewards": margin,
        "rejected_rewards": np.zeros(count),
        "margin": margin,
        "accuracy": 0.5 * (1 + np.sign(margin)),
        "loss": np.log1p(np.exp(-margin)),
    }
    given = {name: np.array(values, dtype=made[name].dtype) for name, values in columns.items()}
    return Evaluation(FACTS | (facts or {}), made | given)
