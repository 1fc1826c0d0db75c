"""Fault tests: one rank differs from the others in settings, software or files, or a bit of its weights flips.

All ranks exit together, and report each difference in one line.
"""

import os
import shutil
import subprocess
import sys
from functools import partial

import pytest

from support.jobs import run_job
from support.small_run import write_pairs
from support.tiny_tokenizers import CHATML, byte_level

slow = pytest.mark.slow
SECONDS = 20
"""Every rank must exit within this many seconds, which is far less than the timeout of a collective operation."""


def only_rank(rank, work):
    """Return a job's ``before`` hook that calls ``work`` on one rank."""

    def before():
        if os.environ["RANK"] == str(rank):
            work()

    return before


def lines_of(job, code):
    """Check that all ranks exited in time with the exit code ``code``. Return the lines that they wrote to stderr."""
    assert job.codes == [code] * len(job.codes) and not job.survivors, job.said
    assert max(job.seconds) < SECONDS, job.seconds
    return job.said.splitlines()


def line_of(job, code):
    """Check the ranks as :func:`lines_of` does, and check that stderr has one short line. Return the line."""
    (line,) = lines_of(job, code)
    assert len(line) < 260
    return line


ALIKE = "start all ranks with the same run file and overrides"


@pytest.mark.parametrize(
    "own, says",
    [
        pytest.param({"loss.beta": 0.2}, "loss.beta: 0.1 on ranks 0-1 and 3, 0.2 on rank 2", id="config"),
        pytest.param({"data.seed": 7}, "data.seed: 0 on ranks 0-1 and 3, 7 on rank 2", id="seed", marks=slow),
        pytest.param({"parallel.tp": 1}, "parallel.tp: 2 on ranks 0-1 and 3, 1 on rank 2", id="layout"),
        pytest.param(
            {"parallel.tp": 1, "parallel.pp": 2},
            "parallel.tp: 2 on ranks 0-1 and 3, 1 on rank 2",
            id="pp in place of tp",
            marks=slow,
        ),
    ],
)
def test_different_setting_is_refused(own, says, run_yaml, tmp_path):
    run = run_yaml(parallel={"tp": 2}, loss={"beta": 0.1})
    changed = [f"{key}={value}" for key, value in own.items()]
    lines = lines_of(run_job(["train", str(run)], 4, tmp_path / "log", own={2: changed}), 2)
    assert lines[0] == f"{says}; {ALIKE}" and len(lines) == len(own)
    assert not (tmp_path / "run").exists(), "no rank may create the output directory"


@slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("ranks, told", [(2, 4), (3, 2)], ids=["more", "fewer"])
def test_different_number_of_ranks_is_refused(rank, ranks, told, run_yaml, tmp_path):
    before = only_rank(rank, lambda: os.environ.update(WORLD_SIZE=str(told)))
    lines = lines_of(run_job(["train", str(run_yaml())], ranks, tmp_path / "log", before=before), 2)
    assert lines[0].startswith("number of ranks: ") and f"{told} on rank {rank}" in lines[0]
    assert lines[0].endswith("; start all ranks of a job with the same world size")


def old_version():
    from dpo_engine import installation, version

    # `installation` has its own copy of the version, so `check_installation` does not see the change below.
    assert installation.__version__ == version.__version__
    version.__version__ = "0.0.9"


@pytest.mark.parametrize(
    "work, says",
    [
        pytest.param(old_version, "dpo-engine: 0.1.0 (sources ", id="code version", marks=slow),
        pytest.param(
            lambda: os.environ.update(NCCL_ALGO="Ring"),
            "NCCL_ALGO: not set on rank 0, Ring on rank 1; it affects the order of additions",
            id="switch",
        ),
        pytest.param(
            lambda: os.environ.update(NVTE_FUSED_ATTN="0"),
            "NVTE_FUSED_ATTN: not set on rank 0, 0 on rank 1; it selects Transformer Engine's kernels",
            id="switch by prefix",
            marks=slow,
        ),
    ],
)
def test_different_software_or_environment_is_refused(work, says, run_yaml, tmp_path):
    line = line_of(run_job(["train", str(run_yaml())], 2, tmp_path / "log", before=only_rank(1, work)), 2)
    assert line.startswith(says) and line.endswith(" on all nodes")


@pytest.fixture
def two_nodes(run_files, tmp_path):
    """Create folders for two nodes. Each folder has a copy of the tokenizer and the pairs, with the same file names."""
    places = [tmp_path / name for name in ("node0", "node1")]
    for place in places:
        place.mkdir()
        byte_level(place / "tok")
        shutil.copy(run_files["train"], place / "pairs.jsonl")
    return places


def on_two_nodes(places, run, log, verb="train"):
    """Run a job in which ranks 0 and 1 have different working directories, as on two nodes."""
    return run_job([verb, str(run)], 2, log, before=lambda: os.chdir(places[int(os.environ["RANK"])]))


def test_different_dataset_is_refused(two_nodes, run_yaml, tmp_path):
    write_pairs(two_nodes[1] / "pairs.jsonl", 20)
    run = run_yaml(data={"train": "pairs.jsonl"}, model={"tokenizer": "tok"})
    line, plan = lines_of(on_two_nodes(two_nodes, run, tmp_path / "log"), 3)
    assert line.startswith("data.train: 24 pairs (") and " on rank 0, 20 pairs (" in line and plan.startswith("plan: ")
    assert line.endswith("on rank 1; the files differ between nodes, or a node sees an old version; copy them again")


