"""Fault tests: steps with non-finite values and, if `bad_steps.spike_sigma` is set, steps with spikes.

All ranks skip such a bad step, the step does not change the state, and the log names pairs of the step. Too many bad
steps in a row end the run. Non-finite weights are refused when a run saves, resumes, or loads a model.
"""

import hashlib
import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from dpo_engine.batching.plan import epoch_order
from support.jobs import run_job
from support.outcomes import LAYOUTS, trajectory

slow = pytest.mark.slow
GRADIENT, LOSS = "the gradient is not finite", "the loss is not finite"
REFERENCE = "the reference's log-probabilities are not finite"


def state_digest(trained):
    """Hash all state that a step changes: weights, fp32 main weights, both moments, and update counts."""
    from dpo_engine.model.policy import await_weights

    await_weights(trained.chunks)  # the all-gather after the last update may still be running
    found = hashlib.sha256()

    def add(tensor):
        found.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())

    for chunk in trained.chunks:
        for parameter in chunk.parameters():
            add(parameter)
    for part in getattr(trained.optimizer, "chained_optimizers", [trained.optimizer]):
        for group in part.optimizer.param_groups:
            found.update(str(group.get("step")).encode())
            for main in group["params"]:
                add(main)
                for name in ("exp_avg", "exp_avg_sq", "step"):
                    if name in part.optimizer.state.get(main, {}):
                        add(part.optimizer.state[main][name])
    return found.hexdigest()


def watched(folder):
    """Return a ``before`` hook of ``run_job``: each rank records, for each step, whether the rank's state changed."""

    def before():
        from dpo_engine.training.trainer import Trainer

        original, changed = Trainer.train_one, {}

        def train_one(self, indices):
            earlier = state_digest(self.trained)
            metrics = original(self, indices)
            changed[self.step] = state_digest(self.trained) != earlier
            (folder / f"changed_{os.environ['RANK']}.json").write_text(json.dumps(changed))
            return metrics

        Trainer.train_one = train_one

    return before


def changed(folder, ranks):
    return [json.loads((folder / f"changed_{rank}.json").read_text()) for rank in range(ranks)]


BF16 = {"model": {"dtype": "bf16"}}
PLAIN = {"parallel": {"distributed_optimizer": False}}
CASES = {
    "nan gradient on a tp rank": ("tp2", {}, "gradient:1:3:nan", GRADIENT),
    "nan gradient on a stage": ("pp2", {}, "gradient:0:3:nan", GRADIENT),
    "nan gradient on a dp rank": ("dp2", {}, "gradient:1:3:nan", GRADIENT),
    "nan gradient, plain": ("dp2", PLAIN, "gradient:1:3:nan", GRADIENT),
    "nan gradient, plain tp": ("tp2", PLAIN, "gradient:1:3:nan", GRADIENT),
    "nan gradient, overlap": ("dp2", {"parallel": {"overlap": True}}, "gradient:1:3:nan", GRADIENT),
    "nan gradient, bf16": ("dp2", BF16, "gradient:0:3:nan", GRADIENT),
    "nan gradient, bf16 plain": ("dp2", {**BF16, **PLAIN}, "gradient:0:3:nan", GRADIENT),
    "inf gradient": ("tp2 pp2", {}, "gradient:2:3:inf", GRADIENT),
    "nan loss": ("dp2", {}, "loss:0:3:nan", LOSS),
    "nan loss on one tp rank": ("tp2", {}, "loss:1:5:nan", LOSS),
    "nan loss in the last stage": ("pp2", {}, "loss:1:5:nan", LOSS),
    "inf loss of a coupled loss": ("dp2", {"loss": {"name": "aot"}}, "loss:1:3:inf", LOSS),
    "inf reference": ("dp2", {}, "reference-logps:0:3:inf", REFERENCE),
    "inf reference of a coupled loss": (
        "pp2",
        {"loss": {"name": "bco_pair", "shift": "batch"}},
        "reference-logps:1:3:inf",
        REFERENCE,
    ),
    "a reference that follows the policy": ("dp2", {"reference": {"sync_every": 3}}, "gradient:0:3:nan", GRADIENT),
    "one process": ("one", {}, "loss:0:5:nan", LOSS),
}
QUICK = ("nan gradient on a dp rank",)


def with_layout(name, sections):
    ranks, parallel = {**LAYOUTS, "one": (1, {})}[name]
    return ranks, {**sections, "parallel": {**parallel, **sections.get("parallel", {})}}


