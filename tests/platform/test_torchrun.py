"""Tests of the module that starts torchrun: after a signal, ranks can save, and further signals do no harm."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dpo_engine.exit_code import forget_earlier_start
from dpo_engine.platform import torchrun

# A rank that needs $WORK_S seconds to save after its first signal.
RANK = """import os, signal, sys, time
here = sys.argv[1]
received = []
signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
signal.signal(signal.SIGTERM, lambda *_: received.append(1))
open(f"{here}/ready", "w").close()
while not received:
    time.sleep(0.05)
end = time.monotonic() + float(os.environ["WORK_S"])
while time.monotonic() < end:
    time.sleep(0.05)
open(f"{here}/saved", "w").close()
sys.exit(75)
"""


def signaled(folder, work_s, times, limit=None):
    """Start a rank with torchrun, and send `times` signals to torchrun.

    Returns torchrun's output, and whether the rank has saved.
    """
    (folder / "rank.py").write_text(RANK)
    environment = {**os.environ, "WORK_S": str(work_s)}
    environment.pop(torchrun.LIMIT, None)
    if limit is not None:
        environment[torchrun.LIMIT] = str(limit)
    command = [sys.executable, "-m", "dpo_engine.platform.torchrun", "--standalone", "--nproc-per-node", "1"]
    log = folder / "log"  # not a pipe, because ranks that outlive torchrun would keep it open
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, str(folder / "rank.py"), str(folder)], env=environment, stdout=file, stderr=file
        )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "ready").exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        for _ in range(times):
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.3)
        process.wait(timeout=work_s + 60)
        return log.read_text(), (folder / "saved").exists()
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_repeated_signals_do_not_end_torchrun_before_its_ranks(tmp_path):
    said, saved = signaled(tmp_path, work_s=1.3, times=4)
    assert saved and "forcefully exiting" not in said and "Traceback" not in said


@pytest.mark.slow
def test_ranks_have_more_than_30_s(tmp_path):
    said, saved = signaled(tmp_path, work_s=34, times=1)
    assert saved and "forcefully exiting" not in said


@pytest.mark.slow
def test_limit_of_the_environment_applies(tmp_path):
    """The limit must also apply with versions of torch that do not read the environment variable."""
    said, saved = signaled(tmp_path, work_s=20, times=1, limit=1)
    assert "forcefully exiting" in said and not saved


def test_signal_before_the_ranks_exist_loses_no_work(tmp_path):
    """The signal arrives while torchrun imports torch."""
    program = (
        "import os, signal, sys\n"
        "from dpo_engine.platform import torchrun\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            os.kill(os.getpid(), signal.SIGUSR1)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "torchrun.main()\n"
    )
    environment = {**os.environ, "DPO_EXIT_CODES": str(tmp_path / "codes")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 75 and (tmp_path / "codes").read_text() == "75\nno-progress\n"
    assert done.stderr == "SIGUSR1: stopped before the ranks were started; no work was lost\n"


def test_invalid_limit_is_refused():
    command = [sys.executable, "-m", "dpo_engine.platform.torchrun", "--standalone", "script.py"]
    environment = {**os.environ, torchrun.LIMIT: "1.5"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == (
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1.5: must be a whole number of seconds; unset it to wait 3600 s\n"
    )


@pytest.mark.parametrize(
    ("variables", "lines"),
    [({}, 0), ({"TORCHELASTIC_RUN_ID": "1"}, 1), ({"TORCHELASTIC_RUN_ID": "1", torchrun.LIMIT: "200"}, 0)],
    ids=["srun", "torchrun", "a limit"],
)
def test_log_names_the_limit_of_torchrun(variables, lines, monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", torchrun.LIMIT):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = torchrun.describe_limit()
    assert len(found) == lines and all("30 s after a signal" in line for line in found)


@pytest.mark.parametrize(
    ("restarts", "rank", "left"),
    [("0", "0", "6\n"), ("1", "1", "6\n"), ("1", "0", "")],
    ids=["no restarts", "rank 1", "rank 0"],
)
def test_restarted_ranks_forget_the_exit_codes_of_the_earlier_start(restarts, rank, left, monkeypatch, tmp_path):
    (tmp_path / "codes").write_text("6\n")
    monkeypatch.setenv("DPO_EXIT_CODES", str(tmp_path / "codes"))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("RANK", rank)
    forget_earlier_start()
    assert (tmp_path / "codes").read_text() == left
