"""Fault tests: damaged checkpoints are skipped and reported, and the newest intact checkpoint is loaded."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from dpo_engine.checkpoint.directory import digest
from support.jobs import run_job
from support.outcomes import trajectory
from support.small_run import write_run

SECTIONS = {
    "parallel": {"tp": 2},
    "optim": {"schedule": "constant"},
    "train": {"max_steps": 6},
    "checkpoint": {"save_interval": 2, "keep_last": 3},
}


class Runs(NamedTuple):
    """Two runs: a run of six steps, and an uninterrupted run of eight steps.

    yaml      YAML file of the six-step run, which has checkpoints of steps 2, 4 and 6
    expected  metrics of the eight-step run
    """

    yaml: Path
    expected: list[dict]


@pytest.fixture(scope="module")
def runs(run_files, tiny_hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    six = write_run(folder, "six", run_files, tiny_hf, SECTIONS)
    whole = write_run(folder, "whole", run_files, tiny_hf, SECTIONS)
    for arguments in (["train", str(six)], ["train", str(whole), "train.max_steps=8"]):
        finished = run_job(arguments, 2, folder / "log")
        assert finished.codes == [0, 0], finished.said
    return Runs(six, without_final_evaluation(trajectory(folder / "whole"), 8))


def without_final_evaluation(lines: list[dict], last: int) -> list[dict]:
    """Drop all evaluations except that of step ``last``.

    A run evaluates the policy after its last step. If the run is then resumed to a later step, its metrics can keep
    this evaluation, which the metrics of an uninterrupted run lack.
    """
    return [line for line in lines if "loss" in line or line["step"] == last]


def flip(path: Path, place: float | bytes) -> None:
    """Change one byte of a file.

    place  the byte's position as a fraction of the file's size. If ``place`` is a sequence of bytes, the last byte of
           the first occurrence of this sequence is changed
    """
    data = bytearray(path.read_bytes())
    at = data.index(place) + len(place) - 1 if isinstance(place, bytes) else int(place * (len(data) - 1))
    data[at] ^= 1
    path.write_bytes(data)


def cut(path: Path, share: float, less: int = 0) -> None:
    os.truncate(path, int(path.stat().st_size * share) - less)


def swap(folder: Path) -> None:
    """Exchange the shards of two ranks."""
    (folder / "rank_00000.safetensors").rename(folder / "x")
    (folder / "rank_00001.safetensors").rename(folder / "rank_00000.safetensors")
    (folder / "x").rename(folder / "rank_00001.safetensors")


def rewrite(change):
    """Return a function that changes a checkpoint's manifest and then updates the manifest's SHA-256."""

    def harm(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["sha256"]
        change(manifest)
        path.write_text(json.dumps({**manifest, "sha256": digest(manifest)}))

    return harm


def rename_file(manifest: dict, name: str) -> None:
    manifest["files"][name] = manifest["files"].pop("rank_00001.safetensors")


def linked(path: Path) -> None:
    """Replace a file or directory with a symbolic link to the same content."""
    elsewhere = path.parent.parent.parent / f"elsewhere_{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


SHARD, HISTORY, MANIFEST = "rank_00001.safetensors", "metrics.jsonl", "manifest.json"
PASSED_OVER = {
    "shard cut to nothing": (lambda d: cut(d / SHARD, 0), f"{SHARD}: its size is 0 B, but must be"),
    "shard cut to one byte": (lambda d: os.truncate(d / SHARD, 1), f"{SHARD}: its size is 1 B, but must be"),
    "shard cut to a half": (lambda d: cut(d / SHARD, 0.5), " B, but must be "),
    "shard without its last byte": (lambda d: cut(d / SHARD, 1, 1), " B, but must be "),
    "shard with one more byte": (lambda d: open(d / SHARD, "ab").write(b"x"), " B, but must be "),
    "flipped byte in a shard's data": (lambda d: flip(d / SHARD, 0.9), f"{SHARD}: SHA-256 differs"),
    "flipped byte in a shard's header": (lambda d: flip(d / SHARD, 0.001), f"{SHARD}: SHA-256 differs"),
    "flipped byte in the history": (lambda d: flip(d / HISTORY, 0.5), f"{HISTORY}: SHA-256 differs"),
    "flipped byte in the manifest": (
        lambda d: flip(d / MANIFEST, b'"schedule": 6'),
        "not match the SHA-256 that it records",
    ),
    "flipped byte in the configuration": (
        lambda d: flip(d / MANIFEST, b'"max_length": 6'),
        "the SHA-256 that it records",
    ),
    "flipped byte in the position in the data": (
        lambda d: flip(d / MANIFEST, b'"epoch": 1'),
        "the SHA-256 that it records",
    ),
    "flipped first byte of the manifest": (lambda d: flip(d / MANIFEST, b"{"), f"{MANIFEST}: is damaged"),
    "manifest empty": (lambda d: cut(d / MANIFEST, 0), f"{MANIFEST}: is damaged"),
    "manifest cut": (lambda d: cut(d / MANIFEST, 0.7), f"{MANIFEST}: is damaged"),
    "manifest missing": (lambda d: (d / MANIFEST).unlink(), f"{MANIFEST}: No such file or directory"),
    "manifest nested too deeply": (lambda d: (d / MANIFEST).write_text("[" * 100_000), f"{MANIFEST}: is damaged"),
    "manifest of another step": (
        lambda d: shutil.copy(d.with_name("step_00000004") / MANIFEST, d / MANIFEST),
        "belongs to step 4, not to the step in the directory's name",
    ),
    "manifest too large": (lambda d: os.truncate(d / MANIFEST, 1 << 27), "is not a manifest, because it is larger"),
    "shard missing": (lambda d: (d / SHARD).unlink(), f"{SHARD}: No such file or directory"),
    "two ranks' shards swapped": (swap, "the file was truncated or replaced"),
    "shard of another step": (
        lambda d: shutil.copy(d.with_name("step_00000004") / SHARD, d / SHARD),
        f"{SHARD}: SHA-256 differs",
    ),
    "shard is a link": (lambda d: linked(d / SHARD), f"{SHARD}: is not a regular file"),
    "directory is a link": (linked, "is not a directory"),
    "manifest names a file in the parent directory": (
        rewrite(lambda m: rename_file(m, "../rank_00001.safetensors")),
        "lists the file",
    ),
    "manifest names an absolute path": (rewrite(lambda m: rename_file(m, "/etc/passwd")), "lists the file"),
    "manifest names no files": (rewrite(lambda m: m.update(files=["x"])), "has missing or malformed fields"),
    "manifest names files without hashes": (rewrite(lambda m: m["files"].update({SHARD: {}})), "has missing or"),
    "empty directory": (lambda d: (shutil.rmtree(d), d.mkdir()), f"{MANIFEST}: No such file or directory"),
}
UNHARMED = {
    "pointer empty": lambda f: (f / "latest").write_text(""),
    "pointer of garbage": lambda f: (f / "latest").write_bytes(b"\xff\x00../../etc"),
    "pointer to a missing step": lambda f: (f / "latest").write_text("step_00000099\n"),
    "pointer missing": lambda f: (f / "latest").unlink(),
    "metrics of the run lost": lambda f: (f.parent / "metrics.jsonl").unlink(),
    "metrics of the run cut": lambda f: cut(f.parent / "metrics.jsonl", 0.4),
    "metrics of the run flipped": lambda f: flip(f.parent / "metrics.jsonl", 0.3),
    "foreign shard": lambda f: shutil.copy(f / "step_00000006" / SHARD, f / "step_00000006/rank_00002.safetensors"),
    "temporary directory of a killed run": lambda f: (f / "step_00000008.tmp.dead").mkdir(),
}
DEFAULT = {"flipped byte in a shard's data", "two ranks' shards swapped", "metrics of the run lost", "everything"}


def cases(names):
    return [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture
def again(runs, tmp_path):
    """Return a function that copies the six-step run, damages the copy, and resumes it to step 8.

    The function returns the job and the run's folder.
    """

    def start(harm):
        shutil.copytree(runs.yaml.with_suffix(""), tmp_path / "run")
        harm(tmp_path / "run/checkpoints")
        arguments = ["train", str(runs.yaml), f"train.output_dir={tmp_path / 'run'}", "train.max_steps=8"]
        return run_job(arguments, 2, tmp_path / "log"), tmp_path / "run"

    return start


def continued(finished, run: Path, runs: Runs, step: int) -> None:
    assert finished.codes == [0, 0], finished.said
    assert f"resumed after step {step}\n" in finished.output[0]
    assert without_final_evaluation(trajectory(run), 8) == runs.expected
    left = {path.name.partition(".")[0] for path in (run / "checkpoints").iterdir()}
    assert {"latest", "step_00000008"} < left and not list((run / "checkpoints").glob("*.tmp.*"))
    assert (run / "checkpoints/latest").read_text() == "step_00000008\n"


@pytest.mark.parametrize("name", cases(PASSED_OVER))
def test_newest_intact_checkpoint_is_used(name, again, runs):
    harm, says = PASSED_OVER[name]
    finished, run = again(lambda folder: harm(folder / "step_00000006"))
    continued(finished, run, runs, 4)
    (line,) = [line for line in finished.output[0].splitlines() if " skipped: " in line]
    assert f"checkpoint for step 6 skipped: {run}/checkpoints/step_00000006" in line and says in line
    assert " skipped: " not in finished.output[1], "rank 1 must not repeat the message of rank 0"


@pytest.mark.parametrize("name", cases(UNHARMED))
def test_damage_outside_the_checkpoint_is_harmless(name, again, runs):
    finished, run = again(UNHARMED[name])
    continued(finished, run, runs, 6)
    foreign = "ignoring files that are not part of this checkpoint: rank_00002.safetensors" in finished.output[0]
    assert foreign == (name == "foreign shard")


@pytest.mark.slow
def test_two_damaged_in_a_row(again, runs):
    def harm(folder):
        flip(folder / "step_00000006" / SHARD, 0.5)
        (folder / "step_00000004" / SHARD).unlink()

    finished, run = again(harm)
    continued(finished, run, runs, 2)
    said = [line for line in finished.output[0].splitlines() if " skipped: " in line]
    assert [line.partition(" skipped")[0] for line in said] == ["checkpoint for step 6", "checkpoint for step 4"]


@pytest.mark.parametrize("name", cases(["everything"]))
def test_resume_is_refused_if_all_are_damaged(name, again):
    """The run must not silently restart at step 0, and must not remove a checkpoint."""

    def harm(folder):
        for path in folder.glob(f"step_*/{SHARD}"):
            flip(path, 0.5)

    finished, run = again(harm)
    assert finished.codes == [4, 4]
    lines = finished.errors[0].splitlines()
    assert [line.partition(" skipped")[0] for line in lines[:3]] == [f"checkpoint for step {n}" for n in (6, 4, 2)]
    way_out = "restore a checkpoint, or remove all checkpoints to start from step 0"
    expected = f"{run}/checkpoints: no checkpoint is intact; {way_out}"
    assert lines[3:] == [expected] and not finished.errors[1]
    assert len(list((run / "checkpoints").glob("step_*"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("step", [6, 4])
def test_newer_format_is_refused(step, again):
    """If a newer version's checkpoint were skipped, the steps that the newer version made would be lost silently."""

    def harm(folder):
        if step == 4:
            flip(folder / "step_00000006" / SHARD, 0.5)
        rewrite(lambda manifest: manifest.update(format=3))(folder / f"step_{step:08d}")

    finished, run = again(harm)
    assert finished.codes == [4, 4]
    expected = f"step_{step:08d}/manifest.json: has format 3, but this version of dpo-engine reads format 2; "
    expected += "use the version that wrote this checkpoint\n"
    assert finished.errors[0].endswith(expected)


