"""Fault tests: kill one rank of a run in one phase.

The other ranks must exit, and a restart must give the metrics of an uninterrupted run. For each phase in `PHASES` and
each layout, the tests kill about half of the ranks, one rank per test.
"""

import signal

import pytest

from support.jobs import run_job
from support.outcomes import LAYOUTS, trajectory
from support.small_run import write_run

# The run has 6 steps. It saves after steps 2, 4 and 6, and deletes the oldest checkpoint after the last save. It
# evaluates after step 3 and at the end. `PHASES` maps each phase to the occurrence of the phase at which the fault is
# injected. If a phase occurs several times, the fault is in step 3, in the evaluation after step 3, or in the second
# save. `None` means the first micro-batch of step 3.
PHASES = {
    "rendezvous": 1,
    "data": 1,
    "reference": 3,
    "forward": None,
    "reduce": 3,
    "optimizer": 3,
    "save-begin": 2,
    "save-shard": 2,
    "save-shards": 2,
    "save-manifest": 2,
    "save-rename": 2,
    "save-pointer": 2,
    "retention": 1,
    "eval": 1,
    "shutdown": 1,
}
SHORT = {"train": {"max_steps": 6, "eval_interval": 3}, "checkpoint": {"save_interval": 2}}
DEFAULT = {
    ("pp2", "save-shard", 1),
    ("dp2", "save-manifest", 0),
    ("pp2", "retention", 0),
}


def victims(layout: str, phase: str) -> set[int]:
    """Return the ranks to kill, each in its own run: half of the ranks, and the ranks in `DEFAULT` for this case.

    The half consists of either the even or the odd ranks. This choice alternates between layouts and between phases. In
    each phase, rank 0 is therefore killed with some of the layouts, but not with all.
    """
    world = LAYOUTS[layout][0]
    first = [*LAYOUTS].index(layout) + [*PHASES].index(phase)
    return {(first + 2 * i) % world for i in range(world // 2)} | {
        one[2] for one in DEFAULT if one[:2] == (layout, phase)
    }


CASES = [
    pytest.param(layout, phase, rank, marks=() if (layout, phase, rank) in DEFAULT else pytest.mark.slow)
    for layout in LAYOUTS
    for phase in PHASES
    for rank in sorted(victims(layout, phase))
]


def sections(parallel: dict) -> dict:
    return {**{name: dict(values) for name, values in SHORT.items()}, "parallel": parallel}


@pytest.fixture(scope="module")
def whole(run_files, tiny_hf, tmp_path_factory):
    """Return a function that trains once per layout, without a kill, and returns the metrics of this run."""
    known = {}

    def of(layout: str) -> list[dict]:
        if layout not in known:
            folder = tmp_path_factory.mktemp("whole")
            world, parallel = LAYOUTS[layout]
            path = write_run(folder, "run", run_files, tiny_hf, sections(parallel))
            finished = run_job(["train", str(path)], world, folder / "log")
            assert finished.codes == [0] * world, finished.said
            known[layout] = trajectory(folder / "run")
        return known[layout]

    return of


@pytest.mark.parametrize("layout, phase, rank", CASES)
def test_killed_rank_ends_the_job_and_the_restart_matches(layout, phase, rank, whole, run_yaml, tmp_path):
    world, parallel = LAYOUTS[layout]
    expected = whole(layout)
    # If a peer is killed before it connects, the other ranks can only wait until their timeout.
    patience = {"timeout_s": 3} if phase == "rendezvous" else {}
    run = run_yaml(**sections({**parallel, **patience}))
    micro_batches = 2 // (world // (parallel.get("tp", 1) * parallel.get("pp", 1)))
    nth = PHASES[phase] or 2 * micro_batches + 1
    died = run_job(["train", str(run)], world, tmp_path / "log", fault=f"{phase}:{rank}:{nth}:kill", timeout_s=60)
    assert died.codes[rank] == -signal.SIGKILL and f"DPO_FAULT: {phase}" in died.errors[rank], died.said
    others = [code for other, code in enumerate(died.codes) if other != rank]
    if phase != "shutdown":
        assert set(others) == {6}, died.said
    late = [seconds - died.seconds[rank] for other, seconds in enumerate(died.seconds) if other != rank]
    assert max(late) < 5 + patience.get("timeout_s", 0) and not died.survivors
    again = run_job(["train", str(run)], world, tmp_path / "log")
    assert again.codes == [0] * world, again.said
    assert trajectory(tmp_path / "run") == expected
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"step_00000004", "step_00000006", "latest"}


def test_the_last_step_is_saved_before_its_evaluation(whole, run_yaml, tmp_path):
    expected = whole("dp2")
    run = run_yaml(**sections(LAYOUTS["dp2"][1]))
    died = run_job(["train", str(run)], 2, tmp_path / "log", fault="eval:0:2:kill", timeout_s=60)
    assert died.codes == [-signal.SIGKILL, 6], died.said
    assert (tmp_path / "run" / "checkpoints" / "step_00000006").is_dir()
    again = run_job(["train", str(run)], 2, tmp_path / "log")
    assert again.codes == [0, 0] and "resumed after step 6" in again.output[0], again.said
    assert trajectory(tmp_path / "run") == expected
