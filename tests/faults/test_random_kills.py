"""Fault tests: kill jobs at random moments, and restart each job until it finishes.

In total, the tests kill jobs at least 80 times.
"""

import os
import random
import signal
import time

import pytest

from dpo_engine.checkpoint.directory import LEFT_OVER, committed, steps, verify
from support.jobs import run_job
from support.outcomes import trajectory


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("kills, seed", [(20, 1), (20, 2), (20, 3), (20, 4)])
def test_newest_checkpoint_is_intact_after_every_kill(kills, seed, run_yaml, tmp_path):
    """Run one or two ranks, and kill one or all of them. After each kill, the newest checkpoint must be intact."""
    draw = random.Random(seed)
    ranks = 1 + seed % 2
    sections = {"checkpoint": {"save_interval": 1}}
    whole = run_yaml("whole", **sections)
    finished = run_job(["train", str(whole)], ranks, tmp_path / "log")
    assert finished.codes == [0] * ranks, finished.said
    seconds = max(finished.seconds)
    expected = trajectory(tmp_path / "whole")
    killed = runs = 0
    while killed < kills:
        runs += 1
        run, folder = run_yaml(f"run{runs}", **sections), tmp_path / f"run{runs}/checkpoints"
        codes = [-9]
        while codes != [0] * ranks:
            # As soon as a rank has failed, kill the remaining ranks, as srun does with --kill-on-bad-exit. Otherwise, a
            # remaining rank could wait for a peer that died before connecting.
            finished = run_job(
                ["train", str(run)], ranks, tmp_path / "log", during=killing(draw, seconds), ends_with=over
            )
            codes = finished.codes
            assert not finished.survivors
            if killed_now := -signal.SIGKILL in codes:
                killed += 1
            else:
                assert codes == [0] * ranks, finished.said
            if folder.is_dir() and committed(folder):
                # A checkpoint gets its name only after it is complete, so the newest one must be intact.
                assert verify(committed(folder)[-1])["step"] == steps(folder)[-1]
            assert killed_now or not [path for path in folder.iterdir() if LEFT_OVER.fullmatch(path.name)]
        assert trajectory(tmp_path / f"run{runs}") == expected


def over(codes: list[int | None]) -> bool:
    return None not in codes or any(codes)


def killing(draw: random.Random, seconds: float):
    """Return a hook that kills one or all ranks at a random time. The job can end before this time."""

    def kill(pids: list[int]) -> None:
        time.sleep(draw.uniform(0.2, 0.8) * seconds)
        for pid in draw.choice([pids, pids[:1], pids[-1:]]):
            os.kill(pid, signal.SIGKILL)

    return kill
