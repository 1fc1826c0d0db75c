"""Fault tests: if a rank dies, hangs or raises an error, the other ranks soon exit, and stderr says what happened.

The other ranks exit with code 6, and so does a rank that hangs. If all ranks find the same error, or if one rank shares
its configuration error with the others, all ranks exit with that error's code.
"""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from support.jobs import run_job
from support.outcomes import LAYOUTS

slow = pytest.mark.slow
TIMEOUT_S = 5
WITHIN_S = 5.0


def said(done, rank):
    return [line for line in done.errors[rank].splitlines() if not line.startswith("DPO_FAULT")]


def hasty(**sections):
    return {**sections, "parallel": {**sections.get("parallel", {}), "timeout_s": TIMEOUT_S}}


DEATHS = {
    "rendezvous": "dp2",  # the ranks are not connected yet, so only a timeout can detect the death
    "data": "dp2",  # one rank tokenizes for all ranks; there are no data loader processes that could die
    "reference": "pp2",
    "forward": "tp2",
    "reduce": "dp2",
    "optimizer": "tp2 pp2",
    "step": "tp2",
    "eval": "pp2",
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", [pytest.param(name, marks=() if name == "forward" else slow) for name in DEATHS])
def test_dead_peer_ends_every_rank(phase, rank, run_yaml, tmp_path):
    ranks, parallel = LAYOUTS[DEATHS[phase]]
    path = str(run_yaml(**hasty(parallel=parallel)))
    done = run_job(["train", path], ranks, tmp_path / "log", fault=f"{phase}:{rank}:1:kill")
    others = [other for other in range(ranks) if other != rank]
    assert done.codes[rank] == -signal.SIGKILL and not done.survivors
    assert [done.codes[other] for other in others] == [6] * len(others), done.said
    late = TIMEOUT_S if phase == "rendezvous" else 0
    assert max(done.seconds) - done.seconds[rank] < WITHIN_S + late
    lines = [line for other in others for line in said(done, other)]
    if phase == "rendezvous":  # torch also logs its attempts to connect
        assert lines[-1].endswith("all ranks stop. Run the same command again to continue from the newest checkpoint")
    else:
        assert lines and all(len(said(done, other)) <= 1 for other in others), done.said
        assert all(f"rank {rank} died or lost its connection" in line for line in lines), lines


@pytest.mark.parametrize("phase", ["forward", pytest.param("data", marks=slow), pytest.param("step", marks=slow)])
def test_exception_keeps_its_traceback_and_peers_exit(phase, run_yaml, tmp_path):
    done = run_job(["train", str(run_yaml())], 2, tmp_path / "log", fault=f"{phase}:1:1:raise")
    assert done.codes == [6, 1] and max(done.seconds) - min(done.seconds) < WITHIN_S
    assert "Traceback" in done.errors[1] and done.errors[1].rstrip().endswith(f"RuntimeError: DPO_FAULT: {phase}")
    assert len(said(done, 0)) == 1 and said(done, 0)[0].startswith("rank 1 died")


@slow
def test_exception_while_all_wait_for_one_rank(run_yaml, tmp_path):
    """Rank 1 waits while rank 0 prepares the data. If rank 0 fails, rank 1 reports the text of rank 0's error."""

    def before():
        from dpo_engine.training import run_data

        def broken(*_, **__):
            raise ZeroDivisionError("a bug in the data")

        if os.environ["RANK"] == "0":
            run_data.build_dataset = broken

    done = run_job(["train", str(run_yaml())], 2, tmp_path / "log", before=before)
    assert done.codes == [1, 6]
    assert done.errors[0].rstrip().endswith("ZeroDivisionError: a bug in the data")
    assert said(done, 1)[0].endswith("rank 0 died: ZeroDivisionError: a bug in the data")


@slow
def test_full_disk_on_one_rank(run_yaml, tmp_path):
    done = run_job(["train", str(run_yaml())], 2, tmp_path / "log", fault="log:0:3:enospc")
    assert done.codes == [1, 6] and max(done.seconds) - min(done.seconds) < WITHIN_S, done.said
    assert said(done, 0) == [f"{tmp_path}/run/metrics.jsonl: No space left on device"]


def test_tracker_that_rank_0_cannot_open(run_yaml, tmp_path):
    """The error occurs only on rank 0, but all ranks exit with the error's code, and the message appears once."""

    def before():
        from dpo_engine.errors import ConfigError
        from dpo_engine.reporting import sinks

        def refused(*_):
            raise ConfigError("logging.wandb.project=p: W&B cannot be opened")

        sinks.JsonlSink = refused

    done = run_job(["train", str(run_yaml())], 2, tmp_path / "log", before=before)
    assert done.codes == [2, 2], done.said
    assert done.said == "logging.wandb.project=p: W&B cannot be opened\n"


def continued(pids):
    """Continue the stopped rank 1 after rank 0 has exited. This is a ``during`` hook of ``run_job``."""
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pids[1], signal.SIGCONT)