@pytest.mark.parametrize(
    "reader, code, often, step",
    [
        ("_verify_file", errno.EIO, 1, 6),
        pytest.param("read_manifest", errno.ESTALE, 2, 6, marks=pytest.mark.slow),
        pytest.param("_verify_file", errno.EIO, 3, 4, marks=pytest.mark.slow),
        pytest.param("_verify_file", errno.EACCES, 1, 4, marks=pytest.mark.slow),
    ],
)
def test_only_temporary_storage_errors_are_retried(reader, code, often, step, runs, tmp_path):
    shutil.copytree(runs.yaml.with_suffix(""), tmp_path / "run")

    def before():
        from dpo_engine.checkpoint import directory as directories

        read, left = getattr(directories, reader), [often]

        def failing(path, *rest, **how):
            if os.environ["RANK"] == "1" and "step_00000006" in str(path) and left[0]:
                left[0] -= 1
                raise OSError(code, os.strerror(code), str(path))
            return read(path, *rest, **how)

        setattr(directories, reader, failing)
        directories.TRY_AGAIN_S = (0.01, 0.01)

    arguments = ["train", str(runs.yaml), f"train.output_dir={tmp_path / 'run'}", "train.max_steps=8"]
    continued(run_job(arguments, 2, tmp_path / "log", before=before), tmp_path / "run", runs, step)


