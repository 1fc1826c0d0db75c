"""Fault tests: after a signal, or before the time limit, a job finishes its step, saves, and exits with code 75.

When the job is started again, no step is lost.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from support.jobs import run_job
from support.outcomes import trajectory

slow = pytest.mark.slow
NUMBERS = {"term": signal.SIGTERM, "usr1": signal.SIGUSR1, "int": signal.SIGINT}
_whole: list[list[dict]] = []


@pytest.fixture
def whole(run_yaml, tmp_path):
    """Return the metrics of the uninterrupted run."""
    if not _whole:
        assert run_job(["train", str(run_yaml("whole"))], 2, tmp_path / "log").codes == [0, 0]
        _whole.append(trajectory(tmp_path / "whole"))
    return _whole[0]


@pytest.fixture
def held_signals():
    """Block the signals in this process.

    The ranks inherit the mask, so they start with blocked signals, as under `python -m dpo_engine`.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS.values())
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS.values())


def said(done):
    """Return the lines that the job wrote to stderr, without the fault injector's lines."""
    return [line for line in done.said.splitlines() if not line.startswith("DPO_FAULT")]


def saved_step(output):
    return max((int(path.name[5:]) for path in (output / "checkpoints").glob("step_????????")), default=0)


def last_step(output):
    lines = trajectory(output) if (output / "metrics.jsonl").exists() else []
    return max((line["step"] for line in lines if "loss" in line), default=0)


def signal_in_save(number, rank=None):
    """Return a ``before`` hook: the signal arrives during the save of step 4, at the save's first fsync.

    rank  the only rank that gets the signal; None: all ranks get the signal
    """

    def before():
        from dpo_engine.training.trainer import Trainer

        pid, save, fsync, saving = os.getpid(), Trainer.save, os.fsync, []

        def noted(self, **asked):
            saving.append(self.step)
            save(self, **asked)

        def synced(file):
            if saving == [4] and rank in (None, int(os.environ["RANK"])):
                saving.append(0)
                os.kill(pid, number)
            fsync(file)

        Trainer.save, os.fsync = noted, synced

    return before


def when(path, text, act):
    """Return a ``during`` hook of ``run_job``: call ``act`` as soon as a file contains the text."""

    def during(pids):
        deadline = time.monotonic() + 60
        while not (path.exists() and text in path.read_text(errors="replace")):
            assert time.monotonic() < deadline, f"{path} did not contain {text!r} within 60 s"
            time.sleep(0.002)
        act(pids)

    return during


def to_all(number):
    """Return a function that sends the signal ``number`` to the whole process group, as a launcher does."""
    return lambda pids: os.killpg(pids[0], number)


CUT = {("usr1", "launcher", "start-up"), ("int", "all ranks", "mid-save")}


@pytest.mark.parametrize(
    "name, who, moment",
    [
        pytest.param(*case, id="-".join(case), marks=() if case in CUT else slow)
        for case in (
            (name, who, moment)
            for name in NUMBERS
            for who in ("launcher", "one rank", "all ranks")
            for moment in ("start-up", "mid-step", "mid-save")
        )
    ],
)
def test_no_step_is_lost(name, who, moment, run_yaml, tmp_path, whole, held_signals):
    number, path, output = NUMBERS[name], str(run_yaml("run")), tmp_path / "run"
    options = {}
    if who == "launcher":
        options["during"] = {
            "start-up": to_all(number),
            "mid-step": when(output / "metrics.jsonl", '"step": 2,', to_all(number)),
            "mid-save": when(output / "metrics.jsonl", '"step": 4,', to_all(number)),
        }[moment]
    elif moment == "mid-save":
        options["before"] = signal_in_save(number, 1 if who == "one rank" else None)
    else:
        phase, nth = {"start-up": ("rendezvous", 1), "mid-step": ("forward", 3)}[moment]
        options["fault"] = f"{phase}:{'1' if who == 'one rank' else '*'}:{nth}:{name}"
    done = run_job(["train", path], 2, tmp_path / "log", **options)
    assert done.codes == [75, 75] and not done.survivors, done.said
    assert len(said(done)) == 1 and said(done)[0].startswith(f"SIG{name.upper()}: stopped ")
    exact = {"start-up": 0, "mid-step": 3, "mid-save": 5}[moment] if who != "launcher" or moment == "start-up" else None
    assert saved_step(output) == last_step(output) and exact in (None, saved_step(output))
    assert run_job(["train", path], 2, tmp_path / "log").codes == [0, 0]
    assert trajectory(output) == whole


@slow
def test_second_signal_does_not_damage_the_save(run_yaml, tmp_path, whole):
    path = str(run_yaml("run"))
    fault = "forward:1:4:term,shutdown:*:1:usr1"
    done = run_job(["train", path], 2, tmp_path / "log", fault=fault, before=signal_in_save(signal.SIGTERM))
    assert done.codes == [75, 75] and saved_step(tmp_path / "run") == 4, done.said
    assert run_job(["train", path], 2, tmp_path / "log").codes == [0, 0]
    assert trajectory(tmp_path / "run") == whole


def test_signal_in_the_last_step_lets_the_run_finish(run_yaml, tmp_path, whole):
    done = run_job(["train", str(run_yaml("run"))], 2, tmp_path / "log", fault="forward:0:12:term")
    assert done.codes == [0, 0] and trajectory(tmp_path / "run") == whole, done.said


