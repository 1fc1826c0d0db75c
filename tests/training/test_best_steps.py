"""Tests of saving the best evaluated steps.

Some runs are killed while they evaluate or save the second-best step. Another run is stopped after a step, before the
evaluation of the step. After a restart, each of these runs must still choose the right best steps.
"""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from dpo_engine.checkpoint.directory import steps
from dpo_engine.testing.ranks import run_ranks
from support.jobs import run_job
from support.outcomes import trajectory
from support.small_run import config_of, log_of, run, write_run


def saved(output):
    return steps(output / "checkpoints")


def values_of(output):
    return {line["step"]: line["eval/loss"] for line in log_of(output) if "eval/loss" in line}


@pytest.mark.parametrize(
    "mode, save_interval, kept, best",
    [
        pytest.param("max", 2, [3, 4, 6], 3, id="intervals without a common step before the end"),
        pytest.param("max", 0, [3, 6], 3, id="no scheduled saves", marks=pytest.mark.slow),
        pytest.param("min", 0, [3, 6], 6, id="the last step is best", marks=pytest.mark.slow),
    ],
)
def test_a_best_step_is_saved_whatever_the_save_interval(mode, save_interval, kept, best, files, tiny_hf, tmp_path):
    """The run has 6 steps and evaluates after steps 3 and 6. Its loss decreases."""
    checkpoint = {"save_interval": save_interval, "keep_best": {"metric": "loss", "mode": mode}, "export": False}
    config = config_of(files, tiny_hf("llama"), tmp_path, train={"eval_interval": 3}, checkpoint=checkpoint)
    run_ranks(run, 1, config=config)
    values = values_of(tmp_path)
    assert sorted(values) == [3, 6] and values[3] > values[6]
    assert saved(tmp_path) == kept
    assert (tmp_path / "checkpoints/best").read_text() == f"step_{best:08d}\n"
    # The checkpoint of step 3 was saved because of the evaluation of step 3. The checkpoint's copy of the metrics must
    # include this evaluation, because a run that resumes from the checkpoint needs the evaluation's metrics.
    history = (tmp_path / "checkpoints/step_00000003/metrics.jsonl").read_text().splitlines()
    assert json.loads(history[-1])["eval/loss"] == values[3]


BEST = {
    "train": {"max_steps": 8, "eval_interval": 1},
    "optim": {"lr": 1e-3, "schedule": "constant", "warmup_steps": 0},
    "checkpoint": {"save_interval": 0, "keep_best": {"metric": "loss", "mode": "max", "count": 2}, "export": False},
}
"""The loss decreases, so with ``mode: max`` the evaluations after steps 1 and 2 remain the best ones."""


@pytest.fixture(scope="module")
def whole(files, tiny_hf, tmp_path_factory):
    """Return the output directory of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    job = run_job(["train", str(write_run(folder, "run", files, tiny_hf, BEST))], 2, folder / "log")
    assert job.codes == [0, 0], job.said
    values = values_of(folder / "run")
    assert sorted(values, key=values.get)[-2:] == [2, 1] and saved(folder / "run") == [1, 2, 8]
    # Step 3 is worse than steps 1 and 2, so step 3 must not be saved. This also holds if the save of step 2 is not yet
    # complete when step 3 is evaluated.
    assert job.output[0].count("saved checkpoints/step_") == 3, job.output[0]
    return folder / "run"


def state_of(output, step, rank):
    """Return the weights and moments in a shard, without the states of random number generators."""
    shard = load_file(output / f"checkpoints/step_{step:08d}/rank_{rank:05d}.safetensors")
    return {key: tensor for key, tensor in shard.items() if not key.startswith("random|")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "phase, asynchronous", [("eval", False), ("save-shards", True), ("save-manifest", False), ("save-rename", True)]
)
def test_killed_while_the_second_best_step_is_saved(phase, asynchronous, whole, files, tiny_hf, tmp_path):
    """The metrics of the restarted run are bitwise equal to those of the uninterrupted run.

    The weights and moments in the checkpoints of the two runs are also bitwise equal.
    """
    sections = {**BEST, "checkpoint": {**BEST["checkpoint"], "async_save": asynchronous}}
    killed = write_run(tmp_path, "killed", files, tiny_hf, sections)
    job = run_job(["train", str(killed)], 2, tmp_path / "log1", fault=f"{phase}:0:2:kill", timeout_s=60)
    assert job.codes == [-signal.SIGKILL, 6], job.said
    published = phase == "save-rename"
    assert saved(tmp_path / "killed") == [1, 2][: 1 + published]
    job = run_job(["train", str(killed)], 2, tmp_path / "log2")
    assert job.codes == [0, 0] and f"resumed after step {1 + published}" in job.output[0], job.said
    assert trajectory(tmp_path / "killed") == trajectory(whole)
    assert saved(tmp_path / "killed") == [1, 2, 8]
    for step in (1, 2, 8):
        for rank in range(2):
            found, expected = (state_of(output, step, rank) for output in (tmp_path / "killed", whole))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.slow
def test_best_is_chosen_again_if_the_evaluation_was_due_when_the_run_stopped(files, tiny_hf, tmp_path):
    """The run is stopped after step 2, before step 2 is evaluated.

    The restarted run evaluates step 2, and `best` then names step 2. The restarted run is killed after its first step,
    which is step 3.
    """
    checkpoint = {"save_interval": 0, "keep_best": {"metric": "loss"}, "export": False}
    stopped = write_run(tmp_path, "run", files, tiny_hf, {**BEST, "checkpoint": checkpoint})
    job = run_job(["train", str(stopped)], 1, tmp_path / "log1", fault="step:0:2:term")
    assert job.codes == [75], job.said
    pointer = tmp_path / "run/checkpoints/best"
    assert sorted(values_of(tmp_path / "run")) == [1] and pointer.read_text() == "step_00000001\n"
    job = run_job(["train", str(stopped)], 1, tmp_path / "log2", fault="step:0:1:kill")
    assert job.codes == [-signal.SIGKILL]
    values = values_of(tmp_path / "run")
    assert values[2] < values[1] and pointer.read_text() == "step_00000002\n"
