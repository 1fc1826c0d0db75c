"""Tests of the lease of an output directory: which process gets it, which is refused, and how a former holder stops."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_engine.checkpoint import lease as leases
from dpo_engine.checkpoint.lease import Holder, take
from dpo_engine.checkpoint.load import as_checkpoint_error, unless_taken_over
from dpo_engine.errors import CheckpointError, Interrupted

REFUSED = (
    r"train\.output_dir={output}: another run is writing there \(host {host}, process {pid}(, Slurm job 7)?, since "
    r"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC\); stop it, wait until it ends, or set another train\.output_dir"
)


def files(output):
    return sorted(path.name for path in (output / "lease").iterdir())


def elsewhere(**facts):
    """Return a holder on another machine."""
    return replace(Holder.here({}), host="far", machine="another boot", **facts)


def refused(output, host, pid, **options):
    with pytest.raises(CheckpointError) as error:
        take(output, **options)
    assert re.fullmatch(REFUSED.format(output=re.escape(str(output)), host=host, pid=pid), str(error.value))


def plant(output, holder, number=1):
    """Write a lease file as if ``holder`` had written it, and return the path of the file."""
    (output / "lease").mkdir(parents=True, exist_ok=True)
    path = output / "lease" / f"{number:08d}.json"
    path.write_bytes(leases._text(holder))
    return path


@pytest.fixture
def sleeper():
    """Yield a child process that a test can kill. The fixture kills the process at the end of the test."""
    process = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=-1)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_second_run_is_refused_until_the_lease_is_given_back(tmp_path):
    output = tmp_path / "new" / "out"
    first = take(output)
    first.confirm()
    refused(output, os.uname().nodename, os.getpid())
    assert files(output) == ["00000001.json"]
    first.release()
    first.release()
    with pytest.raises(CheckpointError, match="this run no longer holds the directory, because .* was removed"):
        first.confirm()
    second = take(output)
    assert files(output) == ["00000002.json"]
    second.release()


def test_start_is_refused_before_torch_is_imported(tmp_path):
    leases.refuse_if_held(tmp_path)
    lease = take(tmp_path)
    overrides = ["model.path=m", "data.train=d.jsonl", f"train.output_dir={tmp_path}"]
    program = (
        "import sys; from dpo_engine import cli; code = cli.main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, "train", *overrides], capture_output=True, text=True)
    assert done.stdout == "4 False\n"
    host = os.uname().nodename
    assert re.fullmatch(REFUSED.format(output=re.escape(str(tmp_path)), host=host, pid=os.getpid()), done.stderr[:-1])
    lease.release()
    leases.refuse_if_held(tmp_path)
    plant(tmp_path, elsewhere(), number=5)
    leases.refuse_if_held(tmp_path)


def test_file_names_the_holder(tmp_path):
    env = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "a", "SLURM_RESTART_COUNT": "2"}
    lease = take(tmp_path, me=Holder.here(env))
    written = json.loads((tmp_path / "lease/00000001.json").read_text())
    started = leases.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    assert written["host"] == os.uname().nodename and written["pid"] == os.getpid() and written["started"] == started
    assert (written["job"], written["restarts"], written["released"]) == ("a/7", 2, False)
    refused(tmp_path, os.uname().nodename, os.getpid())
    lease.release()
    assert json.loads((tmp_path / "lease/00000001.json").read_text())["released"] is True


@pytest.mark.parametrize("end", ["killed", "zombie", "number used again"])
def test_dead_process_on_this_machine_is_replaced_at_once(tmp_path, sleeper, end):
    started = leases.process_start(sleeper.pid)
    plant(tmp_path, replace(Holder.here({}), pid=sleeper.pid, started=started))
    refused(tmp_path, os.uname().nodename, sleeper.pid)
    if end == "number used again":
        plant(tmp_path, replace(Holder.here({}), pid=sleeper.pid, started=str(int(started) - 1)))
    else:
        os.kill(sleeper.pid, signal.SIGKILL)
        os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
        if end == "killed":
            sleeper.wait()
    began, said = time.monotonic(), []
    take(tmp_path, say=said.append).release()
    assert time.monotonic() - began < 1 and not said


def test_stopped_process_on_this_machine_keeps_its_lease(tmp_path, sleeper):
    os.kill(sleeper.pid, signal.SIGSTOP)
    started = leases.process_start(sleeper.pid)
    plant(tmp_path, replace(Holder.here({}), pid=sleeper.pid, started=started))
    refused(tmp_path, os.uname().nodename, sleeper.pid, watch_s=0)


def test_requeued_job_takes_its_own_lease_at_once(tmp_path):
    now = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    plant(tmp_path, elsewhere(job="/7", restarts=0))
    began = time.monotonic()
    take(tmp_path, me=Holder.here(now)).release()
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("facts", [{"job": "/7", "restarts": 1}, {"job": "other/7"}, {"job": "/8"}, {}])
def test_other_start_on_another_machine_is_watched(tmp_path, facts):
    """This run is the first restart of Slurm job 7.

    In the first case, the holder has the same job number and restart count. In the other cases, the holder is a job
    with this number on another cluster, a job with another number, or a run without Slurm.
    """
    plant(tmp_path, elsewhere(**facts))
    began = time.monotonic()
    take(tmp_path, me=Holder.here({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}), watch_s=0.3).release()
    assert time.monotonic() - began > 0.3


def test_wait_for_a_silent_lease_of_another_machine_is_logged_once(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "QUIET_S", 0.1)
    plant(tmp_path, elsewhere(job="/7"))
    said = []
    take(tmp_path, say=said.append, watch_s=0.5).release()
    (line,) = said
    assert line.startswith(f"{tmp_path}: was last held by another run (host far, process {os.getpid()}, Slurm job 7, ")
    assert line.endswith("); waiting up to 1 s for its heartbeat") or line.endswith("0 s for its heartbeat")


def test_renewed_lease_of_another_machine_is_respected(tmp_path):
    holder = take(tmp_path, me=elsewhere(), renew_s=0.1)
    refused(tmp_path, "far", os.getpid(), watch_s=5)
    holder.confirm()
    holder.release()


def test_lease_given_back_during_the_watch_is_taken(tmp_path):
    holder = take(tmp_path, me=elsewhere(), renew_s=60)
    threading.Timer(0.2, holder.release).start()
    began = time.monotonic()
    take(tmp_path, watch_s=30).release()
    assert time.monotonic() - began < 5


def test_slow_storage_prolongs_the_watch(tmp_path, monkeypatch):
    """A read takes longer than the usual watch. Then the holder renews its lease. The renewal must still be noticed."""
    path, read, calls = plant(tmp_path, elsewhere()), leases._read, []

    def slow(place):
        calls.append(place)
        if len(calls) == 2:
            time.sleep(0.6)
        if len(calls) == 4:
            os.utime(path, (1, 1))
        return read(place)

    monkeypatch.setattr(leases, "_read", slow)
    refused(tmp_path, "far", os.getpid(), watch_s=0.3)


def test_signal_ends_the_wait(tmp_path):
    def leave():
        raise Interrupted("SIGTERM: stopped")

    plant(tmp_path, elsewhere())
    with pytest.raises(Interrupted):
        take(tmp_path, between=leave)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": "x"}', b"\xff" * 9])
def test_unreadable_lease_is_watched(tmp_path, content):
    plant(tmp_path, elsewhere()).write_bytes(content)
    began = time.monotonic()
    take(tmp_path, watch_s=0.2).release()
    assert time.monotonic() - began > 0.2


def test_empty_file_of_a_run_that_is_just_starting_is_read_again(tmp_path):
    path = plant(tmp_path, elsewhere())
    path.write_bytes(b"")
    threading.Timer(0.1, lambda: path.write_bytes(leases._text(Holder.here({})))).start()
    refused(tmp_path, os.uname().nodename, os.getpid(), watch_s=30)


def test_process_that_slept_through_another_run_does_not_take_its_number_again(tmp_path, monkeypatch):
    """This process finds that the holder of lease 1 is dead, and sleeps.

    During the sleep, other runs take leases 2 and 3.
    """
    plant(tmp_path, elsewhere())
    living, others = leases._living, []

    def sleepy(*asked):
        monkeypatch.setattr(leases, "_living", living)
        take(tmp_path, watch_s=0).release()
        others.append(take(tmp_path))
        return None

    monkeypatch.setattr(leases, "_living", sleepy)
    refused(tmp_path, os.uname().nodename, os.getpid())
    others[0].confirm()
    assert files(tmp_path) == ["00000003.json"]
    others[0].release()


def test_former_holder_notices_before_it_writes(tmp_path):
    suspended = take(tmp_path, me=elsewhere(), renew_s=600)
    new = take(tmp_path, watch_s=0)
    with pytest.raises(CheckpointError) as error:
        suspended.confirm()
    assert str(error.value).startswith(f"train.output_dir={tmp_path}: another run took over this directory (host ")
    assert str(error.value).endswith("this run stops without writing anything more")
    suspended.release()
    new.confirm()
    assert files(tmp_path) == ["00000002.json"]
    new.release()


def test_file_that_a_cached_directory_does_not_show_is_found_by_its_number(tmp_path, monkeypatch):
    """NFS can show an old listing that lacks a file. Creating the file then fails, because it already exists."""
    holder = take(tmp_path)
    monkeypatch.setattr(leases, "_newest", lambda folder: None)
    refused(tmp_path, os.uname().nodename, os.getpid())
    monkeypatch.undo()
    holder.confirm()
    holder.release()


def test_unreadable_storage_is_not_refused_before_the_run_takes_the_lease(tmp_path):
    (tmp_path / "lease").write_text("")
    leases.refuse_if_held(tmp_path)
    with pytest.raises(OSError, match="Not a directory"):
        take(tmp_path)


HOLDER = """
import sys, time
from pathlib import Path
from dpo_engine.checkpoint.lease import take
take(Path(sys.argv[1]), renew_s=0.1)
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["taken over", "removed"])
def test_former_holder_stops_at_its_next_renewal(tmp_path, how):
    output, codes = tmp_path / "out", tmp_path / "codes"
    env = {**os.environ, "DPO_EXIT_CODES": str(codes)}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(output)], stdout=-1, stderr=-1, env=env, text=True)
    assert process.stdout.readline() == "held\n"
    path = output / "lease/00000001.json"
    if how == "taken over":
        os.kill(process.pid, signal.SIGSTOP)
        path.write_text(path.read_text().replace(leases.machine(), "another boot"))
        new = take(output, watch_s=0)
        os.kill(process.pid, signal.SIGCONT)
    else:
        path.unlink()
    _, said = process.communicate(timeout=10)
    assert process.returncode == 4 and codes.read_text() == "4\n"
    why = "another run took over this directory (host" if how == "taken over" else "this run no longer holds the dir"
    assert said.count("\n") == 1 and said.startswith(f"train.output_dir={output}: {why}")
    if how == "taken over":
        new.confirm()
        new.release()