@slow
def test_due_evaluation_is_left_to_the_next_start(run_yaml, tmp_path):
    evaluated = {"train": {"eval_interval": 2}}
    assert run_job(["train", str(run_yaml("judged", **evaluated))], 2, tmp_path / "log").codes == [0, 0]
    path, output = str(run_yaml("run", **evaluated)), tmp_path / "run"
    done = run_job(["train", path], 2, tmp_path / "log", fault="step:*:4:term")
    assert done.codes == [75, 75] and saved_step(output) == 4, done.said
    judged = [line["step"] for line in trajectory(output) if "loss" not in line]
    assert judged == [2]
    assert run_job(["train", path], 2, tmp_path / "log").codes == [0, 0]
    assert trajectory(output) == trajectory(tmp_path / "judged")


@slow
def test_signal_with_a_dead_peer_does_not_hang(run_yaml, tmp_path):
    fault = "forward:1:4:kill,forward:0:4:term"
    done = run_job(["train", str(run_yaml("run"))], 2, tmp_path / "log", fault=fault)
    assert done.codes == [6, -signal.SIGKILL] and done.seconds[0] - done.seconds[1] < 5, done.said


@slow
def test_signal_while_waiting_for_a_peer_that_never_starts(run_yaml, tmp_path, held_signals):
    def before():
        from dpo_engine.training import interruption

        interruption.MEETING_S = 1.0

    done = run_job(
        ["train", str(run_yaml("run"))],
        2,
        tmp_path / "log",
        fault="rendezvous:1:1:hang",
        before=before,
        during=lambda pids: os.kill(pids[0], signal.SIGTERM),
        ends_with=lambda codes: codes[0] is not None,
    )
    assert done.codes[0] == 75 and done.seconds[0] < 5
    assert done.errors[0] == "SIGTERM: stopped before all ranks had started; no work was lost\n"


@slow
def test_interrupted_scoring_into_a_store_resumes(run_yaml, tmp_path):
    path = str(run_yaml("run", reference={"mode": "stored"}))
    done = run_job(["reference", path], 2, tmp_path / "log", fault="data:0:1:term")
    assert done.codes == [75, 75], done.said
    assert run_job(["reference", path], 2, tmp_path / "log").codes == [0, 0]


@slow
def test_run_saves_and_exits_before_the_time_limit(run_yaml, tmp_path):
    path = str(run_yaml("run", train={"epochs": 2000, "save_by": "0:00:10"}, checkpoint={"save_interval": 0}))
    started = time.time()
    slurm = {"SLURM_JOB_START_TIME": str(int(started) - 4)}
    done = run_job(["train", path], 2, tmp_path / "log", environment=slurm)
    assert done.codes == [75, 75] and 4 < time.time() - started < 7, done.said
    assert said(done)[0].startswith("train.save_by: stopped after step ")
    assert saved_step(tmp_path / "run") == last_step(tmp_path / "run") > 0


@slow
@pytest.mark.parametrize("asynchronous", [True, False])
def test_time_limit_accounts_for_the_slowest_save(asynchronous, run_yaml, tmp_path):
    """The last save must end before the limit. With `async_save`, the last save waits for the previous save."""

    def before():
        from dpo_engine.checkpoint import save as saver

        original = saver.write_shard
        saver.write_shard = lambda *asked: (time.sleep(3 * int(os.environ["RANK"])), original(*asked))[1]

    checkpoint = {"save_interval": 20, "async_save": asynchronous}
    path = str(run_yaml("run", train={"epochs": 20000, "save_by": "0:00:24"}, checkpoint=checkpoint))
    started = time.time()
    slurm = {"SLURM_JOB_START_TIME": str(int(started) - 4)}
    done = run_job(["train", path], 2, tmp_path / "log", environment=slurm, before=before)
    assert done.codes == [75, 75], done.said
    written = (tmp_path / f"run/checkpoints/step_{saved_step(tmp_path / 'run'):08d}/manifest.json").stat().st_mtime
    # The limit is 20 s after `started`. The test allows 2 s more, because the machine may be busy.
    assert int(started) + 8 < written <= int(started) + 22
    assert saved_step(tmp_path / "run") == last_step(tmp_path / "run") > 0


def torchrun(path, log, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    with log.open("wb") as file:
        return subprocess.Popen(
            [*command, "-m", "dpo_engine", "train", path], stdout=file, stderr=file, start_new_session=True
        )


@slow
@pytest.mark.parametrize("name", NUMBERS)
def test_launcher_forwards_signals(name, run_yaml, tmp_path, whole):
    """Use torchrun itself, because Slurm or a terminal can send a signal to the launcher alone."""
    path, output, log = str(run_yaml("run")), tmp_path / "run", tmp_path / "torchrun.log"
    handled = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    job = torchrun(path, log, "--signals-to-handle", handled)
    try:
        when(output / "metrics.jsonl", '"step": 2,', lambda pids: os.kill(job.pid, NUMBERS[name]))([])
        signalled = time.monotonic()
        code = job.wait(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert code not in (0, 2) and time.monotonic() - signalled < 20, log.read_text()
    assert "stopped after step" in log.read_text()
    assert saved_step(output) == last_step(output) >= 2
    from support.jobs import members

    assert not members(job.pid)
    assert run_job(["train", path], 2, tmp_path / "log").codes == [0, 0]
    assert trajectory(output) == whole


def test_metrics_lines_are_complete(run_yaml, tmp_path):
    """The tests above wait until the metrics file contains a text such as `"step": 2,`, so lines need this form."""
    run_job(["train", str(run_yaml("run", train={"max_steps": 2}))], 1, tmp_path / "log")
    text = (tmp_path / "run/metrics.jsonl").read_text()
    assert '"step": 2,' in text and all(json.loads(line) for line in text.splitlines())
