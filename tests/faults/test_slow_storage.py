"""Tests of storage that is slower than `parallel.timeout_s`, and of ranks that die or fail while others wait."""

import builtins
import errno
import io
import os
import re
import signal
import time

import pytest
from safetensors.torch import load_file

from support.jobs import run_job
from support.outcomes import steps_of

TIMEOUT_S = 2
SLOW_S = 2.5
WITHIN_S = 5.0
HASTY = {"parallel": {"timeout_s": TIMEOUT_S}, "optim": {"schedule": "constant"}}
SHORT = {**HASTY, "train": {"max_steps": 2}, "checkpoint": {"save_interval": 2}}
PLACES = (
    r"\.tmp\.\w+/rank_.*",
    r"\.tmp\.\w+/manifest",
    r"\.tmp\.\w+$",
    r"\.tmp\.\w+/metrics",
    r"latest",
    r"step_\d+/rank_",
    r"step_\d+/manifest",
    r"config\.yaml",
    r"/\.metrics",
    r"/metrics",
    r"cache/pairs-",
    r"reference/.*\.arrow\.",
    r"reference/.*\.arrow$",
    r"eval/.*parquet",
    r"\.hf.*/stage-",
    r"\.hf.*/README",
    r"\.hf\w*\.partial$",
    r"llama.*/model\.safetensors",
    r"tok\.model",
)
"""Patterns of paths. For each pattern, only the first access of a process to a matching path is slow."""


def slow_storage(rank, log, places=PLACES, seconds=SLOW_S):
    """Return a ``before`` hook: on one rank, the first access to each of the `places` takes `seconds` longer.

    A place is a pattern of paths. An access opens, syncs or renames a file. Accesses before the ranks have connected do
    not count and are not slow. Each slow access adds a line to `log`.
    """

    def before():
        import torch.distributed as dist
        from safetensors import safe_open as opened

        from dpo_engine.checkpoint import shards
        from dpo_engine.model.weights import files

        if os.environ["RANK"] != str(rank):
            return
        left = list(places)

        def slowly(name, original):
            def call(target, *rest, **options):
                path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
                place = next((place for place in left if re.search(place, path)), None)
                if place is not None and dist.is_initialized():
                    left.remove(place)
                    line = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                    os.write(line, f"{name} {path}\n".encode())
                    os.close(line)
                    time.sleep(seconds)
                return original(target, *rest, **options)

            return call

        for name in ("fsync", "rename", "replace"):
            setattr(os, name, slowly(name, getattr(os, name)))
        builtins.open = io.open = slowly("open", io.open)
        shards.safe_open = files.safe_open = slowly("open", opened)

    return before


READ = (r"step_\d+/rank_", r"step_\d+/manifest")
VERBS = {
    "train": (["train"], PLACES, 14),
    "resume": (["train", "train.epochs=3"], (*READ, r"/\.metrics", r"cache/pairs-", r"reference/.*\.arrow$"), 4),
    "eval": (["eval"], (*READ, r"eval/.*parquet"), 3),
    "export": (["export", "--best"], (*READ, r"/metrics", r"\.hf.*/stage-"), 4),
}
"""For each command, its arguments, the slow places, and the minimum number of slow accesses on rank 0."""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_every_place_is_slow(asynchronous, run_yaml, tmp_path):
    checkpoint = {"save_interval": 4, "export": True, "async_save": asynchronous}
    train = {"eval_interval": 4}
    run = run_yaml(**HASTY, reference={"mode": "stored"}, checkpoint=checkpoint, train=train)
    for name, ((verb, *options), places, least) in list(VERBS.items())[: None if asynchronous else 1]:
        log = tmp_path / f"{name}.slow"
        before = slow_storage(0, log, places)
        done = run_job([verb, str(run), *options], 2, tmp_path / "log", before=before, timeout_s=240)
        assert done.codes == [0, 0], done.said
        assert len(log.read_text().splitlines()) >= least, log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_other_rank_is_slow(parallel, run_yaml, tmp_path):
    """Rank 1 is slow. With pp 2, it also writes a part of the export."""
    sections = {**SHORT, "checkpoint": {"save_interval": 2, "async_save": False, "export": True}}
    run = run_yaml(**{**sections, "parallel": {**parallel, "timeout_s": TIMEOUT_S}})
    log = tmp_path / "slow"
    done = run_job(["train", str(run)], 2, tmp_path / "log", before=slow_storage(1, log))
    assert done.codes == [0, 0], done.said
    assert "rank_00001" in log.read_text() and ("/stage-00001" in log.read_text()) == ("pp" in parallel)
    assert (tmp_path / "run/hf/config.json").exists()


