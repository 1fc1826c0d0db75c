"""Tests of gradients that are summed in bf16: the dtype of buffers, and losses close to those with fp32 gradients."""

import pytest

from dpo_engine.testing.ranks import run_ranks
from support.small_run import config_of, log_of, run

STEPS = 50


def trained(config):
    """Train, and return the run's summary and the dtypes of the gradient buffers."""
    from dpo_engine.training import trainer

    found, load = [], trainer.Engine.load_policy

    def load_policy(self, **asked):
        made = load(self, **asked)
        found.extend(str(buffer.grad_data.dtype) for chunk in made.chunks for buffer in chunk.buffers)
        return made

    trainer.Engine.load_policy = load_policy
    return run(config), found


def losses(gradients, files, model, folder, *, steps, ranks=2, **parallel):
    config = config_of(
        files,
        model,
        folder / gradients,
        data={"validation": None},
        optim={"gradients": gradients, "lr": 1e-3},
        train={"max_steps": steps, "epochs": steps},
        checkpoint={"export": False},
        parallel=parallel,
    )
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bf16"})})
    summary, dtypes = run_ranks(trained, ranks, config=config)[0]
    assert isinstance(summary, dict), summary
    assert set(dtypes) == {{"fp32": "torch.float32", "bf16": "torch.bfloat16"}[gradients]}
    return [line["loss"] for line in log_of(folder / gradients) if "loss" in line]


@pytest.mark.parametrize(
    "ranks, parallel, steps",
    [
        (2, {}, 6),
        pytest.param(2, {}, STEPS, marks=pytest.mark.slow),
        pytest.param(4, {"tp": 2, "pp": 2}, 10, marks=pytest.mark.slow),
        pytest.param(4, {"tp": 2, "overlap": True}, 10, marks=pytest.mark.slow),
        pytest.param(2, {"distributed_optimizer": False}, 10, marks=pytest.mark.slow),
    ],
)
def test_training_stays_close_to_that_with_fp32_gradients(ranks, parallel, steps, files, tiny_hf, tmp_path):
    model = tiny_hf("llama", num_hidden_layers=2)
    asked = {"steps": steps, "ranks": ranks, **parallel}
    wide, narrow = (losses(gradients, files, model, tmp_path, **asked) for gradients in ("fp32", "bf16"))
    assert len(narrow) == steps and narrow != wide
    assert narrow == pytest.approx(wide, abs=0.05)
    assert sum(narrow[-3:]) < sum(narrow[:3]), "training must make progress"


def test_gradients_in_bf16_require_weights_in_bf16(files, tiny_hf, tmp_path):
    config = config_of(files, tiny_hf("llama"), tmp_path / "run", optim={"gradients": "bf16"})
    kind, message = run_ranks(run, 1, config=config)[0]
    assert kind == "ConfigError" and message.startswith(
        "optim.gradients=bf16: requires model.dtype=bf16, but model.dtype is auto (float32 on this device); set "
        "model.dtype=bf16, or remove optim.gradients"
    )
