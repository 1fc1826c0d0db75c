"""Fault tests: a storage error is reported in one line, leaves no partial file, and damages no checkpoint."""

import errno
import os
import re
import resource
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.jobs import run_job
from support.outcomes import trajectory
from support.small_run import write_run

SHORT = {"train": {"max_steps": 6}, "checkpoint": {"save_interval": 2}}


@pytest.fixture(scope="module")
def whole(run_files, tiny_hf, tmp_path_factory):
    """Return the metrics of the uninterrupted run, and the size of one of its checkpoints in bytes."""
    folder = tmp_path_factory.mktemp("whole")
    finished = run_job(["train", str(write_run(folder, "run", run_files, tiny_hf, SHORT))], 2, folder / "log")
    assert finished.codes == [0, 0], finished.said
    size = sum(path.stat().st_size for path in (folder / "run/checkpoints/step_00000006").iterdir())
    return trajectory(folder / "run"), size


def left(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def refused(finished, says: str) -> str:
    """Check that both ranks exited with code 4, and return the line that rank 0 wrote to stderr.

    Rank 0 must write a single line, apart from the fault injector's lines. The line must contain ``says``.
    """
    lines = [line for line in finished.errors[0].splitlines() if not line.startswith("DPO_FAULT")]
    assert finished.codes == [4, 4] and len(lines) == 1 and says in lines[0], finished.said
    return lines[0]


def continues(run: Path, expected: list[dict], tmp_path: Path) -> None:
    again = run_job(["train", str(run)], 2, tmp_path / "log")
    assert again.codes == [0, 0], again.said
    output = run.with_suffix("")
    assert trajectory(output) == expected
    assert left(output) == ["latest", "step_00000004", "step_00000006"]


NOT_SAVED = "step 4 was not saved, but earlier checkpoints are intact; check the storage and restart the job"
INJECTED = {
    "no space when a shard is opened": ("save-begin:1:2:enospc", "No space left on device", False),
    "no space in the middle of a shard": ("save-shard:1:2:enospc", "No space left on device", False),
    "EIO on write": ("save-shard:0:2:eio", "Input/output error", False),
    "no space for the manifest": ("save-manifest:0:2:enospc", "No space left on device", False),
    "no space for the pointer": ("save-rename:0:2:enospc", "No space left on device", True),
    "EIO while an old checkpoint is removed": ("retention:0:1:eio", "Input/output error", True),
}
DEFAULT = {"no space in the middle of a shard", "a full disk", "EIO on fsync"}


def cases(names):
    return [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", cases(INJECTED))
@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["thread", "waiting"])
def test_error_while_saving(name, asynchronous, whole, run_yaml, tmp_path):
    fault, what, saved = INJECTED[name]
    run = run_yaml(**{**SHORT, "checkpoint": {"save_interval": 2, "async_save": asynchronous}})
    line = refused(run_job(["train", str(run)], 2, tmp_path / "log", fault=fault), what)
    kept = left(tmp_path / "run")
    if saved:
        step = 6 if fault.startswith("retention") else 4
        assert f"step {step} was saved" in line and f"step_{step:08d}" in kept
    else:
        assert line.startswith(str(tmp_path / "run/checkpoints/step_00000004.tmp.")) and line.endswith(NOT_SAVED)
        assert kept == ["latest", "step_00000002"]
    continues(run, whole[0], tmp_path)


def failing(name: str, code: int, wanted: str):
    """Return a hook that makes the function ``os.<name>`` fail for all paths that match the pattern ``wanted``."""

    def hook() -> None:
        original = getattr(os, name)

        def call(target, *rest, **options):
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
            if re.search(wanted, path):
                raise OSError(code, os.strerror(code))
            return original(target, *rest, **options)

        setattr(os, name, call)

    return hook


SYSTEM_CALLS = {
    "EIO on fsync": ("fsync", errno.EIO, r"step_00000004\.tmp.*rank_0000", "rank_0000"),
    "EIO on fsync of the directory": ("fsync", errno.EIO, r"step_00000004\.tmp\.\w+$", "step_00000004.tmp"),
    "no space for the rename": ("rename", errno.ENOSPC, r"step_00000004\.tmp\.\w+$", "step_00000004.tmp"),
}


@pytest.mark.parametrize("name", cases(SYSTEM_CALLS))
def test_failing_system_call(name, whole, run_yaml, tmp_path):
    call, code, wanted, named = SYSTEM_CALLS[name]
    run = run_yaml(**SHORT)
    finished = run_job(["train", str(run)], 2, tmp_path / "log", before=failing(call, code, wanted))
    line = refused(finished, os.strerror(code))
    assert named in line and line.endswith(NOT_SAVED) and ("rank_0000" in line) == (named == "rank_0000")
    assert left(tmp_path / "run") == ["latest", "step_00000002"]
    continues(run, whole[0], tmp_path)


@contextmanager
def mounted(folder: Path, size: int):
    """Mount a file system of ``size`` bytes; skip the test if mounting is not permitted."""
    folder.mkdir(parents=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("requires permission to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("name", cases(["a full disk"]))
def test_full_disk(name, whole, run_yaml, tmp_path):
    """The disk has space for 1.6 checkpoints. The job resumes after the disk has been enlarged."""
    expected, size = whole
    # Do not save in the background, because the next step would then fail to write its metrics to the full disk.
    checkpoint = {**SHORT["checkpoint"], "async_save": False}
    run = run_yaml(**{**SHORT, "checkpoint": checkpoint}, data={"cache_dir": str(tmp_path / "cache")})
    with mounted(tmp_path / "run", int(1.6 * size)):
        line = refused(run_job(["train", str(run)], 2, tmp_path / "log"), "No space left on device")
        assert line.endswith(NOT_SAVED) and left(tmp_path / "run") == ["latest", "step_00000002"]
        subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(tmp_path / "run")], check=True)
        continues(run, expected, tmp_path)


@pytest.mark.slow
def test_file_size_limit(whole, run_yaml, tmp_path):
    run = run_yaml(**SHORT)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    line = refused(run_job(["train", str(run)], 2, tmp_path / "log", before=limited), "File too large")
    assert "rank_0000" in line and "step 2 was not saved" in line
    assert left(tmp_path / "run") == []
    continues(run, whole[0], tmp_path)


@pytest.mark.slow
def test_read_only_directory(whole, run_yaml, tmp_path):
    expected, size = whole
    run = run_yaml(**SHORT)
    folder = tmp_path / "run/checkpoints"
    with mounted(folder, 8 * size):
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        refused(run_job(["train", str(run)], 2, tmp_path / "log"), "Read-only file system")
        assert not (tmp_path / "run/metrics.jsonl").exists(), "the error must be found before training starts"
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        continues(run, expected, tmp_path)


def removing(what: str, when: int):
    """Return a hook that, immediately before step ``when``, removes the run's directory ``what``."""

    def hook() -> None:
        from dpo_engine.training.trainer import Trainer

        original = Trainer.train_one

        def train_one(self, *rest):
            if self.step + 1 == when:
                shutil.rmtree(Path(self.config.train.output_dir) / what, ignore_errors=True)
            return original(self, *rest)

        Trainer.train_one = train_one

    return hook


@pytest.mark.slow
def test_removed_checkpoint_folder_is_created_again(whole, run_yaml, tmp_path):
    run = run_yaml(**{**SHORT, "checkpoint": {"save_interval": 2, "async_save": False}})
    finished = run_job(["train", str(run)], 2, tmp_path / "log", before=removing("checkpoints", 4))
    assert finished.codes == [0, 0], finished.said
    assert trajectory(tmp_path / "run") == whole[0]
    assert left(tmp_path / "run") == ["latest", "step_00000004", "step_00000006"]


@pytest.mark.slow
def test_removed_working_directory(whole, run_yaml, tmp_path):
    run = run_yaml(**SHORT)

    def hook() -> None:
        from dpo_engine.checkpoint import directory as checkpoint_directory

        original = checkpoint_directory.seal

        def seal(work, manifest):
            if manifest["step"] == 4:
                shutil.rmtree(work)
            original(work, manifest)

        checkpoint_directory.seal = seal

    line = refused(run_job(["train", str(run)], 2, tmp_path / "log", before=hook), "No such file or directory")
    assert line.endswith(NOT_SAVED)
    continues(run, whole[0], tmp_path)


@pytest.mark.slow
def test_file_in_place_of_the_directory(run_yaml, tmp_path):
    run = run_yaml(**SHORT)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("mine")
    refused(run_job(["train", str(run)], 2, tmp_path / "log"), "checkpoints: is not a directory; move it away")
    assert (tmp_path / "run/checkpoints").read_text() == "mine"


@pytest.mark.slow
def test_file_in_place_of_a_checkpoint(whole, run_yaml, tmp_path):
    run = run_yaml(**SHORT)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step_00000004").write_text("mine")
    finished = run_job(["train", str(run)], 2, tmp_path / "log")
    assert finished.codes == [4, 4] and "checkpoint for step 4 skipped" in finished.said
    (tmp_path / "run/checkpoints/step_00000004").unlink()
    continues(run, whole[0], tmp_path)


@pytest.mark.slow
def test_full_disk_while_logging_metrics(whole, run_yaml, tmp_path):
    run = run_yaml(**SHORT)
    finished = run_job(["train", str(run)], 2, tmp_path / "log", fault="log:0:3:enospc")
    assert 0 not in finished.codes and "metrics.jsonl: No space left on device" in finished.errors[0]
    continues(run, whole[0], tmp_path)


@pytest.mark.slow
def test_run_stopped_by_bad_numbers_finishes_its_save(run_yaml, tmp_path):
    run = run_yaml(**SHORT)

    def hook() -> None:
        from dpo_engine.checkpoint import save as saver
        from dpo_engine.errors import NumbersError
        from dpo_engine.training.trainer import Trainer

        write_shard, train_one = saver.write_shard, Trainer.train_one

        def slow(path, tensors, *rest):
            time.sleep(1)
            return write_shard(path, tensors, *rest)

        def stopped(self, *rest):
            if self.step == 2:
                raise NumbersError("enough")
            return train_one(self, *rest)

        saver.write_shard, Trainer.train_one = slow, stopped

    finished = run_job(["train", str(run)], 2, tmp_path / "log", before=hook)
    assert finished.codes == [5, 5], finished.said
    assert left(tmp_path / "run") == ["latest", "step_00000002"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_storage_slower_than_a_step(rank, whole, run_yaml, tmp_path):
    """Every step is saved, and one rank's write takes longer than a step. Each save must wait for the previous save."""
    run = run_yaml(**{**SHORT, "checkpoint": {"save_interval": 1}})

    def hook() -> None:
        from dpo_engine.checkpoint import save as saver

        original = saver.write_shard

        def write_shard(path, tensors, *rest):
            time.sleep(0.5 if int(os.environ["RANK"]) == rank else 0)
            return original(path, tensors, *rest)

        saver.write_shard = write_shard

    finished = run_job(["train", str(run)], 2, tmp_path / "log", before=hook)
    assert finished.codes == [0, 0], finished.said
    assert trajectory(tmp_path / "run") == whole[0]
    assert left(tmp_path / "run") == ["latest", "step_00000005", "step_00000006"]