@pytest.mark.slow
def test_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(again, runs, tmp_path):
    def harm(folder):
        flip(folder / "step_00000006" / SHARD, 0.5)

    finished, run = again(harm)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["latest", "step_00000004", "step_00000006.2", "step_00000008"]
    shutil.rmtree(run / "checkpoints/step_00000008")
    arguments = ["train", str(runs.yaml), f"train.output_dir={run}", "train.max_steps=8"]
    continued(run_job(arguments, 2, tmp_path / "log"), run, runs, 6)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["eval", "export"])
def test_other_verbs_refuse_a_damaged_checkpoint(verb, again, runs, tmp_path):
    def harm(folder):
        flip(folder / "step_00000006" / SHARD, 0.5)
        (folder / "step_00000008.tmp.beef").mkdir()

    _, run = again(lambda folder: None)
    harm(run / "checkpoints")
    given = [str(runs.yaml), f"train.output_dir={run}"]
    asked = run_job([verb, *given, "--step", "6"], 2, tmp_path / "log")
    assert asked.codes == [4, 4] and "checkpoint for step 6 skipped" in asked.errors[0]
    assert asked.errors[0].endswith("checkpoints: the checkpoint for step 6 is damaged; choose another step\n")
    shutil.rmtree(run / "checkpoints/step_00000008")
    newest = run_job([verb, *given], 2, tmp_path / "log")
    assert newest.codes == [0, 0], newest.said
    assert "checkpoint for step 6 skipped" in newest.output[0]
    assert (run / "checkpoints/step_00000008.tmp.beef").is_dir(), (
        "eval and export must not remove files that may belong to a running job"
    )