@slow
def test_different_tokenizer_is_refused(two_nodes, run_yaml, tmp_path):
    byte_level(two_nodes[1] / "tok", template=CHATML + " ")
    run = run_yaml(data={"train": "pairs.jsonl"}, model={"tokenizer": "tok"})
    line = line_of(on_two_nodes(two_nodes, run, tmp_path / "log"), 2)
    assert line.startswith("tokenizer: ") and line.endswith(
        "the tokenizer's files differ between nodes; copy them again"
    )


@slow
def test_different_checkpoint_is_refused(two_nodes, run_yaml, tmp_path):
    """Each node has its own output directory."""
    run = run_yaml(train={"output_dir": "out"}, optim={"schedule": "constant"})
    for place, seed in zip(two_nodes, (1, 2), strict=True):
        asked = ["train", str(run), f"data.seed={seed}"]
        job = run_job(asked, 1, tmp_path / "log", before=partial(os.chdir, place))
        assert job.codes == [0], job.said
    line = line_of(on_two_nodes(two_nodes, run, tmp_path / "log"), 2)
    assert line.startswith("train.output_dir=out: is not the same directory for all ranks: ")
    line = line_of(on_two_nodes(two_nodes, run, tmp_path / "log", "eval"), 4)
    assert line.endswith("ranks read different manifests; train.output_dir must be on storage shared by all nodes")


@slow
def test_checkpoint_that_one_node_does_not_see_yet(two_nodes, run_yaml, tmp_path):
    """The command must refuse the checkpoint, and must neither skip nor remove it."""
    run = run_yaml(train={"output_dir": "out"})
    job = run_job(["train", str(run)], 1, tmp_path / "log", before=partial(os.chdir, two_nodes[0]))
    assert job.codes == [0], job.said
    shutil.copytree(two_nodes[0] / "out", two_nodes[1] / "out")
    shutil.rmtree(two_nodes[1] / "out/checkpoints/step_00000012")
    line = line_of(on_two_nodes(two_nodes, run, tmp_path / "log", "eval"), 4)
    assert line.startswith("out/checkpoints/step_00000012: rank 1 cannot see this checkpoint; train.output_dir must ")
    assert (two_nodes[0] / "out/checkpoints/step_00000012").is_dir()


def flips_a_bit(parameter, at_step):
    """Return a ``before`` hook of ``run_job``: rank 1 flips a bit in its copy of a parameter after the given step."""

    def before():
        import torch

        from dpo_engine.training import trainer

        train_one = trainer.Trainer.train_one

        def harmed(self, indices):
            metrics = train_one(self, indices)
            if self.step == at_step:
                (chunk,) = self.trained.chunks
                values = chunk.module.get_parameter(parameter).data
                values.view({2: torch.int16, 4: torch.int32}[values.element_size()]).view(-1)[0] ^= 1
            return metrics

        trainer.Trainer.train_one = harmed

    return only_rank(1, before)


MATRIX, NORM = "decoder.layers.0.mlp.linear_fc2.weight", "decoder.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "parallel, parameter, at_step, dtype",
    [
        pytest.param({"distributed_optimizer": False}, MATRIX, 5, "fp32", id="dp2 plain"),
        pytest.param({"tp": 2}, NORM, 5, "fp32", id="tp2 norm", marks=slow),
        pytest.param({"distributed_optimizer": True}, MATRIX, 6, "bf16", id="dp2 distributed bf16", marks=slow),
    ],
)
def test_different_weights_of_replicas_are_found_at_the_interval(
    parallel, parameter, at_step, dtype, run_yaml, tmp_path
):
    run = run_yaml(parallel=parallel, train={"guard_interval": 3})
    asked = ["train", str(run), f"model.dtype={dtype}"]
    line = line_of(run_job(asked, 2, tmp_path / "log", before=flips_a_bit(parameter, at_step)), 5)
    assert line.startswith("step 6: copies of policy decoder.layers.") and " on rank 0, " in line
    assert " on rank 1; restart from the last checkpoint" in line
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert saved == ["step_00000004"], "the changed weights must not be saved"


@slow
@pytest.mark.parametrize("factor, code", [(0, 0), (1, 2)], ids=["same seed", "different seeds"])
def test_ranks_started_by_torchrun_compare_their_settings(factor, code, run_yaml, tmp_path):
    run = run_yaml(train={"max_steps": 2}, parallel={"tp": 2})
    train = f"exec {sys.executable} -m dpo_engine train {run} data.seed=$((RANK * {factor}))"
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*started, "--no-python", "bash", "-c", train], capture_output=True, text=True, timeout=300)
    said = [line[line.index("data.seed: ") :] for line in done.stderr.splitlines() if "data.seed: " in line]
    assert said == [f"data.seed: 0 on rank 0, 1 on rank 1; {ALIKE}"] * (code > 0)
    assert (done.returncode == 0) == (code == 0), done.stderr
    assert ("exitcode  : 2" in done.stderr) == (code == 2)


def test_different_weights_are_not_saved(run_yaml, tmp_path):
    """The save itself must compare the weights, because the run ends before the next regular comparison."""
    path = str(run_yaml(train={"guard_interval": 1000}))
    done = run_job(["train", path], 2, tmp_path / "log", before=flips_a_bit(MATRIX, 4))
    assert done.codes == [5, 5], done.said
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))