def test_storage_that_fails_for_a_while_does_not_stop_the_run(tmp_path, monkeypatch):
    lease = take(tmp_path, renew_s=0.05)

    def failing(*asked, **options):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", failing)
        patch.setattr(os, "utime", failing)
        time.sleep(0.2)
    os.utime(lease.path, (1, 1))
    deadline = time.monotonic() + 5
    while os.stat(lease.path).st_mtime == 1:
        assert time.monotonic() < deadline, "the renewals must resume when the storage works"
        time.sleep(0.01)
    lease.confirm()
    lease.release()


def test_full_disk_leaves_no_lease(tmp_path, monkeypatch):
    def full(*asked):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(leases.HashedFile, "write", full)
        with pytest.raises(OSError, match="No space left"):
            take(tmp_path)
    assert files(tmp_path) == []
    take(tmp_path).release()


RACE = """
import os, sys, time
from pathlib import Path
from dpo_engine.checkpoint.lease import take
from dpo_engine.errors import CheckpointError
print("ready", flush=True)
for line in sys.stdin:
    output, at = line.split()
    while time.time() < float(at):
        pass
    try:
        lease = take(Path(output))
        time.sleep(0.03)
        lease.confirm()
        print("took", flush=True)
        sys.stdin.readline()
        lease.release()
    except CheckpointError as error:
        print("refused" if "another run is writing there" in str(error) else error, flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize("turns", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_races_have_one_winner(turns, tmp_path):
    """In each turn, four processes try to take the lease of a new directory at the same moment.

    In every second turn, the directory contains the lease of a dead process.
    """
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE], stdin=-1, stdout=-1, text=True, bufsize=1) for _ in range(4)
    ]
    assert all(racer.stdout.readline() == "ready\n" for racer in racers)
    for turn in range(turns):
        output = tmp_path / str(turn)
        if turn % 2:
            plant(output, replace(Holder.here({}), pid=2**22 + 1), number=turn)
        for racer in racers:
            racer.stdin.write(f"{output} {time.time() + 0.005}\n")
        said = sorted(racer.stdout.readline() for racer in racers)
        assert said == ["refused\n"] * 3 + ["took\n"], f"turn {turn}"
        for racer in racers:
            racer.stdin.write("\n")
    for racer in racers:
        racer.stdin.close()
        assert racer.wait(10) == 0


def raising(error):
    def call():
        raise error

    return call


def test_a_failed_save_names_a_takeover_but_not_a_second_error_of_the_storage():
    saving, taken = CheckpointError("step 4 was not saved"), CheckpointError("another run took over")
    storage = OSError(errno.EIO, "Input/output error", "/out")
    for confirm, expected in (
        (lambda: None, saving),
        (raising(taken), taken),
        (raising(storage), saving),
        (as_checkpoint_error(raising(storage), Path("/out")), saving),
    ):
        with pytest.raises(CheckpointError) as found:
            unless_taken_over(raising(saving), confirm)()
        assert found.value is expected
    assert unless_taken_over(lambda: 3, raising(taken))() == 3