@pytest.mark.parametrize("case", [pytest.param(name, marks=() if name in QUICK else slow) for name in CASES])
def test_bad_step_is_skipped_by_all_ranks_and_changes_nothing(case, run_yaml, run_files, tmp_path):
    layout, sections, fault, says = CASES[case]
    ranks, sections = with_layout(layout, sections)
    done = run_job(["train", str(run_yaml(**sections))], ranks, tmp_path / "log", fault=fault, before=watched(tmp_path))
    assert done.codes == [0] * ranks and not done.survivors, done.said
    expected = {str(step): step != 3 for step in range(1, 13)}
    assert changed(tmp_path, ranks) == [expected] * ranks
    lines = {line["step"]: line for line in trajectory(tmp_path / "run") if "loss" in line}
    assert [float.fromhex(lines[step]["skipped_steps"]) for step in (2, 3, 12)] == [0, 1, 1]
    batch = epoch_order(24, seed=0, epoch=0)[8:12] + 1
    expected = [f"{run_files['train']}:{line}" for line in batch]
    written = json.loads((tmp_path / "run/bad_steps/step_00000003.json").read_text())
    assert [pair["place"] for pair in written["pairs"]] == expected and written["causes"][0] == says
    said = [line for line in done.output[0].splitlines() if "skipped:" in line]
    assert len(said) == 1 and f"step 3 skipped: {says}" in said[0]
    assert f"pairs in this step: {', '.join(expected[:3])} and 1 more, listed in" in said[0]


@pytest.mark.parametrize("number", [pytest.param("gradient", marks=slow), pytest.param("loss", marks=slow)])
def test_spike_is_skipped_only_if_configured(number, run_yaml, tmp_path):
    watch = {"bad_steps": {"spike_sigma": 6.0, "spike_window": 8}}
    fault = f"{number}:*:8:spike"
    for name, sections, skipped in (("asked", watch, 1), ("not", {}, 0)):
        done = run_job(["train", str(run_yaml(name, **sections))], 2, tmp_path / "log", fault=fault)
        assert done.codes == [0, 0], done.said
        last = trajectory(tmp_path / name)[-1]
        lines = [line for line in trajectory(tmp_path / name) if "loss" in line]
        assert float.fromhex(lines[-1]["skipped_steps"]) == skipped, last
        assert ("step 8 skipped: the" in done.output[0] and "spiked (loss" in done.output[0]) == bool(skipped)


@slow
@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_skipped_steps_are_remembered_after_a_restart(layout, run_yaml, tmp_path):
    ranks, parallel = LAYOUTS[layout]
    sections = {"parallel": parallel, "bad_steps": {"spike_sigma": 50.0, "spike_window": 8}}
    bad = "gradient:0:3:nan,gradient:0:7:spike"
    whole = run_job(["train", str(run_yaml("whole", **sections))], ranks, tmp_path / "log", fault=bad)
    assert whole.codes == [0] * ranks, whole.said
    harmed = str(run_yaml("harmed", **sections))
    died = run_job(["train", harmed], ranks, tmp_path / "log", fault=f"{bad},step:1:10:kill")
    assert died.codes[1] == -9
    assert run_job(["train", harmed], ranks, tmp_path / "log", before=watched(tmp_path)).codes == [0] * ranks
    assert sorted(changed(tmp_path, ranks)[0]) == sorted(map(str, range(9, 13)))
    lines = trajectory(tmp_path / "harmed")
    assert lines == trajectory(tmp_path / "whole")
    assert float.fromhex(lines[-2]["skipped_steps"]) == 2


@pytest.mark.parametrize("layout", [pytest.param("dp2", marks=slow), "pp2"])
def test_too_many_bad_steps_in_a_row_end_the_run(layout, run_yaml, tmp_path):
    ranks, parallel = LAYOUTS[layout]
    path = str(run_yaml(parallel=parallel))
    three = ",".join(f"gradient:0:{step}:nan" for step in (3, 4, 5))
    done = run_job(["train", path], ranks, tmp_path / "log", fault=three)
    assert done.codes == [5] * ranks and not done.survivors, done.said
    says = [line for line in done.said.splitlines() if not line.startswith("DPO_FAULT")]
    assert len(says) == 1 and says[0].startswith(f"step 5: {GRADIENT} (loss 0.6")
    assert "bad steps in a row: 3; the limit bad_steps.stop_after is reached" in says[0]
    assert run_job(["train", path], ranks, tmp_path / "log").codes == [0] * ranks, (
        "the run did not resume from its last checkpoint"
    )


