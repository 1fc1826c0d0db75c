"""Tests of updates in pieces, with the optimizer states on the device or in host memory.

Such an update divides the parameters that a rank owns into pieces, and updates one piece after the other. Metrics,
weights and checkpoints must equal those of Megatron's optimizer, which updates all weights at once.
"""

from itertools import product

import pytest
import torch

from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import load_weights, run_config, train_steps
from dpo_engine.verbs.rehearse import CLOCK
from support.layouts import SIZES, world
from support.small_run import config_of, log_of, run

EXPERTS = {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LAYOUTS = {
    "dp2": {},
    "tp2 dp2": {"tp": 2},
    "cp2 dp2 two instances": {"cp": 2},
    "pp2 vpp2 dp2 overlap": {"pp": 2, "vpp": 2, "overlap": True},
    "cp2 dp2": {"cp": 2},
}


def fused(function, config, at_once=False, **arguments):
    """Call ``function``. Updates use torch's fused AdamW, as on a GPU, and a piece has at most 1,024 elements.

    at_once  whether Megatron's optimizer updates all weights at once, even if ``config`` selects updates in pieces
    """
    from dpo_engine.optim import optimizer, pieces

    pieces.PIECE = 1024
    build, replace, moved = optimizer.get_megatron_optimizer, optimizer.update_in_pieces, []
    if at_once:
        optimizer._in_pieces = lambda *settings: None

    def built(*asked, **options):
        made = build(*asked, **options)
        optimizer.fuse_adam(made)
        return made

    def replaced(made, kind):
        replace(made, kind)
        moved.append(made)
        for single in getattr(made, "chained_optimizers", [made]):
            for parameter, (group, order) in single.model_param_group_index_map.items():
                tensor = single.param_groups[group]["params"][order]
                if parameter.dtype is torch.bfloat16:
                    # The tensor has the shape of the rank's slice of the parameter, but memory for only one element.
                    assert tensor.untyped_storage().nbytes() <= 4 < tensor.nbytes
                    assert parameter.main_param is None

    optimizer.get_megatron_optimizer, optimizer.update_in_pieces = built, replaced
    found = function(config, **arguments)
    in_pieces = config.optim.states == "host" or config.optim.gradients == "bf16"
    assert len(moved) == (in_pieces and not at_once)
    return found


LIMIT = 2.5
CASES = [*product(LAYOUTS, ["fp32", "bf16"], ["fp32"]), ("dp2", "bf16", "bf16"), ("tp2 dp2", "bf16", "bf16")]
DEFAULT = ("dp2", "bf16", "bf16")


@pytest.mark.parametrize(
    "name, dtype, gradients", [pytest.param(*case, marks=() if case == DEFAULT else pytest.mark.slow) for case in CASES]
)
def test_training_is_bitwise_the_same(name, dtype, gradients, tiny_hf, tmp_path):
    results = {}
    for kind in ("at once", "host", *(["device"] if gradients == "bf16" else [])):
        states = kind if kind == "host" else "device"
        optim = {"states": states, "gradients": gradients, "clip_grad": LIMIT}
        sections = {"parallel": LAYOUTS[name], "optim": optim}
        if "instances" in name:
            sections["megatron"] = {"ddp": {"num_distributed_optimizer_instances": 2}}
        sections["model"] = {"path": str(tiny_hf("llama")), "dtype": dtype}
        config, out = run_config(tiny_hf("llama"), tmp_path, **sections), str(tmp_path / kind)
        asked = {"function": train_steps, "config": config, "sizes": SIZES, "export": out, "at_once": kind == "at once"}
        results[kind] = run_ranks(fused, world(name, LAYOUTS[name]), **asked)
    norms = [step["grad_norm"] for step in results["host"][0]["steps"]]
    assert min(norms) < LIMIT < max(norms), "gradients must be clipped in some steps, but not in all"
    expected = load_weights(tmp_path / "at once")
    for kind, result in results.items():
        assert result == results["at once"], kind
        weights = load_weights(tmp_path / kind)
        assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in expected)