@slow
def test_stopped_rank_ends_the_job(run_yaml, tmp_path):
    path = str(run_yaml(**hasty()))
    fault = "forward:1:3:stop"
    done = run_job(["train", path], 2, tmp_path / "log", fault=fault, ends_with=lambda codes: codes[0] is not None)
    assert done.codes == [6, -signal.SIGKILL] and done.seconds[0] < 3 + TIMEOUT_S + WITHIN_S
    assert len(said(done, 0)) == 1 and "did not answer within parallel.timeout_s" in said(done, 0)[0]
    # A stopped process cannot exit. After the process is continued, it detects that rank 0 has exited, and exits too.
    done = run_job(["train", path], 2, tmp_path / "log", fault=fault, during=continued)
    assert done.codes == [6, 6] and not done.survivors, done.said


@pytest.mark.parametrize("phase", [pytest.param(name, marks=slow) for name in ("forward", "optimizer", "step", "data")])
def test_hanging_rank_ends_the_job(phase, run_yaml, tmp_path):
    path = str(run_yaml(**hasty()))
    done = run_job(["train", path], 2, tmp_path / "log", fault=f"{phase}:1:1:hang")
    assert done.codes == [6, 6] and not done.survivors, done.said
    assert max(done.seconds) < 3 + TIMEOUT_S + WITHIN_S
    assert 1 <= len(said(done, 0) + said(done, 1)) <= 2 and "parallel.timeout_s" in done.said


@slow
def test_single_process_that_hangs_exits(run_yaml, tmp_path):
    done = run_job(["train", str(run_yaml(**hasty()))], 1, tmp_path / "log", fault="forward:0:3:hang")
    assert done.codes == [6] and done.seconds[0] < 3 + TIMEOUT_S + WITHIN_S
    assert said(done, 0)[0].startswith(f"rank 0: no progress for parallel.timeout_s={TIMEOUT_S} s")


@slow
def test_single_process_that_hangs_in_an_evaluation_exits(run_yaml, tmp_path):
    done = run_job(["train", str(run_yaml(**hasty()))], 1, tmp_path / "log", fault="eval:0:1:hang")
    assert done.codes == [6] and done.seconds[0] < 6 + TIMEOUT_S + WITHIN_S
    assert said(done, 0)[0].startswith(f"rank 0: no progress for parallel.timeout_s={TIMEOUT_S} s")


SHAPELESS = """
from dpo_engine.objective.losses import LOSSES

@LOSSES.register("shapeless", needs_reference=False, at_init=lambda options: None)
def shapeless(policy, reference, *, beta: float = 0.1):
    return -beta * (policy.chosen - policy.rejected).mean()
"""


def test_error_on_one_stage_is_reported_and_ends_the_others(run_yaml, tmp_path, monkeypatch):
    (tmp_path / "shapeless.py").write_text(SHAPELESS)
    monkeypatch.syspath_prepend(tmp_path)
    sections = {"plugins": ["shapeless"], "loss": {"name": "shapeless"}, "reference": {"mode": "none"}}
    done = run_job(["train", str(run_yaml(**sections, parallel={"pp": 2}))], 2, tmp_path / "log")
    assert done.codes == [6, 2] and max(done.seconds) - min(done.seconds) < WITHIN_S
    assert said(done, 0)[0].startswith("rank 1 died or lost its connection")
    (line,) = said(done, 1)
    assert "rank 1] loss.name: the loss returned shape [], but the number of pairs is 2; the loss must return " in line


def test_error_on_all_ranks_is_reported_once(run_yaml, tmp_path, monkeypatch):
    (tmp_path / "shapeless.py").write_text(SHAPELESS)
    monkeypatch.syspath_prepend(tmp_path)
    sections = {"plugins": ["shapeless"], "loss": {"name": "shapeless"}, "reference": {"mode": "none"}}
    done = run_job(["train", str(run_yaml(**sections))], 2, tmp_path / "log")
    assert (
        done.codes == [2, 2]
        and done.said.startswith("loss.name: the loss returned shape [], but the number of pairs is 2;")
        and done.said.count("\n") == 1
    )


