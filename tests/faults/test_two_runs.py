"""Tests of two runs that share an output directory.

One run trains. The other run is refused or stops, and no files of the two runs are mixed. Evaluation and export work
while a run trains.
"""

import json
import os
import re
import signal
import time

import pytest
import yaml

from support.jobs import run_job
from support.outcomes import steps_of, trajectory

slow = pytest.mark.slow
SHORT = {
    "train": {"max_steps": 2},
    "optim": {"schedule": "constant", "warmup_steps": 0},
    "checkpoint": {"save_interval": 1, "export": False},
}
IN_USE = (
    r"train\.output_dir=.*: another run is writing there \(host \S+, process (\d+), since .* UTC\); "
    r"stop it, wait until it ends, or set another train\.output_dir"
)
RATES = ("0.001", "0.003")


def alone():
    """Make each process of ``run_job`` a job with one rank."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")


def unhurried(pause_s):
    """Return a ``before`` hook that makes each process a job with one rank, and prolongs each step by `pause_s`."""

    def before():
        from dpo_engine.training.trainer import Trainer

        alone()
        train_one = Trainer.train_one
        Trainer.train_one = lambda self, indices: [train_one(self, indices), time.sleep(pause_s)][0]

    return before


def far(watch_s=1.0):
    """Return a ``before`` hook that makes each process a job with one rank that seems to run on another machine.

    A lease reserves the output directory for one run, the holder. Because the holder's machine seems to be a different
    one, the job can tell only from the renewals of the lease whether the holder is alive.

    watch_s  seconds without a renewal after which the job regards the holder as dead
    """

    def before():
        from dpo_engine.checkpoint import lease

        alone()
        lease.machine = lambda: "another boot"
        lease.take.__kwdefaults__["watch_s"] = watch_s

    return before


def rates(output):
    """Return the set of learning rates in the run's manifests and config.yaml."""
    manifests = [json.loads(path.read_text()) for path in output.glob("checkpoints/step_*/manifest.json")]
    written = yaml.safe_load((output / "config.yaml").read_text())
    return {str(facts["run"]["config"]["optim"]["lr"]) for facts in manifests} | {str(written["optim"]["lr"])}


def leftovers(output):
    return [path.name for path in output.rglob("*") if ".tmp" in path.name or ".old" in path.name]


@pytest.fixture
def expected(run_yaml, tmp_path):
    """Return, for each learning rate, the metrics of an undisturbed run."""
    run = run_yaml("alone", **SHORT)
    found = {}
    for rate in RATES:
        output = tmp_path / rate
        done = run_job(
            ["train", str(run), f"optim.lr={rate}", f"train.output_dir={output}"], 1, tmp_path / "log", before=alone
        )
        assert done.codes == [0], done.said
        found[rate] = trajectory(output)
    assert found[RATES[0]] != found[RATES[1]]
    return found


def race(run, folder, output):
    """Start two jobs that have different learning rates and the same output directory.

    Return the learning rate of the job that trained.
    """
    own = {number: [f"optim.lr={rate}", f"train.output_dir={output}"] for number, rate in enumerate(RATES)}
    done = run_job(["train", str(run)], 2, folder, before=unhurried(0.25), own=own)
    assert sorted(done.codes) == [0, 4], done.said
    winner = done.codes.index(0)
    (line,) = done.errors[1 - winner].splitlines()
    assert re.fullmatch(IN_USE, line), line
    assert rates(output) == {RATES[winner]} and not leftovers(output)
    return RATES[winner]


def test_two_starts_at_once(run_yaml, tmp_path):
    rate = race(run_yaml("run", **SHORT), tmp_path / "log", tmp_path / "out")
    assert [line["learning_rate"] for line in steps_of(tmp_path / "out")] == [float(rate)] * 2


@slow
def test_twenty_pairs_of_starts_at_once(run_yaml, expected, tmp_path):
    """Half of the directories contain the lease of a run that was killed."""
    run = run_yaml("run", **SHORT)
    for turn in range(20):
        output = tmp_path / f"out{turn}"
        if turn % 2:
            fault = run_job(
                ["train", str(run), f"train.output_dir={output}"], 1, tmp_path / "log", fault="data:0:1:kill"
            )
            assert fault.codes == [-signal.SIGKILL]
        rate = race(run, tmp_path / "log", output)
        assert trajectory(output) == expected[rate]


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps(output):
    try:
        return sum('"loss"' in line for line in (output / "metrics.jsonl").read_text().splitlines())
    except OSError:
        return 0


