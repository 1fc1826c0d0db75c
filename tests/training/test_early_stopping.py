"""Tests of early stopping, the best checkpoints and their export, and intervals that are fractions of an epoch."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file

from dpo_engine.config.run import Config
from dpo_engine.config.sections import KeepBest
from dpo_engine.errors import ConfigError
from dpo_engine.training.early_stopping import ReportedMetric, evaluations_without_gain
from dpo_engine.training.evaluation_settings import interval_problems, intervals_in_steps, metric_problems
from support.jobs import run_job
from support.small_run import log_of, write_run

LOW = KeepBest(metric="loss")
HIGH = KeepBest(metric="loss", mode="max")


@pytest.mark.parametrize(
    "by, values, since",
    [
        (LOW, [], 0),
        (LOW, [0.5, 0.4, 0.3], 0),
        (LOW, [0.5, 0.4, 0.4, 0.41], 2),
        (HIGH, [0.5, 0.4, 0.3], 2),
        (HIGH, [0.5, 0.4, 0.6], 0),
        (LOW, [0.5, 0.4999999, 0.5000001], 2),  # a difference within rounding error is not a gain
        (LOW, [None, None, 0.5, None], 1),
        (LOW, [None, None], 2),
        (HIGH, [-0.5, -0.4, -0.45], 1),
        (LOW, [0.0, 0.0], 1),
    ],
)
def test_evaluations_without_gain(by, values, since):
    assert evaluations_without_gain(values, by) == since


def test_directions_that_follow_from_the_name():
    names = {"loss": "min", "eval/rewards/margins": "max", "source/a/rewards/accuracies": "max", "sft_loss": None}
    for name, direction in names.items():
        if direction:
            assert KeepBest(metric=name).direction == direction
    assert KeepBest(metric="loss", mode="max").direction == "max"
    assert str(KeepBest(metric="sft_loss", mode="min")) == "lowest eval/sft_loss"


def small(tmp_path, **sections):
    raw = {
        "model": {"path": "m"},
        "data": {"train": "t", "validation": "v"},
        "train": {"output_dir": str(tmp_path), "eval_interval": 1, **sections.pop("train", {})},
    }
    return Config.parse({**raw, **sections})


@pytest.mark.parametrize(
    "given, says",
    [
        ("accuracy", "=accuracy: must be a mapping; write {metric: eval/rewards/accuracies, count: 1}"),
        (
            {"metric": "eval/sft_loss"},
            "={metric: eval/sft_loss}: must be given a mode, because it is not known whether low or high values of "
            "eval/sft_loss are better; add mode: min or mode: max",
        ),
    ],
)
def test_invalid_keep_best_is_refused(given, says, tmp_path):
    with pytest.raises(ConfigError) as caught:
        small(tmp_path, checkpoint={"keep_best": given})
    assert str(caught.value) == f"checkpoint.keep_best{says}"


def test_unknown_metric_is_refused_before_the_run(tmp_path):
    config = small(tmp_path, checkpoint={"keep_best": {"metric": "eval/reward/accuracies"}})
    says = (
        "checkpoint.keep_best.metric=eval/reward/accuracies: no evaluation of this run reports this metric; did you "
        "mean eval/rewards/accuracies?"
    )
    assert metric_problems(config) == [says]
    assert metric_problems(config.model_copy(update={"callbacks": {"mine": {}}})) == []
    (far,) = metric_problems(small(tmp_path, checkpoint={"keep_best": {"metric": "xyzzy", "mode": "min"}}))
    assert far.endswith("reports this metric; the documentation of metrics lists all metrics")
    for name in ("loss", "rewards/margins"):
        assert metric_problems(small(tmp_path, checkpoint={"keep_best": {"metric": name}})) == []


MIX = {"name": "mix", "losses": [{"name": "sigmoid"}, {"name": "ipo"}]}
SEVERAL = {"model": {"path": "m"}, "data": {"train": ["t/a.jsonl", "u/b.jsonl"], "validation_fraction": 0.1}}
WHEN = "the documentation of metrics says when it is reported"


@pytest.mark.parametrize(
    "metric, sections, hint",
    [
        ("grad_norm", {}, WHEN),
        ("entropy/chosen", {}, WHEN),
        ("entropy/chosen", {"logging": {"entropy": True}}, None),
        ("loss_margin/mean", {}, WHEN),
        ("loss_margin/mean", {"loss": {"name": "ipo"}}, None),
        ("loss_margin/mean", {"loss": {"name": "sigmoid", "average": True}}, None),
        ("displacement/chosen", {}, None),
        ("displacement/chosen", {"reference": {"mode": "none"}, "loss": {"name": "simpo"}}, WHEN),
        ("loss/sigmoid", {}, "did you mean eval/loss?"),
        ("loss/sigmod", {"loss": MIX}, "did you mean eval/loss/sigmoid?"),
        ("loss/ipo", {"loss": MIX}, None),
        ("loss/likelihood", {"loss": {"name": "orpo"}, "reference": {"mode": "none"}}, None),
        ("source/v/loss", {}, "did you mean eval/loss?"),
        ("source/b/loss", SEVERAL, None),
        ("source/b/rewards/margin", SEVERAL, "did you mean eval/source/b/rewards/margins?"),
    ],
)
def test_metrics_that_evaluations_of_this_run_report(metric, sections, hint, tmp_path):
    best = {"keep_best": {"metric": metric, "mode": "min"}}
    found = metric_problems(small(tmp_path, checkpoint=best, **{name: dict(given) for name, given in sections.items()}))
    says = f"checkpoint.keep_best.metric=eval/{metric}: no evaluation of this run reports this metric; {hint}"
    assert found == ([] if hint is None else [says])


def test_callback_that_does_not_add_the_metric():
    """The metrics that callbacks report are known only after the first evaluation."""
    world = SimpleNamespace(rank=lambda: 0)
    run = SimpleNamespace(engine=SimpleNamespace(groups=SimpleNamespace(world=world)))
    check = ReportedMetric(KeepBest(metric="xyzzy", mode="min"))
    with pytest.raises(ConfigError) as caught:
        check.on_eval(run, {"loss": 0.5, "abc": 1.0})
    assert str(caught.value) == (
        "checkpoint.keep_best.metric=eval/xyzzy: no evaluation of this run reports this metric; the reported metrics "
        "are eval/abc and eval/loss"
    )
    check.on_eval(run, {"loss": 0.5, "xyzzy": 1.0})


def test_interval_below_one_step(tmp_path):
    config = small(tmp_path, train={"eval_interval": "0.3epoch"}, checkpoint={"save_interval": "1epoch"})
    assert interval_problems(config, 4) == []
    assert interval_problems(config, 3) == [
        "train.eval_interval=0.3epoch: is less than one step, because an epoch has 3 steps; set at least 0.3334epoch, "
        "or 1 for every step"
    ]
    assert intervals_in_steps(config, 10) == [
        "train.eval_interval=0.3epoch: length in steps: 3",
        "checkpoint.save_interval=1epoch: length in steps: 10",
    ]
    assert intervals_in_steps(small(tmp_path, train={"eval_interval": 5}), 10) == []
    for value in ("0epoch", "5", "1/3epoch", -1, True, 0.5):
        with pytest.raises(ConfigError, match=r"must be a number of steps, or a number of epochs such as 0.25epoch"):
            small(tmp_path, train={"eval_interval": value})


NO_GAIN = {
    "train": {"eval_interval": "0.25epoch", "stop_after_no_gain": 3},
    "optim": {"lr": 1e-3, "schedule": "constant", "warmup_steps": 0},
    "checkpoint": {
        "save_interval": 1,
        "keep_best": {"metric": "loss", "mode": "max", "count": 2},
        "export": "best",
    },
}
"""The loss decreases, so with ``mode: max`` the first evaluation remains the best one."""


@pytest.fixture
def run_yaml(files, tiny_hf, tmp_path):
    def write(name, **sections):
        return write_run(tmp_path, name, files, tiny_hf, sections)

    return write


def names(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "lease")
    return {str(path.relative_to(folder)) for path in files}


def checkpoints(output):
    return sorted(path.name for path in (output / "checkpoints").iterdir() if path.is_dir())


@pytest.mark.slow
def test_early_stop_keeps_and_exports_the_best_and_resumes_elsewhere(run_yaml, tmp_path):
    """A run that is killed and resumes in another layout ends with the same results as an uninterrupted run.

    The resumed run has the same files, except for additional shards in the checkpoints of the larger layout. In both
    runs, `best` and `latest` name the same steps, and the exported weights are equal up to rounding.
    """
    long = run_yaml("long", **{**NO_GAIN, "train": {"eval_interval": "0.25epoch"}, "checkpoint": {"export": False}})
    assert run_job(["train", str(long)], 1, tmp_path / "log0").codes == [0]
    losses = {line["step"]: line["eval/loss"] for line in log_of(tmp_path / "long") if "eval/loss" in line}
    # An epoch has 22 pairs, so a quarter of an epoch has 5.5 pairs. For each multiple of 5.5 pairs, an evaluation
    # follows the first step that reaches this number of pairs. A step has at most 4 pairs.
    assert sorted(losses) == [2, 3, 5, 6, 8, 9, 11, 12]
    assert losses[2] > losses[3] > losses[5] > losses[6] > losses[8]

    whole = run_yaml("whole", **NO_GAIN)
    job = run_job(["train", str(whole)], 1, tmp_path / "log1")
    assert job.codes == [0]
    reason = "train.stop_after_no_gain: no gain in 3 evaluations (highest eval/loss)"
    assert f"the run ends after step 6 of 12: {reason}\n" in job.output[0]
    assert "best checkpoint: highest eval/loss (checkpoint.keep_best; number kept: 2)\n" in job.output[0]
    output = tmp_path / "whole"
    assert checkpoints(output) == ["step_00000002", "step_00000003", "step_00000005", "step_00000006"]
    assert (output / "checkpoints/best").read_text() == "step_00000002\n"
    assert (output / "checkpoints/latest").read_text() == "step_00000006\n"
    card = (output / "hf/README.md").read_text()
    assert "| steps | 2, with a global batch size of 4 |" in card and "| step chosen by | `highest eval/loss` |" in card
    assert "held-out, step 2" in card

    again = run_job(["export", str(whole), "--best", "--to", str(tmp_path / "again")], 1, tmp_path / "log2")
    assert again.codes == [0], again.said
    for path in (output / "hf").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name

    killed = run_yaml("killed", **NO_GAIN)
    job = run_job(["train", str(killed)], 1, tmp_path / "log3", fault="step:0:5:kill")
    assert job.codes == [-9]
    job = run_job(["train", str(killed), "parallel.tp=2"], 2, tmp_path / "log4")
    assert job.codes == [0, 0] and f"the run ends after step 6 of 12: {reason}" in job.output[0]
    other = tmp_path / "killed"
    shards = {f"checkpoints/step_0000000{step}/rank_00001.safetensors" for step in (5, 6)}
    assert names(other) - shards == names(output)
    for pointer in ("best", "latest"):
        assert (other / "checkpoints" / pointer).read_text() == (output / "checkpoints" / pointer).read_text()
    expected, found = (load_file(folder / "hf/model.safetensors") for folder in (output, other))
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name].float(), tensor.float(), rtol=1e-5, atol=1e-6)

    # A new start of the finished run changes no file except log.txt.
    before = {name: (output / name).read_bytes() for name in names(output) if name != "log.txt"}
    job = run_job(["train", str(whole)], 1, tmp_path / "log5")
    assert job.codes == [0]
    assert "nothing left to train: 6 of 12 steps are done; train.stop_after_no_gain ended the run" in job.output[0]
    assert {name: (output / name).read_bytes() for name in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("fault, judged", [("step:0:6:term", False), ("eval:0:4:term", True)])
def test_signal_at_the_evaluation_that_ends_the_run(fault, judged, run_yaml, tmp_path):
    """A signal stops the run before or during its last evaluation, which follows step 6.

    The restarted run must not train further steps.
    """
    run = run_yaml("run", **NO_GAIN)
    job = run_job(["train", str(run)], 1, tmp_path / "log1", fault=fault)
    assert job.codes == [75], job.said
    saved = json.loads((tmp_path / "run/checkpoints/step_00000006/manifest.json").read_text())["run"]
    assert (saved["unjudged"], bool(saved["stopped"])) == (not judged, judged)
    job = run_job(["train", str(run)], 1, tmp_path / "log2")
    line = "nothing left to train: 6 of 12 steps are done" if judged else "the run ends after step 6 of 12"
    assert job.codes == [0] and line in job.output[0]
    assert max(line["step"] for line in log_of(tmp_path / "run")) == 6
    assert (tmp_path / "run/checkpoints/best").read_text() == "step_00000002\n"


@pytest.mark.slow
def test_best_is_chosen_again_after_the_last_evaluation(run_yaml, tmp_path):
    """The last step is saved before its evaluation.

    If this step is the best, `best` must name it, and only the latest two checkpoints must remain.
    """
    best = {"keep_best": {"metric": "loss", "count": 1}, "save_interval": 2, "keep_last": 2, "export": "best"}
    train = {"eval_interval": 2, "max_steps": 8}
    # With a learning rate that rises from 0, the loss decreases until the end.
    run = run_yaml("run", train=train, checkpoint=best, optim={"lr": 1e-3, "warmup_steps": 7, "schedule": "constant"})
    assert run_job(["train", str(run)], 1, tmp_path / "log1").codes == [0]
    output = tmp_path / "run"
    losses = {line["step"]: line["eval/loss"] for line in log_of(output) if "eval/loss" in line}
    assert min(losses, key=losses.get) == 8
    assert (output / "checkpoints/best").read_text() == "step_00000008\n"
    assert checkpoints(output) == ["step_00000006", "step_00000008"]
    assert "| steps | 8, with a global batch size of 4 |" in (output / "hf/README.md").read_text()
    # Without keep_best, the pointer `best` is removed.
    shutil.rmtree(output / "hf")
    change = ["checkpoint.keep_best=null", "checkpoint.export=false", "train.max_steps=10"]
    change += ["checkpoint.accept_changes=[total_steps]"]
    assert run_job(["train", str(run), *change], 1, tmp_path / "log2").codes == [0]
    assert not (output / "checkpoints/best").exists()


@pytest.mark.slow
def test_metric_that_no_evaluation_reports(run_yaml, tmp_path):
    """`source/.../loss` is reported only if there are several sources. The run must end before it reads its data."""
    run = run_yaml("run", checkpoint={"keep_best": {"metric": "source/train/loss"}}, train={"eval_interval": 2})
    job = run_job(["train", str(run)], 1, tmp_path / "log")
    assert job.codes == [2]
    says = "checkpoint.keep_best.metric=eval/source/train/loss: no evaluation of this run reports this metric; did you "
    assert says in job.said and not (tmp_path / "run").exists()
    assert len(job.said.strip().splitlines()) == 1, job.said


@pytest.mark.slow
def test_interval_too_short_for_the_data(run_yaml, tmp_path):
    run = run_yaml("run", train={"eval_interval": "0.1epoch"})
    job = run_job(["train", str(run)], 1, tmp_path / "log")
    assert job.codes == [2]
    assert "train.eval_interval=0.1epoch: is less than one step, because an epoch has 6 steps; set at least" in job.said