def on_rank_1(change):
    """Return a ``before`` hook of ``run_job`` that calls `change` on rank 1."""

    def before():
        if os.environ["RANK"] == "1":
            change()

    return before


def skip_a_collective():
    from dpo_engine.training.bad_steps import BadSteps

    original = BadSteps.refuses
    BadSteps.refuses = lambda self, metrics: False if self.good == 2 else original(self, metrics)


def another_shape():
    from dpo_engine.training import bad_steps

    bad_steps.CAUSES = {**bad_steps.CAUSES, "another": "a cause that other ranks do not know"}


@slow
@pytest.mark.parametrize("change", [skip_a_collective, another_shape], ids=lambda change: change.__name__)
def test_mismatched_collectives_end_the_job(change, run_yaml, tmp_path):
    done = run_job(["train", str(run_yaml(**hasty()))], 2, tmp_path / "log", before=on_rank_1(change))
    # If gloo receives more bytes than expected, it aborts the process.
    assert all(code in (6, -signal.SIGABRT) for code in done.codes) and 6 in done.codes, done.said
    assert max(done.seconds) < 3 + TIMEOUT_S + WITHIN_S and "Traceback" not in done.said and not done.survivors


@slow
@pytest.mark.parametrize("moment", ["start-up", "mid-run"])
def test_launchers_store_is_lost(moment, run_yaml, tmp_path):
    """Ranks need the launcher's store only at the start, to connect to each other."""
    from torch.distributed import TCPStore

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ready, server = os.pipe(), os.fork()
    if server == 0:
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # noqa: F841  keeps the store running
        os.write(ready[1], b"1")
        time.sleep(120)
        os._exit(0)
    os.read(ready[0], 1)

    def lost(pids):
        deadline = time.monotonic() + 60
        metrics = tmp_path / "run/metrics.jsonl"
        log = tmp_path / "log/rank_1.err"
        while moment == "mid-run" and not (metrics.exists() and metrics.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        while moment == "start-up" and not (log.exists() and "rendezvous" in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)

    shared = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fault = "rendezvous:1:1:hang" if moment == "start-up" else ""
    before = lambda: os.environ.update(shared)  # noqa: E731  this replaces the address that run_job sets
    done = run_job(
        ["train", str(run_yaml(**hasty()))],
        2,
        tmp_path / "log",
        fault=fault,
        before=before,
        during=lost,
        ends_with=lambda codes: codes[0] is not None if moment == "start-up" else None not in codes,
    )
    if moment == "start-up":
        assert done.codes[0] == 6 and done.seconds[0] < 3 + TIMEOUT_S + WITHIN_S, done.said
        assert "all ranks stop" in said(done, 0)[-1]
    else:
        assert done.codes == [0, 0], done.said


def checks_slowly(rank, seconds, marker):
    """Return a ``before`` hook: one rank creates the file `marker`, then sleeps for `seconds`, then checks the run."""

    def before():
        from dpo_engine.verbs import check

        examine = check.examine

        def slow(*arguments, **options):
            if os.environ["RANK"] == str(rank):
                Path(marker).write_text("")
                time.sleep(seconds)
            return examine(*arguments, **options)

        check.examine = slow

    return before


@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_prepares_longer_than_the_timeout(rank, run_yaml, tmp_path):
    path = str(run_yaml(parallel={"timeout_s": 2}))
    before = checks_slowly(rank, 6, tmp_path / "marker")
    done = run_job(["train", path, "train.max_steps=2"], 2, tmp_path / "log", before=before)
    assert done.codes == [0, 0], done.said
    assert min(done.seconds) > 6


@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_dies_while_it_prepares(rank, run_yaml, tmp_path):
    path, marker = str(run_yaml(parallel={"timeout_s": 2})), tmp_path / "marker"

    def kill(pids):
        while not marker.exists():
            time.sleep(0.01)
        time.sleep(3)
        os.kill(pids[rank], signal.SIGKILL)

    done = run_job(["train", path], 2, tmp_path / "log", before=checks_slowly(rank, 60, marker), during=kill)
    assert done.codes[rank] == -signal.SIGKILL and done.codes[1 - rank] == 6, done.said
    assert done.seconds[1 - rank] - done.seconds[rank] < 2 + WITHIN_S
    assert said(done, 1 - rank)[-1].endswith("continue from the newest checkpoint")
