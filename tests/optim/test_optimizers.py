"""Tests of registered optimizers: SGD against torch in several layouts, saved state, and the messages of ``check``."""

import pytest
import torch

from dpo_engine.config.run import Config
from dpo_engine.optim.optimizers import OPTIMIZERS, optimizer_problems
from dpo_engine.testing.comparison import assert_same_weights
from dpo_engine.testing.hf_training import train_with_transformers
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import load_weights, run_config, train_steps
from support.small_run import config_of, run

SIZES = [4, 3, 3]
LR, DECAY, CLIP, MOMENTUM = 1e-2, 0.5, 0.05, 0.8
SGD = {
    "optim": {"optimizer": "sgd", "optimizer_options": {"momentum": MOMENTUM, "nesterov": True}},
    "parallel": {"distributed_optimizer": False},
}


@pytest.fixture(scope="module")
def expected(tiny_hf):
    options = {"optimizer": torch.optim.SGD, "momentum": MOMENTUM, "nesterov": True, "lr": LR}
    return train_with_transformers(tiny_hf("llama"), SIZES, decay=DECAY, clip=CLIP, **options)


@pytest.mark.parametrize(
    "ranks, layout",
    [
        (1, {}),
        pytest.param(4, {"tp": 2, "pp": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"cp": 2}, marks=pytest.mark.slow),
    ],
    ids=["one rank", "tp2 pp2", "cp2 dp2"],
)
def test_sgd_matches_torch(ranks, layout, expected, tiny_hf, tmp_path):
    norms, weights = expected
    config = run_config(
        tiny_hf("llama"),
        tmp_path,
        parallel={**SGD["parallel"], **layout},
        optim={**SGD["optim"], "lr": LR, "weight_decay": DECAY, "clip_grad": CLIP, "eps": 1e-8},
    )
    results = run_ranks(train_steps, ranks, config=config, sizes=SIZES, export=str(tmp_path / "hf"), fp64=True)
    assert [step["grad_norm"] for step in results[0]["steps"]] == pytest.approx(norms, rel=1e-10)
    got, start = load_weights(tmp_path / "hf"), load_weights(tiny_hf("llama"))
    for name, value in weights.items():
        assert (got[name] - value).norm() / value.norm() < 1e-10, name
        assert (value - start[name]).norm() > 0, name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sgd_resumes_bitwise_and_in_another_layout(dtype, files, tiny_hf, tmp_path):
    model = tiny_hf("llama")

    def train_to(steps, name, ranks, **layout):
        config = config_of(
            files,
            model,
            tmp_path / name,
            data={"validation": None},
            optim={**SGD["optim"], "schedule": "constant", "lr": 0.1},
            parallel={**SGD["parallel"], **layout},
            train={"max_steps": steps},
        )
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
        result = run_ranks(run, ranks, config=config)[0]
        assert isinstance(result, dict), result

    train_to(4, "whole", 2, tp=2)
    train_to(2, "parts", 2, tp=2)
    train_to(2, "other", 2, tp=2)
    train_to(4, "parts", 2, tp=2)
    train_to(4, "other", 2, pp=2)
    whole, parts = (load_weights(tmp_path / name / "hf") for name in ("whole", "parts"))
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
    assert_same_weights(tmp_path / "other" / "hf", tmp_path / "whole" / "hf", model, 1e-5 if dtype == "fp32" else 1e-2)


def config(distributed=False, **optim):
    raw = {"model": {"path": "m"}, "data": {"train": "a"}, "train": {"output_dir": "o"}, "optim": optim}
    return Config.parse({**raw, "parallel": {"distributed_optimizer": distributed}})


@pytest.mark.parametrize(
    "optim, problem",
    [
        (
            {"optimizer": "sdg"},
            "optim.optimizer=sdg: no such optimizer; did you mean sgd? Registered optimizers: adamw and sgd (add more "
            "with plugins: [my.module])",
        ),
        (
            {"optimizer": "sgd", "optimizer_options": {"momentum": 1.0}},
            "optim.optimizer_options.momentum=1.0: must be a number of at least 0 and less than 1; the default is 0.9",
        ),
        (
            {"optimizer": "sgd", "optimizer_options": {"momentum": 0.0, "nesterov": True}},
            "optim.optimizer_options.nesterov=true: requires optim.optimizer_options.momentum > 0; set it, or remove "
            "nesterov",
        ),
        (
            {"optimizer_options": {"momentum": 0.5}},
            "optim.optimizer_options.momentum=0.5: optimizer adamw has no such option; this optimizer has no options; "
            "remove optim.optimizer_options.momentum",
        ),
        (
            {"optimizer": "sgd", "eps": 1e-6},
            "optim.eps=1e-06: applies only to optimizer adamw, but optim.optimizer is sgd; remove optim.eps, or use "
            "optim.optimizer_options",
        ),
        (
            {"distributed": True, "optimizer": "sgd"},
            "parallel.distributed_optimizer=true: Megatron's distributed optimizer supports only AdamW, but "
            "optim.optimizer is sgd; set parallel.distributed_optimizer=false",
        ),
    ],
)
def test_messages(optim, problem):
    assert optimizer_problems(config(**optim)) == [problem]


def test_valid_settings_have_no_problems():
    assert optimizer_problems(config(distributed=True, betas=(0.9, 0.95))) == []
    assert optimizer_problems(config(optimizer="sgd", optimizer_options={"momentum": 0.5})) == []
    assert OPTIMIZERS["sgd"].state == ("momentum_buffer",)


def test_groups_of_a_torch_optimizer():
    """Vectors have no weight decay, and frozen parameters are in no parameter group."""
    from dpo_engine.config.sections import OptimConfig
    from dpo_engine.optim.optimizer import _torch_optimizer

    layer, optim = torch.nn.Linear(2, 3), OptimConfig(optimizer="sgd")
    matrices, vectors = _torch_optimizer([layer], optim).param_groups
    assert (matrices["params"], matrices["wd_mult"]) == ([layer.weight], 1.0)
    assert (vectors["params"], vectors["wd_mult"]) == ([layer.bias], 0.0)
    layer.weight.requires_grad_(False)
    (only,) = _torch_optimizer([layer], optim).param_groups
    assert only["params"] == [layer.bias]
    layer.bias.requires_grad_(False)
    assert _torch_optimizer([layer], optim) is None


def test_state_must_be_declared(monkeypatch):
    from dpo_engine.errors import ConfigError
    from dpo_engine.optim.state import OwnedSlice

    monkeypatch.setitem(OPTIMIZERS, "bare", lambda groups, lr: torch.optim.SGD(groups, lr=lr))
    assert optimizer_problems(config(optimizer="bare")) == [
        "optim.optimizer=bare: is registered without its state, so a run could not resume; register it with "
        "state=(...), the names of the tensors that it keeps for each parameter"
    ]
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    rmsprop = torch.optim.RMSprop([weight], centered=True)
    rmsprop.step()
    owned = OwnedSlice(weight, 0, 3, weight, False, rmsprop, ("square_avg",))
    with pytest.raises(ConfigError) as caught:
        owned.moments()
    assert caught.value.problems == [
        "optim.optimizer: keeps the tensor grad_avg for each parameter, but is registered with state=('square_avg',); "
        "add grad_avg to state, or checkpoints would lose this tensor"
    ]
    assert set(OwnedSlice(weight, 0, 3, weight, False, rmsprop, ("square_avg", "grad_avg")).moments()) == {
        *("square_avg", "grad_avg"),
    }
