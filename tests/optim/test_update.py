"""Tests of updates against AdamW's formula (clipping, betas and weight decay), and of the reported learning rate."""

import numpy as np
import pytest

from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import run_config

LR, DECAY, BETAS, EPS, LIMIT = 1e-2, 0.5, (0.8, 0.95), 1e-8, 1.0


def updated(config, fp64, scale, fused=False):
    """Update once. The gradients are the weights, scaled to the norm ``scale``.

    Returns the reported norm, and each parameter before and after the update.
    """
    from dpo_engine.optim.optimizer import fuse_adam, update
    from dpo_engine.optim.state import adam_step, set_adam_step
    from dpo_engine.training.engine import Engine

    engine = Engine.open(config, fp64=fp64)
    trained = engine.load_policy(total_steps=4)
    if fused:
        fuse_adam(trained.optimizer)
        set_adam_step(trained, 0)  # create the optimizer state now, as when a checkpoint is loaded
    named = [(name, p) for chunk in trained.chunks for name, p in chunk.named_parameters()]
    before = {name: p.detach().double().clone() for name, p in named}
    size = sum(float(value.square().sum()) for value in before.values()) ** 0.5
    for name, parameter in named:
        parameter.main_grad.copy_(before[name] * scale / size)
    norm = update(trained, lambda norm: False)
    assert adam_step(trained) == 1
    after = {name: p.detach().double() for name, p in named}
    return norm, {name: (before[name].numpy(), after[name].numpy()) for name in before}


@pytest.mark.parametrize("scale", [0.5, 4.0], ids=["below the limit", "clipped"])
@pytest.mark.parametrize("fp64, fused", [(False, False), (False, True), (True, False)], ids=["fp32", "fused", "fp64"])
def test_update_is_that_of_adamw(fp64, fused, scale, tiny_hf, tmp_path):
    optim = {"lr": LR, "weight_decay": DECAY, "betas": list(BETAS), "eps": 1e-3, "clip_grad": LIMIT}
    parallel = {"distributed_optimizer": not fp64}
    config = run_config(tiny_hf("llama"), tmp_path, optim=optim, parallel=parallel)
    ((norm, parameters),) = run_ranks(updated, 1, config=config, fp64=fp64, scale=scale, fused=fused)
    assert norm == pytest.approx(scale, rel=1e-6)
    size = sum(float(np.square(before).sum()) for before, _ in parameters.values()) ** 0.5
    assert any(before.ndim == 1 for before, _ in parameters.values())
    for name, (before, after) in parameters.items():
        gradient = before * scale / size * min(1.0, LIMIT / (norm + 1e-6))
        first, second = (1 - BETAS[0]) * gradient, (1 - BETAS[1]) * gradient**2
        step = first / (1 - BETAS[0]) / (np.sqrt(second / (1 - BETAS[1])) + 1e-3)
        kept = 1 - LR * DECAY if before.ndim > 1 else 1.0
        expected = before * kept - LR * step
        np.testing.assert_allclose(after, expected, rtol=2e-5, atol=1e-7, err_msg=name)


def two_updates(config):
    from dpo_engine.optim.optimizer import update
    from dpo_engine.training.engine import Engine

    engine = Engine.open(config)
    trained = engine.load_policy(total_steps=4)
    (parameter, *_) = [p for chunk in trained.chunks for name, p in chunk.named_parameters() if "layernorm" in name]
    values = [parameter.detach().double().numpy().copy()]
    for sign in (1.0, -0.5):
        for chunk in trained.chunks:
            for p in chunk.parameters():
                p.main_grad.fill_(sign)
        update(trained, lambda norm: False)
        values.append(parameter.detach().double().numpy().copy())
    return values


def test_moments_decay_with_their_own_beta(tiny_hf, tmp_path):
    """Compare two successive updates with the formula. With swapped betas, the second update would not match."""
    optim = {"lr": LR, "betas": list(BETAS), "eps": EPS, "clip_grad": 0.0}
    (values,) = run_ranks(two_updates, 1, config=run_config(tiny_hf("llama"), tmp_path, optim=optim))
    first, second, weight = 0.0, 0.0, values[0]
    for number, gradient in enumerate((1.0, -0.5), 1):
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        corrected = first / (1 - BETAS[0] ** number), second / (1 - BETAS[1] ** number)
        weight = weight - LR * corrected[0] / (corrected[1] ** 0.5 + EPS)
        np.testing.assert_allclose(values[number], weight, rtol=1e-5)


def reported_rates(config):
    from dpo_engine.testing.trajectory import train_steps

    return [step["learning_rate"] for step in train_steps(config, [2] * 4)["steps"]]


def test_reported_learning_rate_is_the_one_that_was_used(tiny_hf, tmp_path):
    optim = {"lr": LR, "schedule": "linear", "warmup_steps": 2}
    (rates,) = run_ranks(reported_rates, 1, config=run_config(tiny_hf("llama"), tmp_path, optim=optim))
    assert rates == pytest.approx([0.0, LR / 2, LR, LR / 2])
