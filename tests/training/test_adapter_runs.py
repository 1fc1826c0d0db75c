"""Tests of training with adapters: references, overlap, resuming in other layouts, evaluation, export, and bf16."""

import json
import math

import pytest
import torch
from safetensors import safe_open

from dpo_engine.config.run import Config
from dpo_engine.errors import CheckpointError
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.weights.peft import adapter_problems
from dpo_engine.reporting.pair_file import read_evaluation
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import run_config, train_steps
from support.peft_adapters import adapter_tensors, make_adapter
from support.small_run import config_of, log_of, run

NEW = {"rank": 3, "kind": "dora", "targets": ["q_proj", "v_proj", "gate_proj", "down_proj"]}
STEPS = {"schedule": "constant", "warmup_steps": 0}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def start(tiny_hf, tmp_path):
    """Return a small model and a PEFT adapter for it."""
    model = tiny_hf("llama", num_hidden_layers=2, num_key_value_heads=1)  # tp 2 splits the only key-value head
    return model, make_adapter(model, tmp_path / "start", use_dora=True)


CASES = {
    "new": (NEW, {}, 2, {"tp": 2}),
    "start": ("start", {}, 2, {"tp": 2}),
    "start, none": ("start", {"adapter": "none"}, 1, {}),
    "start, overlap": ("start", {}, 2, {"overlap": True}),
    "new, pp2 vpp2": (NEW, {}, 2, {"pp": 2, "vpp": 2}),
    "new, tp4": (NEW, {}, 4, {"tp": 4}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name.startswith("start,") else pytest.mark.slow) for name in CASES]
)
def test_shared_reference_equals_a_second_model(name, tiny_hf, tmp_path):
    """In a run with an adapter, the mode ``auto`` means a shared reference.

    A shared reference and a resident reference compute the same matrix products on the same numbers. The metrics and
    the trained adapters of the two runs are therefore bitwise equal.
    """
    adapter, reference, ranks, parallel = CASES[name]
    model = tiny_hf("llama", num_key_value_heads=2)
    if adapter == "start":
        adapter = {"path": str(make_adapter(model, tmp_path / "start", use_dora=True))}
    found = {}
    for mode in ("auto", "resident"):
        config = run_config(
            model, tmp_path / mode, adapter=adapter, parallel=parallel, reference={"mode": mode, **reference}
        )
        export = str(tmp_path / mode / "hf")
        (found[mode], *_) = run_ranks(train_steps, ranks, config=config, sizes=[4, 4, 4], export=export)
    assert found["auto"] == found["resident"]
    first = found["auto"]["steps"][0]
    if name == "start, none":
        assert abs(first["rewards/margins"]) > 1e-3
    else:
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    ours, theirs = (adapter_tensors(tmp_path / mode / "hf_adapter") for mode in found)
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_fp32_overlap_and_the_distributed_optimizer_match_fp64(tiny_hf, tmp_path):
    """With overlap, an adapter must not use its parameters before they are gathered.

    When a module is called, DDP waits for the parameters of the module itself, but not for those of its child modules.
    An adapter has no child modules, so DDP waits for all of the adapter's parameters.
    """
    model, found = tiny_hf("llama"), {}
    adapter = {"path": str(make_adapter(model, tmp_path / "start", use_dora=True))}
    for name, ranks, parallel, fp64 in (
        ("one", 1, {"distributed_optimizer": False}, True),
        ("overlap", 2, {"overlap": True}, False),
    ):
        config = run_config(
            model, tmp_path / name, adapter=adapter, parallel=parallel, loss={"name": "simpo"}, optim={"lr": 3e-3}
        )
        found[name] = run_ranks(train_steps, ranks, config=config, sizes=[4, 4, 4, 4], fp64=fp64)[0]
    for ours, expected in zip(found["overlap"]["steps"], found["one"]["steps"], strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def metrics_of(output):
    """Return the training metrics of each step, without times, speeds, and `layout_gain`."""
    left_out = ("time", "_s", "layout_gain")
    return {
        line["step"]: {name: value for name, value in line.items() if not name.endswith(left_out)}
        for line in log_of(output)
        if "loss" in line
    }


RESUMED = [
    ("tp2", 2, {"tp": 2}, 2, {"tp": 2}, 0.0),
    ("tp2 to one", 2, {"tp": 2}, 1, {}, 1e-5),
    ("tp4", 4, {"tp": 4}, 4, {"tp": 4}, 0.0),
    ("tp4 to one", 4, {"tp": 4}, 1, {}, 1e-5),
    ("one to tp2 pp2", 1, {}, 4, {"tp": 2, "pp": 2}, 1e-5),
    ("tp2 to tp4", 2, {"tp": 2}, 4, {"tp": 4}, 1e-5),
    ("dp2 to plain dp3", 2, {}, 3, {"distributed_optimizer": False}, 1e-5),
    ("pp2 to cp2", 2, {"pp": 2}, 2, {"cp": 2}, 1e-5),
]


@pytest.mark.parametrize(
    "ranks, layout, more, other, rel",
    [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, *case in RESUMED],
)
def test_resumed_run_continues_in_any_layout(ranks, layout, more, other, rel, start, files, tmp_path):
    model, adapter = start
    sections = {"adapter": {"path": str(adapter)}, "optim": STEPS}

    def trained(ranks, layout, output, steps):
        config = config_of(files, model, output, **sections, parallel=layout, train={"max_steps": steps, "epochs": 9})
        return run_ranks(run, ranks, config=config)[0]

    trained(ranks, layout, tmp_path / "whole", 4)
    trained(ranks, layout, tmp_path / "parts", 2)
    assert trained(more, other, tmp_path / "parts", 4)["step"] == 4
    whole, parts = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts")
    assert whole.keys() == parts.keys() == {1, 2, 3, 4}
    for step, metrics in whole.items():
        for name, value in metrics.items():
            if not name.endswith(("accuracies", "chosen_fell", "accuracies_per_token")):
                size = max(1.0, abs(metrics["logps/chosen"])) if rel else 0.0
                assert parts[step][name] == pytest.approx(value, rel=rel, abs=rel * size), (step, name)
    ours, expected, before = (
        adapter_tensors(path) for path in (tmp_path / "parts/hf_adapter", tmp_path / "whole/hf_adapter", adapter)
    )
    for name, value in expected.items():
        moved = (value - before[name]).norm()
        assert moved > 0
        assert (ours[name] - value).norm() <= 50 * rel * moved, name


def test_run_with_a_new_adapter(start, files, tmp_path):
    """After training, a resume with other adapter settings is refused. Evaluation and export agree with the run."""
    from dpo_engine.verbs.evaluate import evaluate
    from dpo_engine.verbs.export import export

    model, _ = start
    sections = {"adapter": NEW, "optim": STEPS, "train": {"max_steps": 3}}
    config = config_of(files, model, tmp_path / "out", **sections)
    (summary,) = run_ranks(run, 1, config=config)
    log = log_of(tmp_path / "out")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)

    manifest = json.loads((tmp_path / "out/checkpoints/step_00000003/manifest.json").read_text())
    assert manifest["identity"]["adapter"]["rank"] == 3
    with safe_open(tmp_path / "out/checkpoints/step_00000003/rank_00000.safetensors", "pt") as shards:
        saved = {key.split("|")[1] for key in shards.keys() if key.startswith(("main|", "exp_avg|"))}  # noqa: SIM118
    assert saved and all("_adapter." in name for name in saved)

    for change, says in (
        ({"adapter": {**NEW, "rank": 4}}, "adapter.rank was 3 and is now 4; the saved weights do not fit"),
        ({"adapter": {**NEW, "alpha": 8.0}}, "adapter.alpha was 32.0 and is now 8.0; the saved weights do not fit"),
    ):
        other = config_of(files, model, tmp_path / "out", **{**sections, **change})
        (refused,) = run_ranks(run, 1, config=other)
        assert refused[0] == CheckpointError.__name__ and says in refused[1]
    plain = config_of(files, model, tmp_path / "out", **{**sections, "adapter": {}})
    plain = plain.model_copy(update={"adapter": None})
    (refused,) = run_ranks(run, 1, config=plain)
    assert refused[0] == CheckpointError.__name__ and "and is now null; the saved weights do not fit" in refused[1]

    (found,) = run_ranks(evaluate, 1, config=config, say=print)
    assert found["groups"][0]["loss"] == pytest.approx(summary["eval"]["loss"], rel=1e-6)
    (before,) = run_ranks(evaluate, 1, config=config, step=0, say=print)
    assert before["groups"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    run_ranks(export, 1, config=config, to=str(tmp_path / "again"), say=print)
    ours, theirs = (adapter_tensors(tmp_path / name) for name in ("again_adapter", "out/hf_adapter"))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert "library_name: peft" in (tmp_path / "out/hf_adapter/README.md").read_text()
    assert {path.name for path in (tmp_path / "out/hf_adapter").iterdir()} > TOKENIZER
    for name in TOKENIZER:
        assert (tmp_path / "out/hf_adapter" / name).read_bytes() == (tmp_path / "out/hf" / name).read_bytes()


def test_stored_reference_has_the_adapter_that_training_starts_from(start, files, tmp_path):
    """A reference with the adapter and one without it share a store, but must not read each other's values."""
    model, path = start
    for adapter in ("start", "none"):
        logs = {}
        for mode in ("shared", "stored"):
            reference = {"mode": mode, "adapter": adapter}
            if mode == "stored":
                reference |= {"store": str(tmp_path / "store"), "verify": 0}
            config = config_of(
                files,
                model,
                tmp_path / adapter / mode,
                adapter={"path": str(path)},
                reference=reference,
                optim=STEPS,
                train={"max_steps": 1},
            )
            run_ranks(run, 1, config=config)
            logs[mode] = metrics_of(tmp_path / adapter / mode)[1]
        assert logs["stored"]["loss"] == pytest.approx(logs["shared"]["loss"], rel=1e-6)
        assert (abs(logs["stored"]["rewards/margins"]) < 1e-6) == (adapter == "start")
        again = Config.load(tmp_path / adapter / "stored" / "config.yaml")
        assert again.adapter == config.adapter and adapter_problems(again.adapter, read_architecture(model)) == []
        told = read_evaluation(tmp_path / adapter / "stored" / "eval" / "step_00000001.parquet").facts
        assert told["model"] == f"{model} with {path}"
        assert told["reference"] == (told["model"] if adapter == "start" else str(model))


@pytest.mark.slow
def test_reference_that_is_copied_from_the_policy(start, files, tmp_path):
    """After each copy, policy and reference are equal. A resumed run restores the copied reference."""
    model, path = start
    reference = {"sync_every": 2, "sync_alpha": 1.0}

    def trained(output, steps, layout, ranks):
        config = config_of(
            files,
            model,
            output,
            adapter={"path": str(path)},
            reference=reference,
            optim=STEPS,
            parallel=layout,
            train={"max_steps": steps, "epochs": 9},
        )
        run_ranks(run, ranks, config=config)

    trained(tmp_path / "whole", 4, {"tp": 2}, 2)
    trained(tmp_path / "parts", 3, {"tp": 2}, 2)
    trained(tmp_path / "parts", 4, {"tp": 2}, 2)
    whole, parts = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts")
    for step in (1, 3):
        assert whole[step]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(whole[4]["loss"] - math.log(2)) > 1e-4
    assert whole == parts


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 2}], ids=str)
def test_bf16_stays_near_fp32(layout, start, tmp_path):
    model, path = start
    found = {}
    for dtype in ("fp32", "bf16"):
        config = run_config(
            model,
            tmp_path / dtype,
            model={"path": str(model), "dtype": dtype},
            adapter={"path": str(path)},
            parallel=layout,
        )
        ranks = layout.get("tp", 1) * layout.get("pp", 1)
        found[dtype] = run_ranks(
            train_steps, ranks, config=config, sizes=[4, 4, 4], export=str(tmp_path / dtype / "hf")
        )
    for ours, expected in zip(found["bf16"][0]["steps"], found["fp32"][0]["steps"], strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], abs=2e-2)
    moved = adapter_tensors(tmp_path / "bf16/hf_adapter")
    assert all(value.dtype is torch.float32 for value in moved.values())