@slow
def test_good_step_resets_the_count(run_yaml, tmp_path):
    fault = ",".join(f"gradient:0:{step}:nan" for step in (3, 4, 6, 7))
    done = run_job(["train", str(run_yaml())], 2, tmp_path / "log", fault=fault)
    assert done.codes == [0, 0] and done.output[0].count("skipped:") == 4, done.said


@slow
def test_first_loss_check_waits_for_a_good_step(run_yaml, tmp_path):
    done = run_job(["train", str(run_yaml())], 2, tmp_path / "log", fault="gradient:0:1:nan,gradient:0:2:nan")
    assert done.codes == [0, 0], done.said
    only_bad = run_yaml("short", train={"max_steps": 2}, optim={"warmup_steps": 0})
    done = run_job(["train", str(only_bad)], 2, tmp_path / "log", fault="gradient:0:1:nan,gradient:0:2:nan")
    assert done.codes == [0, 0], done.said  # a state without any update can be saved


@slow
def test_resume_from_a_state_without_an_update(run_yaml, tmp_path):
    sections = {"checkpoint": {"save_interval": 2, "async_save": False}}
    bad = "gradient:0:1:nan,gradient:0:2:nan"
    whole = run_job(["train", str(run_yaml("whole", **sections))], 2, tmp_path / "log", fault=bad)
    assert whole.codes == [0, 0], whole.said
    harmed = str(run_yaml("harmed", **sections))
    run_job(["train", harmed], 2, tmp_path / "log", fault=f"{bad},step:1:4:kill")
    assert run_job(["train", harmed], 2, tmp_path / "log").codes == [0, 0]
    assert trajectory(tmp_path / "harmed") == trajectory(tmp_path / "whole")


@slow
def test_bad_step_at_a_save_saves_finite_weights(run_yaml, tmp_path):
    path = run_yaml(checkpoint={"keep_last": 9})
    done = run_job(["train", str(path)], 2, tmp_path / "log", fault="gradient:0:4:nan")
    assert done.codes == [0, 0], done.said
    shards = list((tmp_path / "run/checkpoints/step_00000004").glob("*.safetensors"))
    assert shards and all(tensor.isfinite().all() for shard in shards for tensor in load_file(shard).values())


def poison(when, value=float("nan")):
    """Return a ``before`` hook of ``run_job`` that sets a weight of rank 1 to `value`.

    when  "save": before each save; "load": after each load
    """

    def spoil(trainer):
        if os.environ["RANK"] == "1":
            from dpo_engine.optim.state import owned_slices

            next(owned_slices(trainer.trained)).main.detach().view(-1)[0] = value

    def before():
        from dpo_engine.training import trainer

        if when == "save":
            save = trainer.Trainer.save
            trainer.Trainer.save = lambda self, **asked: (spoil(self), save(self, **asked))[1]
        else:
            load = trainer.load_checkpoint

            def loaded(found, trained, *rest, **more):
                load(found, trained, *rest, **more)
                spoil(type("It", (), {"trained": trained}))

            trainer.load_checkpoint = loaded

    return before


def test_non_finite_state_is_not_saved(run_yaml, tmp_path):
    path = str(run_yaml(train={"max_steps": 4}))
    done = run_job(["train", path], 2, tmp_path / "log", before=poison("save"))
    assert done.codes == [5, 5], done.said
    assert "step 4: the weight of " in done.said and " is not finite, so the step was not saved" in done.said
    assert not (tmp_path / "run/checkpoints/step_00000004").exists()


@slow
def test_non_finite_checkpoint_is_not_resumed(run_yaml, tmp_path):
    constant = {"schedule": "constant"}
    run_job(["train", str(run_yaml(train={"max_steps": 4}, optim=constant))], 2, tmp_path / "log")
    done = run_job(["train", str(run_yaml(optim=constant))], 2, tmp_path / "log", before=poison("load"))
    assert done.codes == [4, 4], done.said
    assert "step_00000004: the weight of " in done.said
    assert "is not finite; remove step_00000004 to resume from an older checkpoint" in done.said


@pytest.mark.parametrize("layout", [pytest.param("tp2", marks=slow), "pp2"])
def test_non_finite_weights_are_not_loaded(layout, run_yaml, tmp_path, tiny_hf):
    model = tmp_path / "model"
    shutil.copytree(tiny_hf("llama", num_hidden_layers=2), model)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    ranks, parallel = LAYOUTS[layout]
    done = run_job(["train", str(run_yaml(parallel=parallel, model={"path": str(model)}))], ranks, tmp_path / "log")
    assert done.codes == [5] * ranks
    expected = f"model.path={model}: model.safetensors: tensor {name} has values that are not finite"
    assert done.said.startswith(expected) and len(done.said.splitlines()) == 1