WAITS = {
    "save": (r"\.tmp\.\w+/rank_", False),
    "async save": (r"\.tmp\.\w+/rank_", True),
    "export": (r"\.hf\.partial/", True),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "victim"), [("save", 0), ("save", 1), ("async save", 1), ("export", 0)])
def test_death_is_noticed_while_the_others_wait(name, victim, run_yaml, tmp_path):
    """Rank 0 writes a file for a minute. Meanwhile, either rank 0 or the waiting rank 1 is killed."""
    place, asynchronous = WAITS[name]
    checkpoint = {"save_interval": 2, "async_save": asynchronous, "export": True}
    run, log = run_yaml(**{**SHORT, "checkpoint": checkpoint}), tmp_path / "slow"

    def kill(pids):
        deadline = time.monotonic() + 60
        while not log.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(TIMEOUT_S + 1)
        os.kill(pids[victim], signal.SIGKILL)

    done = run_job(["train", str(run)], 2, tmp_path / "log", before=slow_storage(0, log, (place,), 60), during=kill)
    assert done.codes[victim] == -signal.SIGKILL and done.codes[1 - victim] == 6 and not done.survivors
    assert done.seconds[1 - victim] - done.seconds[victim] < WITHIN_S
    assert f"rank {victim} died or lost its connection" in done.errors[1 - victim]


def failing(call, code, wanted):
    """Return a ``before`` hook that makes `os.<call>` fail on rank 0 for paths that match `wanted`."""

    def before():
        original = getattr(os, call)

        def fail(target, *rest, **options):
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
            if re.search(wanted, path) and os.environ["RANK"] == "0":
                raise OSError(code, os.strerror(code), path)
            return original(target, *rest, **options)

        setattr(os, call, fail)

    return before


FAILURES = {
    "injected": ({"fault": "export:1:1:enospc"}, "hf: cannot be written ([Errno 28] No space left on device", "export"),
    "no permission": ({"before": failing("mkdir", errno.EACCES, r"\.hf\.partial$")}, "hf: cannot be written", "export"),
    "fsync": ({"before": failing("fsync", errno.EIO, r"\.hf\.partial/")}, "hf: cannot be written", "export"),
    "rename": ({"before": failing("rename", errno.ENOSPC, r"\.hf\.partial$")}, "hf: cannot be written", "export"),
    "evaluation": ({"before": failing("fsync", errno.ENOSPC, r"eval/")}, "parquet: cannot be written", "eval"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "injected" else pytest.mark.slow) for name in FAILURES]
)
def test_result_that_could_not_be_written_is_written_later(name, run_yaml, tmp_path):
    options, what, verb = FAILURES[name]
    run = run_yaml(**{**SHORT, "checkpoint": {"save_interval": 2, "export": True}})
    done = run_job(["train", str(run)], 2, tmp_path / "log", **options)
    lines = [line for line in done.said.splitlines() if not line.startswith("DPO_FAULT")]
    assert done.codes == [4, 4] and len(lines) == 1 and what in lines[0], done.said
    way_out = f"; the checkpoint for step 2 is saved; write the result later with `dpo-engine {verb} RUN.yaml`"
    assert lines[0].endswith(way_out)
    assert not list((tmp_path / "run").glob(".hf*")) and not (tmp_path / "run/hf").exists()
    later = run_job([verb, str(run)], 2, tmp_path / "later")
    assert later.codes == [0, 0], later.said
    if verb == "export":
        assert load_file(tmp_path / "run/hf_step_00000002/model.safetensors")
    else:
        assert (tmp_path / "run/eval/step_00000002.parquet").exists()
    assert [line["step"] for line in steps_of(tmp_path / "run")] == [1, 2]
