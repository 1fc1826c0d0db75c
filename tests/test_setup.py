"""Tests of a run's setup: settings reach Megatron and torch, the reference is frozen, and norms are not decayed."""

import pytest
import torch

from dpo_engine.testing.pairs import RandomPairs
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import VOCAB, run_config

OPTIM = {
    "lr": 3e-4,
    "betas": [0.8, 0.95],
    "eps": 1e-5,
    "weight_decay": 0.25,
    "clip_grad": 0.5,
    "schedule": "linear",
    "min_lr": 1e-5,
    "warmup_steps": 2,
}


def facts(config, fp64=False):
    """Return the settings that reached the optimizer, the gradient buffers and torch.

    The result also says whether the reference is trained, and whether its log-probabilities have an autograd graph.
    """
    import numpy as np

    from dpo_engine.optim.state import owned_slices
    from dpo_engine.training.engine import Engine
    from dpo_engine.training.references import open_reference

    torch.use_deterministic_algorithms(False)
    engine = Engine.open(config, fp64=fp64)
    seed = torch.initial_seed()
    trained = engine.load_policy(total_steps=4)
    reference = open_reference(engine, trained.chunks)
    names = {parameter: name for chunk in trained.chunks for name, parameter in chunk.module.named_parameters()}
    owned = {one.main: names[one.parameter] for one in owned_slices(trained)}
    optimizer = getattr(trained.optimizer, "chained_optimizers", [trained.optimizer])[0]
    groups = trained.optimizer.param_groups
    decayed = {owned[main]: group["weight_decay"] for group in groups for main in group["params"]}
    scored = reference.logps(engine.batches(RandomPairs(2, VOCAB), np.arange(2)))
    found = {
        "decayed": decayed,
        "betas": {tuple(group["betas"]) for group in groups},
        "eps": {group["eps"] for group in groups},
        "clip_grad": optimizer.config.clip_grad,
        "buffers": {buffer.grad_dtype for chunk in trained.chunks for buffer in chunk.buffers},
        "overlap": {chunk.ddp_config.overlap_grad_reduce for chunk in trained.chunks},
        "reference trains": any(p.requires_grad for chunk in reference.chunks for p in chunk.parameters()),
        "reference has a graph": any(record.chosen.requires_grad for record in scored),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "seed": seed,
    }
    engine.close()
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["fp32", "fp64"])
def found(request, tiny_hf, tmp_path_factory):
    model = tiny_hf("qwen3", head_dim=16)
    config = run_config(
        model,
        tmp_path_factory.mktemp("facts"),
        model={"path": str(model), "dtype": "fp32"},
        optim=OPTIM,
        parallel={"distributed_optimizer": False, "overlap": True},
        train={"seed": 77},
    )
    return run_ranks(facts, 1, config=config, fp64=request.param)[0] | {"fp64": request.param}


def test_adam_gets_the_configured_settings(found):
    assert found["betas"] == {(0.8, 0.95)} and found["eps"] == {1e-5} and found["clip_grad"] == 0.5


def test_matrices_decay_and_norms_do_not(found):
    for name, decay in found["decayed"].items():
        expected = 0.0 if "norm" in name or name.endswith("bias") else 0.25
        assert decay == expected, name
    assert any("q_layernorm" in name for name in found["decayed"])


def test_gradients_are_reduced_as_configured(found):
    assert found["overlap"] == {True}
    assert found["buffers"] == {torch.float64 if found["fp64"] else torch.float32}


def test_reference_is_frozen_and_keeps_no_graph(found):
    assert not found["reference trains"] and not found["reference has a graph"]


def test_seed_and_determinism_reach_torch(found):
    assert found["deterministic"] and found["seed"] == 77


def test_bf16_gradients_are_summed_in_fp32(tiny_hf, tmp_path):
    model = tiny_hf("llama")
    config = run_config(model, tmp_path, model={"path": str(model), "dtype": "bf16"})
    assert run_ranks(facts, 1, config=config)[0]["buffers"] == {torch.float32}


def rates_and_moves(config):
    """Return the learning rates reported by four steps, and the largest change of an embedding weight in each step."""
    import numpy as np

    from dpo_engine.training.engine import Engine, batch_facts
    from dpo_engine.training.references import open_reference
    from dpo_engine.training.step import train_step

    engine = Engine.open(config)
    pairs, indices = RandomPairs(4, VOCAB), np.arange(4)
    trained = engine.load_policy(total_steps=4)
    reference = open_reference(engine, trained.chunks)
    weight = trained.chunks[0].module.embedding.word_embeddings.weight
    rates, moves = [], []
    for _ in range(4):
        before = weight.detach().clone()
        metrics = train_step(
            trained,
            reference,
            engine.batches(pairs, indices),
            engine.objective,
            known=batch_facts(pairs, indices),
            vocab_size=VOCAB,
            groups=engine.groups,
        )
        rates.append(metrics["learning_rate"])
        moves.append((weight.detach() - before).abs().max().item())
    engine.close()
    return rates, moves


def test_step_uses_the_learning_rate_it_reports(tiny_hf, tmp_path):
    """Use linear warmup over 2 of 4 steps, then linear decay.

    With betas of 0, Adam moves each weight by the learning rate, unless the gradient of the weight is 0.
    """
    optim = {"lr": 4e-4, "schedule": "linear", "warmup_steps": 2, "weight_decay": 0.0, "betas": [0.0, 0.0]}
    config = run_config(tiny_hf("llama"), tmp_path, optim=optim)
    rates, moves = run_ranks(rates_and_moves, 1, config=config)[0]
    expected = [0.0, 2e-4, 4e-4, 2e-4]
    assert rates == pytest.approx(expected)
    assert moves == pytest.approx(expected, rel=1e-3), "with betas of 0, Adam moves each weight by the learning rate"


def recomputation(config):
    """Return Megatron's settings for recomputation in the backward pass.

    The settings are the policy's granularity and modules, and the reference's granularity.
    """
    from dpo_engine.training.engine import Engine
    from dpo_engine.training.references import open_reference

    engine = Engine.open(config)
    trained = engine.load_policy(total_steps=1)
    policy = trained.chunks[0].module.config
    reference = open_reference(engine, trained.chunks).chunks[0].config
    engine.close()
    return policy.recompute_granularity, policy.recompute_modules, reference.recompute_granularity


@pytest.mark.parametrize(
    "asked, expected",
    [("none", (None, None)), ("selective", ("selective", ["mlp"])), ("full", ("full", None))],
)
def test_recomputation_reaches_megatron(asked, expected, tiny_hf, tmp_path):
    model = tiny_hf("llama")
    config = run_config(model, tmp_path, model={"path": str(model), "recompute": asked})
    granularity, modules, reference = run_ranks(recomputation, 1, config=config)[0]
    assert granularity == expected[0] and reference is None, (
        "a reference has no backward pass, so it must not recompute"
    )
    assert expected[1] is None or modules == expected[1]