def unrenewed():
    """Make each process a job with one rank.

    The job does not renew its lease during the test, so the job checks the lease only before it writes.
    """
    from dpo_engine.checkpoint import lease

    alone()
    lease.take.__kwdefaults__["renew_s"] = 600


@slow
@pytest.mark.parametrize(
    ("moment", "before"),
    [
        *((moment, alone) for moment in ("step", "save-manifest", "save-rename")),
        *((moment, unrenewed) for moment in ("step", "save-begin", "save-shards", "save-rename")),
    ],
)
def test_suspended_run_stops_when_another_has_taken_over(run_yaml, tmp_path, moment, before):
    """The fault suspends the first run in its second save or after its third step. A second run takes over.

    The second run finishes. When the first run continues, it must end with an error, and the metrics must be those of
    an uninterrupted run.
    """
    run = run_yaml("run", checkpoint={"save_interval": 2})
    assert run_job(["train", str(run_yaml("whole", checkpoint={"save_interval": 2}))], 1, tmp_path / "log").codes == [0]
    found = []

    def take_over(pids):
        until(lambda: any("stop" in path.read_text() for path in (tmp_path / "first").glob("rank_0.err")))
        found.append(run_job(["train", str(run)], 1, tmp_path / "second", before=far(1.5)))
        os.kill(pids[0], signal.SIGCONT)

    nth = 3 if moment == "step" else 2
    first = run_job(
        ["train", str(run)], 1, tmp_path / "first", fault=f"{moment}:0:{nth}:stop", before=before, during=take_over
    )
    assert found[0].codes == [0], found[0].said
    assert first.codes == [4], first.said
    lines = [line for line in first.errors[0].splitlines() if not line.startswith("DPO_FAULT")]
    assert len(lines) == 1 and "another run took over this directory (host " in lines[0]
    assert lines[0].endswith("this run stops without writing anything more")
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole") and not leftovers(tmp_path / "run")
    assert "for its heartbeat" in found[0].output[0]


@slow
def test_run_on_another_machine_is_refused_while_the_first_trains(run_yaml, tmp_path):
    run, output, found = run_yaml("run"), tmp_path / "run", []

    def second(pids):
        until(lambda: steps(output) >= 1)
        found.append(run_job(["train", str(run)], 1, tmp_path / "second", before=far(30)))

    first = run_job(["train", str(run)], 1, tmp_path / "first", before=unhurried(0.7), during=second)
    assert first.codes == [0], first.said
    assert found[0].codes == [4] and re.fullmatch(IN_USE, found[0].errors[0].strip())


@slow
def test_evaluation_and_export_work_while_the_run_trains(run_yaml, tmp_path):
    run, output, found = run_yaml("run", checkpoint={"save_interval": 2}), tmp_path / "run", []

    def others(pids):
        until(lambda: list(output.glob("checkpoints/step_0000000?")))
        for verb in ("eval", "export"):
            found.append(run_job([verb, str(run)], 1, tmp_path / verb, before=alone))
        os.kill(pids[0], 0)

    first = run_job(["train", str(run)], 1, tmp_path / "first", before=unhurried(1), during=others)
    assert first.codes == [0], first.said
    assert [done.codes for done in found] == [[0], [0]], "".join(done.said for done in found)
    assert list(output.glob("hf_step_*")) and list(output.glob("eval/*.parquet"))


@slow
@pytest.mark.skipif(os.geteuid() != 0, reason="requires root to create a mount namespace")
def test_output_directory_that_differs_between_nodes_is_refused_before_the_first_step(run_yaml, tmp_path):
    run, output = run_yaml("run", parallel={"tp": 2}), tmp_path / "run"
    (tmp_path / "node1").mkdir()
    output.mkdir()

    def before():
        if os.environ["RANK"] == "1":
            import ctypes

            clone_newns, ms_bind, ms_rec, ms_private = 0x20000, 0x1000, 0x4000, 0x40000
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.unshare(clone_newns) == 0
            assert libc.mount(None, b"/", None, ms_rec | ms_private, None) == 0
            assert libc.mount(str(tmp_path / "node1").encode(), str(output).encode(), None, ms_bind, None) == 0

    done = run_job(["train", str(run)], 2, tmp_path / "log", before=before)
    assert done.codes == [2, 2], done.said
    assert (
        f"train.output_dir={output}: is not the same directory for all ranks: the file that rank 0 wrote"
        in done.errors[0]
    )
    assert not (output / "metrics.jsonl").exists() and not (tmp_path / "node1" / "checkpoints").exists()