def train(folder, files, model, states, steps, ranks=2, **sections):
    """Start or resume a run, with a checkpoint every two steps. Return the metrics of all its steps."""
    optim = {"schedule": "constant", "states": states, **sections.pop("optim", {})}
    more = {"train": {"max_steps": steps}, "checkpoint": {"save_interval": 2, "export": False}, **sections}
    config = config_of(files, model, folder, data={"validation": None}, optim=optim, **more)
    result = run_ranks(fused, ranks, function=run, config=config)[0]
    assert isinstance(result, dict), result
    lines = [line for line in log_of(folder) if "loss" in line]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def test_a_rank_may_own_no_parameters():
    from types import SimpleNamespace

    from dpo_engine.optim.host_states import HostAdamW

    empty = HostAdamW(SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]), model_param_group_index_map={}))
    empty.take_gradients()
    empty.step()
    empty.write_weights()
    empty.read_weights()


def test_a_run_resumes_bitwise_with_its_states_elsewhere(files, tiny_hf, tmp_path):
    where = {"files": files, "model": tiny_hf("llama", num_hidden_layers=2), "ranks": 1}
    expected = train(tmp_path / "device", states="device", steps=3, **where)
    for steps, states in ((1, "host"), (2, "device"), (3, "host")):
        moved = train(tmp_path / "moved", states=states, steps=steps, **where)
    assert moved == expected
    log = (tmp_path / "moved" / "log.txt").read_text()
    assert log.count("optimizer: states in host memory; threads per rank for an update: 1\n") == 2
    assert log.count("; host memory: ") == 2


@pytest.mark.parametrize(
    "own, asked, expected",
    [(64, None, 8), (16, None, 16), (64, 1, 8), (64, 4, 4), (4, None, 1)],
    ids=["shared cores", "own cores", "torchrun's default", "as asked", "few cores"],
)
def test_an_update_uses_the_cores_of_its_rank(own, asked, expected, monkeypatch):
    """A node has 8 GPUs and 64 cores, or only 4 cores in the last case. A rank can use ``own`` of the node's cores."""
    from dpo_engine.optim import host_states

    monkeypatch.setattr(host_states, "cores", lambda: own)
    monkeypatch.setattr(host_states.os, "cpu_count", lambda: 4 if own == 4 else 64)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked or own)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", str(asked))
    assert host_states.update_threads(gpu=True) == expected
    assert host_states.update_threads(gpu=False) == (asked or own)


MODELS = {
    "dense": ("llama", {"num_hidden_layers": 2}, {}),
    "experts": ("qwen3_moe", EXPERTS, {"parallel": {"ep": 2}}),
    "adapter": ("llama", {"num_hidden_layers": 2}, {"adapter": {"rank": 4}}),
    "frozen": ("llama", {"num_hidden_layers": 2}, {"optim": {"freeze": [".*layers.0.*", ".*embed.*"]}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_checkpoints_do_not_depend_on_where_the_states_are(kind, files, tiny_hf, tmp_path):
    """Checkpoints and resumed runs are bitwise equal, whether states are on the device or on the host.

    A run that resumes in another layout has the metrics of a run that keeps its layout, with a tolerance of 1e-5.
    """
    family, changes, sections = MODELS[kind]
    where = {"files": files, "model": tiny_hf(family, **changes), **sections}
    device, host, moved = (tmp_path / name for name in ("device", "host", "moved"))

    def saved(folder, step):
        (path,) = (folder / "checkpoints").glob(f"*{step}")
        return {key: value for key, value in load_weights(path).items() if not key.startswith("random|")}

    def same(one, other):
        return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())

    for folder, states in ((device, "device"), (host, "host"), (moved, "host")):
        train(folder, states=states, steps=2, **where)
    first = saved(device, 2)
    assert same(first, saved(host, 2))
    expected = train(device, states="device", steps=4, **where)
    assert train(host, states="host", steps=4, **where) == expected
    assert train(moved, states="device", steps=4, **where) == expected
    last = saved(device, 4)
    assert same(last, saved(host, 4)) and same(last, saved(moved, 4))
    assert any(not torch.equal(value, first[key]) for key, value in last.items() if "exp_avg_sq" in key)
    other = train(moved, states="host", steps=6, **{**where, "parallel": {}, "ranks": 1})
    for one, wanted in zip(other, train(device, states="device", steps=6, **where), strict=True):
        assert one == pytest.approx(wanted, rel=1e-5, abs=1e-5)
