"""Tests of gathering the updated weights during the step after an update.

All code that reads weights must get the updated weights.
"""

from functools import partial

import pytest

from dpo_engine.optim import optimizer
from dpo_engine.testing.comparison import assert_same_weights
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.verbs.rehearse import CLOCK
from support.small_run import config_of, log_of, run


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """Use small buckets. A tiny model then has many buckets, and the output layer's bucket is gathered last."""
    config = optimizer.DistributedDataParallelConfig
    monkeypatch.setattr(optimizer, "DistributedDataParallelConfig", partial(config, bucket_size=20_000))


def start(files, model, output, ranks, *, overlap, max_steps, tp=1, dtype="fp32", guard=0, **sections):  # noqa: F811
    config = config_of(
        files,
        model,
        output,
        data={"validation": None},
        optim={"schedule": "constant"},
        train={"max_steps": max_steps, "guard_interval": guard},
        parallel={"tp": tp, "overlap": overlap},
        checkpoint={"save_interval": 2},
        **sections,
    )
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    results = run_ranks(run, ranks, config=config)
    assert isinstance(results[0], dict), results[0]


@pytest.mark.parametrize(
    "ranks, sections",
    [
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(2, {"guard": 1}, marks=pytest.mark.slow),
        pytest.param(4, {"tp": 2, "batch": {"layout": "tree"}}, marks=pytest.mark.slow),
        pytest.param(2, {"reference": {"sync_every": 1, "sync_alpha": 0.5}}, marks=pytest.mark.slow),
        pytest.param(2, {"reference": {"mode": "offloaded", "ahead": 1}}, marks=pytest.mark.slow),
        pytest.param(2, {"dtype": "bf16"}, marks=pytest.mark.slow),
        pytest.param(2, {"loss": {"name": "aot"}}, marks=pytest.mark.slow),
    ],
    ids=[
        "dp2",
        "guarded",
        "tp2 dp2, trees",
        "a reference updated after each step",
        "a reference that is swapped in",
        "bf16",
        "two passes",
    ],
)
def test_overlapped_run_matches_one_without_overlap(ranks, sections, files, tiny_hf, tmp_path):  # noqa: F811
    """Each run saves, resumes and exports. It does not evaluate, because an evaluation would complete the gather."""
    model = tiny_hf("llama")
    for name, overlap in (("expected", False), ("got", True)):
        for max_steps in (3, 5):
            start(files, model, tmp_path / name, ranks, overlap=overlap, max_steps=max_steps, **sections)
    expected, got = (
        [{key: value for key, value in line.items() if key not in CLOCK} for line in log_of(tmp_path / name)]
        for name in ("expected", "got")
    )
    rel = 2e-2 if "dtype" in sections else 1e-5  # overlap changes the order of sums
    assert len(got) == len(expected) == 5
    for one, other in zip(got, expected, strict=True):
        assert one == pytest.approx(other, rel=rel, abs=rel)
    assert_same_weights(tmp_path / "got" / "hf", tmp_path / "expected" / "hf", model, rel)
