"""Tests of runs of mixtures of experts: references, adapters, the rank guard, and overlap."""

import pytest
import torch

from dpo_engine.errors import NumbersError
from dpo_engine.testing.comparison import assert_same_numbers
from dpo_engine.testing.pairs import RandomPairs
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import VOCAB, run_config, train_steps
from support.family_cases import checkpoint
from support.peft_adapters import adapter_tensors

TREE = {"layout": "tree", "tokens_per_micro_batch": 80}
PLAIN = {"distributed_optimizer": False}


def train(model, output, ranks, parallel, *, fp64=True, sizes=(4, 3), **sections):
    parallel = {**parallel, **PLAIN} if fp64 else parallel
    config = run_config(model, output, parallel=parallel, **sections)
    return run_ranks(train_steps, ranks, config=config, sizes=sizes, export=str(output / "hf"), few=3, fp64=fp64)


@pytest.mark.parametrize(
    "case, ranks, parallel",
    [
        ("qwen2_moe", 2, {"ep": 2}),
        pytest.param("qwen2_moe", 2, {"tp": 2, "etp": 1}, marks=pytest.mark.slow),
        pytest.param("glm4_moe", 4, {"tp": 2, "ep": 2}, marks=pytest.mark.slow),
        pytest.param("gpt_oss", 4, {"tp": 2, "etp": 2, "ep": 2}, marks=pytest.mark.slow),
        pytest.param("qwen3_moe, some layers", 4, {"pp": 2, "ep": 2}, marks=pytest.mark.slow),
    ],
)
def test_adapters_outside_of_experts_train_in_every_layout(case, ranks, parallel, tiny_hf, tmp_path):
    model, adapter = checkpoint(tiny_hf, case), {"rank": 3, "alpha": 6, "kind": "dora"}
    (one,) = train(model, tmp_path / "one", 1, {}, adapter=adapter)
    for result in train(model, tmp_path / "many", ranks, parallel, adapter=adapter, batch=TREE):
        assert_same_numbers(result, one, 1e-10)
    got, expected = (adapter_tensors(tmp_path / name / "hf_adapter") for name in ("many", "one"))
    assert got.keys() == expected.keys() and not any("experts." in name for name in got if "shared" not in name)
    for name, value in expected.items():
        assert (got[name] - value).norm() <= 1e-9 * value.norm(), name


@pytest.mark.parametrize(
    "ranks, parallel",
    [(2, {"ep": 2}), pytest.param(4, {"tp": 2, "ep": 2}, marks=pytest.mark.slow)],
)
def test_overlapped_communication_gives_the_same_numbers(ranks, parallel, tiny_hf, tmp_path):
    model = checkpoint(tiny_hf, "qwen3_moe, some layers")
    plain = train(model, tmp_path / "a", ranks, parallel, fp64=False)[0]
    overlapped = train(model, tmp_path / "b", ranks, {**parallel, "overlap": True}, fp64=False)[0]
    assert_same_numbers(overlapped, plain, 1e-6)


@pytest.mark.parametrize("sizes", [(1, 3, 1)], ids=str)
def test_offloaded_reference_scores_ahead_with_ranks_that_have_only_dummies(sizes, tiny_hf, tmp_path):
    """With a batch of one pair, one rank has no pair, but must take part in the other rank's forward passes.

    This rank has only dummies, which are placeholders for pairs.
    """
    model = checkpoint(tiny_hf, "mixtral")
    config = offloaded(model, tmp_path, {"ep": 2})
    outcomes = run_ranks(offloaded_losses, 2, timeout_s=60, config=config, sizes=sizes)
    assert outcomes[0] == outcomes[1]
    (alone,) = run_ranks(offloaded_losses, 1, config=offloaded(model, tmp_path, {}), sizes=sizes)
    assert outcomes[0] == pytest.approx(alone, rel=1e-10)


def offloaded(model, tmp_path, parallel):
    reference = {"mode": "offloaded", "ahead": 3}
    return run_config(model, tmp_path, parallel={**parallel, **PLAIN}, reference=reference)


def offloaded_losses(config, sizes):
    """Train with an offloaded reference, which scores the pairs of all steps in the first step.

    Returns the loss of each step.
    """
    from dpo_engine.testing.pairs import global_batches
    from dpo_engine.training.engine import Engine, batch_facts
    from dpo_engine.training.references import open_reference
    from dpo_engine.training.step import train_step

    engine = Engine.open(config, fp64=True)
    pairs = RandomPairs(sum(sizes), VOCAB)
    steps = [(indices, engine.batches(pairs, indices)) for indices in global_batches(sizes)]
    trained = engine.load_policy(total_steps=len(sizes))
    done = []
    reference = open_reference(
        engine, trained.chunks, pairs=[pairs], upcoming=lambda: [batches for _, batches in steps[len(done) :]]
    )
    for indices, batches in steps:
        known = {"known": batch_facts(pairs, indices), "vocab_size": VOCAB, "groups": engine.groups}
        done.append(train_step(trained, reference, batches, engine.objective, **known)["loss"])
    engine.close()
    return done


@pytest.mark.parametrize("name", ["mlp.experts.local_experts.1.linear_fc1.weight", "mlp.router.weight"])
def test_one_flipped_bit_in_a_copy_is_found(name, tiny_hf, tmp_path):
    config = run_config(checkpoint(tiny_hf, "qwen3_moe"), tmp_path, parallel={"ep": 2})
    lines = run_ranks(flipped, 4, config=config, name=name)
    number = "3" if "local_experts" in name else None
    parameter = f"decoder.layers.1.{name}".replace("local_experts.1", f"local_experts.{5 if number else 1}")
    assert all(line == lines[0] for line in lines)
    assert lines[0].startswith(f"step 0: copies of policy {parameter} differ: ")


def flipped(config, name):
    """Flip a bit of the parameter ``name`` on rank 3. Return the text of the rank guard's error.

    The rank guard compares all copies of a parameter. The experts of rank 3 are copies of the experts of rank 1.
    """
    from dpo_engine.training.engine import Engine
    from dpo_engine.training.rank_guard import RankGuard

    engine = Engine.open(config)
    chunks = engine.load_model(config.model.path)
    guard = RankGuard({}, engine.arch, engine.groups, engine.platform.device)
    guard.check({"policy": chunks})
    if engine.groups.world.rank() == 3:
        weight = chunks[0].decoder.layers[1].get_parameter(name)
        weight.data.view(torch.int32)[0, 0] ^= 1
    try:
        guard.check({"policy": chunks})
        return "nothing found"
    except NumbersError as error:
        return str(error)
    finally:
        engine.close()
