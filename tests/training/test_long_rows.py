"""A test of a sequence of 16,384 tokens: two context-parallel ranks compute the same step as one rank."""

import pytest

from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import VOCAB, run_config


def one_step(config):
    """Train for one step on one pair whose chosen sequence has 16,384 tokens. Return the metrics of the step."""
    import numpy as np

    from dpo_engine.testing.pairs import RandomPairs
    from dpo_engine.training.engine import Engine, batch_facts
    from dpo_engine.training.references import open_reference
    from dpo_engine.training.step import train_step

    engine = Engine.open(config, fp64=True)
    pairs, index = RandomPairs(1, VOCAB, sizes=[(8192, 8192, 4000)]), np.arange(1)
    trained = engine.load_policy(total_steps=1)
    reference = open_reference(engine, trained.chunks, pairs=[pairs])
    known, sizes = batch_facts(pairs, index), {"vocab_size": VOCAB, "groups": engine.groups}
    return train_step(trained, reference, engine.batches(pairs, index), engine.objective, known=known, **sizes)


@pytest.mark.long
@pytest.mark.slow
def test_long_pair_is_the_same_on_two_ranks(tiny_hf, tmp_path):
    """The model has one layer without a window, and one layer with a window of 256 tokens."""
    windows = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_hf("qwen2", num_hidden_layers=2, max_position_embeddings=16384, **heads, **windows)
    data = {"max_length": 16384, "max_prompt_length": None}
    found = {}
    for ranks, layout in ((1, "tree"), (2, "tree"), (2, "stacked")):
        sections = {"batch": {"layout": layout}, "train": {"micro_batch_size": 1}, "data": data}
        sections["parallel"] = {"cp": ranks, "distributed_optimizer": False}
        found[ranks, layout] = run_ranks(one_step, ranks, config=run_config(model, tmp_path, **sections))
    (expected,) = found[1, "tree"]
    assert expected["grad_norm"] > 0 and expected["loss"] > 0
    for result in (*found[2, "tree"], *found[2, "stacked"]):
        assert result == pytest.approx(expected, rel=1e-10, abs=1e-12)
