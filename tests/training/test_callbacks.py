"""Tests of callbacks: the order and arguments of calls, added metrics, the end of a run, and errors."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from dpo_engine.errors import ConfigError
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.training.callbacks import Callback, Callbacks
from support.small_run import config_of, log_of, run


@dataclasses.dataclass
class Recorder(Callback):
    """A callback that writes every call to a file, and adds a metric to every step.

    After step ``last_step`` (0: never), it returns ``returned`` on the ranks ``asking_ranks``. The default value of
    ``returned`` ends the run.
    """

    folder: str
    last_step: int = 0
    asking_ranks: tuple = (0, 1)
    returned: object = "enough"

    def _note(self, trainer, event, *seen):
        self.rank = trainer.engine.groups.world.rank()
        with open(f"{self.folder}/{self.rank}.jsonl", "a") as file:
            file.write(json.dumps([event, trainer.step, *map(str, seen)]) + "\n")

    def on_start(self, trainer):
        self._note(trainer, "start")

    def on_step(self, trainer, metrics):
        self._note(trainer, "step")
        metrics["twice_the_loss"] = 2 * metrics["loss"]
        return self.returned if trainer.step == self.last_step and self.rank in self.asking_ranks else None

    def on_eval(self, trainer, metrics):
        self._note(trainer, "eval", metrics["loss"])

    def on_save(self, trainer, directory):
        self._note(trainer, "save", directory.name)

    def on_end(self, trainer):
        self._note(trainer, "end")


def run_with_recorder(config):
    from dpo_engine.training.callbacks import CALLBACKS

    CALLBACKS["recorder"] = Recorder
    return run(config)


def recorded(folder, rank=0):
    return [json.loads(line) for line in (folder / f"{rank}.jsonl").read_text().splitlines()]


@pytest.fixture
def start(files, tiny_hf, tmp_path):
    """Return a function that trains at most 6 steps on two ranks. Its keyword arguments are options of the recorder."""

    def train(**options):
        run_config = config_of(
            files,
            tiny_hf("llama", num_hidden_layers=2),
            tmp_path / "run",
            parallel={"pp": 2},
            train={"eval_interval": 2, "max_steps": 6},
            checkpoint={"save_interval": 2, "export": False},
            callbacks={"recorder": {"folder": str(tmp_path), **options}},
        )
        return run_ranks(run_with_recorder, 2, config=run_config)

    return train


def test_calls_and_added_metrics(start, tmp_path):
    summary = start()[0]
    calls = recorded(tmp_path)
    assert [step for event, step, *_ in calls if event == "step"] == [1, 2, 3, 4, 5, 6]
    lines = log_of(tmp_path / "run")
    assert [line["twice_the_loss"] for line in lines if "loss" in line] == [
        2 * line["loss"] for line in lines if "loss" in line
    ]
    evaluations = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    assert {step: float(loss) for event, step, *rest in calls if event == "eval" for loss in rest} == evaluations
    saves = [rest[0] for event, _, *rest in calls if event == "save"]
    assert saves == ["step_00000002", "step_00000004", "step_00000006"]
    assert calls[0] == ["start", 0] and calls[-1] == ["end", 6] and summary["step"] == 6
    assert recorded(tmp_path, rank=1) == calls


def test_one_rank_ends_the_run(start, tmp_path):
    """The run ends cleanly on all ranks. A new start with the same options trains no further steps.

    A new start with other options continues the run.
    """
    first = start(last_step=3, asking_ranks=[1])
    assert [summary["step"] for summary in first] == [3, 3] and "loss" in first[0]["eval"]
    saved = tmp_path / "run" / "checkpoints" / "step_00000003" / "manifest.json"
    assert json.loads(saved.read_text())["run"]["stopped"]["reason"] == "enough"
    assert start(last_step=3, asking_ranks=[1])[0]["step"] == 3
    assert [step for event, step, *_ in recorded(tmp_path) if event == "step"] == [1, 2, 3]
    assert start(last_step=5)[0]["step"] == 5


def test_a_return_value_that_is_no_reason(start):
    kind, message = start(last_step=1, returned=True)[0]
    assert kind == "ConfigError"
    assert message == "callbacks.recorder: on_step returned true; return None, or text with the reason to end the run"


class Setting(Callback):
    """A callback that sets metrics in every step, and fails at the end."""

    def __init__(self, **metrics):
        self.metrics = metrics

    def on_step(self, run, metrics):
        metrics.update(self.metrics)

    def on_end(self, run):
        raise OSError("the storage is full")


def test_numbers_of_numpy_become_python_numbers():
    metrics = {"loss": 0.5}
    Callbacks({"callbacks.mine": Setting(mine=np.float32(0.25), count=np.int64(3))}).step(None, metrics)
    assert json.dumps(metrics) == '{"loss": 0.5, "mine": 0.25, "count": 3.0}'


@pytest.mark.parametrize(
    "metrics, says",
    [
        ({"loss": 0.1}, "callbacks.mine: on_step changed or removed a metric; add metrics under other names"),
        ({"mine": "high"}, "callbacks.mine: on_step set the metric mine to high; set a number"),
    ],
)
def test_metrics_that_cannot_be_logged_are_refused(metrics, says):
    with pytest.raises(ConfigError) as refused:
        Callbacks({"callbacks.mine": Setting(**metrics)}).step(None, {"loss": 0.5})
    assert str(refused.value) == says


def test_an_error_at_the_end_does_not_stop_other_callbacks(capsys):
    said = []
    last = Setting()
    last.on_end = lambda run: said.append("ended")
    line = "callbacks.mine: on_end failed: OSError: the storage is full"
    for rank in (0, 1):
        world = SimpleNamespace(rank=lambda rank=rank: rank)
        engine = SimpleNamespace(groups=SimpleNamespace(world=world))
        run = SimpleNamespace(engine=engine, sinks=SimpleNamespace(say=said.append))
        Callbacks({"callbacks.mine": Setting(), "callbacks.last": last}).end(run)
    assert said == [line, "ended", "ended"]
    assert capsys.readouterr().err == f"{line}\n", "only rank 1, whose sinks print nothing, must write to stderr"
