"""Tests of interruptions by signals, by the time limit, and by callbacks.

A signal to one rank must stop all ranks after the same step, and the state must be saved.
"""

import os
import signal
import time

import pytest

from dpo_engine.testing.ranks import run_ranks
from dpo_engine.verbs.rehearse import CLOCK
from support.small_run import config_of, log_of


def run_and_signal(config, numbers, at_step):
    """Train, and send the signals ``numbers`` to rank 0 in step ``at_step``. Return the error or the run's summary."""
    from torch import distributed as dist

    from dpo_engine.errors import EngineError
    from dpo_engine.training import trainer
    from dpo_engine.training.interruption import Interruption
    from dpo_engine.verbs.train import train

    original = trainer.Trainer.train_one

    def train_one(self, indices):
        if dist.get_rank() == 0 and self.step + 1 == at_step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(self, indices)

    trainer.Trainer.train_one = train_one
    try:
        with Interruption() as interruption:
            return train(config, interruption)
    except EngineError as error:
        return type(error).__name__, error.exit_code, str(error)


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param([signal.SIGTERM], marks=pytest.mark.slow),
        pytest.param([signal.SIGUSR1, signal.SIGUSR1], marks=pytest.mark.slow),
        pytest.param([signal.SIGINT, signal.SIGTERM], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_step_is_finished_and_saved(numbers, files, tiny_hf, tmp_path):  # noqa: F811
    model = tiny_hf("llama")
    whole = config_of(files, model, tmp_path / "whole", parallel={"tp": 2})
    run_ranks(run_and_signal, 2, config=whole, numbers=[], at_step=0)
    config = config_of(files, model, tmp_path / "stopped", parallel={"tp": 2})
    outcomes = run_ranks(run_and_signal, 2, config=config, numbers=numbers, at_step=2)
    expected = f"{signal.Signals(numbers[0]).name}: stopped after step 2 of 6 and saved a checkpoint"
    for kind, code, message in outcomes:
        assert (kind, code) == ("Interrupted", 75) and message.startswith(expected)
    left = sorted(path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir())
    assert left == ["latest", "step_00000002"]
    assert run_ranks(run_and_signal, 2, config=config, numbers=[], at_step=0)[0]["step"] == 6

    def trajectory(folder):
        return [{k: v for k, v in line.items() if k not in CLOCK} for line in log_of(folder) if "loss" in line]

    assert trajectory(tmp_path / "stopped") == trajectory(tmp_path / "whole"), (
        "no step may be lost, and metrics must be bitwise equal"
    )


def test_signal_in_the_last_step_lets_the_run_finish(files, tiny_hf, tmp_path):  # noqa: F811
    config = config_of(files, tiny_hf("llama"), tmp_path)
    summary = run_ranks(run_and_signal, 1, config=config, numbers=[signal.SIGTERM], at_step=6)[0]
    assert summary["step"] == 6 and (tmp_path / "eval/step_00000006.parquet").is_file()


def handlers(number, device):
    from torch import distributed as dist

    from dpo_engine.training.interruption import SIGNALS, Interruption

    def now():
        return [signal.getsignal(number) for number in SIGNALS]

    before = now()
    with Interruption() as interruption:
        assert now() != before and interruption.agreed(dist.group.WORLD, device) is None
        if number:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGUSR1)
        found = interruption.agreed(dist.group.WORLD, device)
    return found, now() == before, now() == [signal.SIG_IGN] * len(SIGNALS)


def test_handlers_are_restored_unless_a_signal_arrived():
    import torch

    assert run_ranks(handlers, 1, number=0, device=torch.device("cpu")) == [(None, True, False)]
    expected = ("SIGTERM", False, True)  # the first of the two signals counts
    assert run_ranks(handlers, 1, number=signal.SIGTERM, device=torch.device("cpu")) == [expected]


def test_later_signals_are_ignored(capfd):
    from dpo_engine.training.interruption import Interruption

    with Interruption() as interruption:
        interruption._met.set()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        assert interruption.received == signal.SIGUSR1
    for number, handler in interruption._before.items():
        signal.signal(number, handler)
    assert capfd.readouterr().err == ""


def limited(rank_0_late, device):
    from torch import distributed as dist

    from dpo_engine.training import interruption as module

    group, now = dist.group.WORLD, 1000.0
    module.time = type("Clock", (), {"time": staticmethod(lambda: now), "monotonic": staticmethod(lambda: now)})
    os.environ["SLURM_JOB_START_TIME"] = "900"
    one = module.Interruption()
    one.limit(200)  # the job started at 900, so the limit is at 1100
    one.save_s = 30.0
    found = [one.agreed(group, device, after="step")]
    for later in (20.0, 40.0, 5.0):
        now += later if group.rank() == 0 or not rank_0_late else 500.0
        found.append(one.agreed(group, device, after="step"))
    return found


def limited_with_evaluations(device):
    from torch import distributed as dist

    from dpo_engine.training import interruption as module

    group, now = dist.group.WORLD, 1000.0
    module.time = type("Clock", (), {"time": staticmethod(lambda: now), "monotonic": staticmethod(lambda: now)})
    os.environ["SLURM_JOB_START_TIME"] = "900"
    one = module.Interruption()
    one.limit(300)  # the job started at 900, so the limit is at 1200
    found = []
    for what, took in (("step", 1.0), ("evaluation", 100.0), *[("step", 1.0)] * 20):
        now += took
        found.append(one.agreed(group, device, after=what))
    return found


def test_time_limit_leaves_room_for_an_evaluation():
    """The limit is at 1200. From 1101 on, an evaluation of 100 s would end too late, so every check stops the run."""
    import torch

    expected = [None] + ["train.save_by"] * 21
    assert run_ranks(limited_with_evaluations, 1, device=torch.device("cpu")) == [expected]


@pytest.mark.parametrize("rank_0_late", [False, True])
def test_time_limit_leaves_room_for_a_step_and_a_save(rank_0_late):
    """The limit is at 1100, and only the clock of rank 0 counts.

    A step of 40 s and a save of 30 s end in time if the step starts at 1020, but not if the step starts at 1060.
    """
    import torch

    expected = [None, None, "train.save_by", "train.save_by"]
    assert run_ranks(limited, 2, rank_0_late=rank_0_late, device=torch.device("cpu")) == [expected] * 2


def agreed(received, finishing):
    from torch import device, distributed

    from dpo_engine.training.interruption import Interruption

    interruption, rank = Interruption(), distributed.get_rank()
    interruption.received, interruption.finish = received[rank], finishing[rank]
    return interruption.agreed(distributed.group.WORLD, device("cpu")), interruption.finish


def test_signal_stops_a_run_that_a_callback_wants_to_end():
    """If a signal arrives, all ranks stop for the signal, even if a callback wants to end the run.

    Without a signal, a callback on one rank ends the run on all ranks.
    """
    stopped = [("SIGTERM", True), ("SIGTERM", False)]
    assert run_ranks(agreed, 2, received=[signal.SIGTERM, 0], finishing=[True, False]) == stopped
    assert run_ranks(agreed, 2, received=[0, 0], finishing=[False, True]) == [(None, True)] * 2
