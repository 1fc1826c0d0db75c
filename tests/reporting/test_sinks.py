"""Tests of metric sinks: each sink's output, ranks that have no sinks, and files of resumed runs."""

import io
import json
import math
import os
import re
import socket
import sqlite3
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError, DataError
from dpo_engine.reporting import console as console_sink
from dpo_engine.reporting.console import RichConsole, open_console
from dpo_engine.reporting.contract import SINKS, CannotOpen, Opening
from dpo_engine.reporting.sinks import open_sinks, open_trackers, try_open

METRICS = {
    "loss": 0.6931,
    "rewards/accuracies": 0.5,
    "rewards/margins": 0.0,
    "displacement/chosen": -1.25,
    "logps/chosen": -12.5,
    "grad_norm": 1.25,
    "learning_rate": 1e-6,
    "pairs_per_s": 12.0,
}


@pytest.fixture
def run(tmp_path):
    """Return a function that makes a config with the given `logging` section."""

    def make(**logging) -> Config:
        return Config.parse(
            {
                "model": {"path": "m"},
                "data": {"train": "a"},
                "train": {"output_dir": str(tmp_path / "out")},
                "logging": {"progress": "plain", **logging},
            }
        )

    return make


def lines_of(config: Config) -> list[dict]:
    with open(f"{config.train.output_dir}/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_jsonl_holds_every_metric_under_its_prefix(run):
    config = run()
    opened = open_sinks(config, total_steps=2, writer=True)
    opened.log(1, METRICS)
    assert lines_of(config) == [{"step": 1, **METRICS}]  # written immediately, not at the end of the run
    opened.log(1, {"loss": 0.7}, prefix="eval/")
    opened.log(2, {"loss": math.nan, "grad_norm": math.inf})
    opened.close()
    opened.close()
    assert lines_of(config)[1:] == [{"step": 1, "eval/loss": 0.7}, {"step": 2, "loss": None, "grad_norm": None}]


def test_resumed_run_removes_the_steps_that_it_repeats(run):
    config = run(progress="off")
    first = open_sinks(config, total_steps=4, writer=True)
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)})
    first.log(2, {"loss": 9.0}, prefix="eval/")
    first.close()
    with open(f"{config.train.output_dir}/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')  # as if the process had been killed during a write
    second = open_sinks(config, total_steps=4, writer=True, start_step=2)
    second.log(3, {"loss": 3.5})
    second.close()
    assert lines_of(config) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "eval/loss": 9.0},
        {"step": 3, "loss": 3.5},
    ]


def test_finished_run_does_not_log_its_last_step_again(run):
    config = run()
    done = open_sinks(config, total_steps=2, writer=True)
    done.log(2, METRICS)
    done.log(2, {"loss": 0.7}, prefix="eval/")
    done.close()
    expected = lines_of(config)
    again = open_sinks(config, total_steps=2, writer=True, start_step=2)
    again.log(2, {"loss": 0.7}, prefix="eval/")
    assert lines_of(config) == expected
    again.log(3, {"loss": 0.7}, prefix="eval/")
    assert lines_of(config) == [*expected, {"step": 3, "eval/loss": 0.7}]
    again.close()


def test_new_run_starts_with_an_empty_metrics_file(run):
    config = run(progress="off")
    for value in (1.0, 2.0):
        opened = open_sinks(config, total_steps=1, writer=True)
        opened.log(0, {"loss": value}, prefix="eval/")
        opened.close()
    assert lines_of(config) == [{"step": 0, "eval/loss": 2.0}]


def test_non_writing_ranks_write_nothing(run, tmp_path, capsys):
    opened = open_sinks(run(tensorboard=True), total_steps=1, writer=False)
    opened.log(1, METRICS)
    opened.say("hello")
    opened.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_plain_lines_show_step_metrics_and_eta(run, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console_sink.time, "monotonic", lambda: now[0])
    opened = open_sinks(run(), total_steps=100, writer=True)
    opened.say("hello")
    opened.log(1, METRICS)
    now[0] += 10
    opened.log(11, METRICS)
    opened.log(11, {"loss": 0.6, "rewards/accuracies": 0.75}, prefix="eval/")
    opened.close()
    numbers = (
        "loss 0.6931  accuracy 0.500  margin +0.0000  displacement -1.250  grad norm 1.25  lr 1.00e-06  pairs/s 12.0"
    )
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "hello"
    assert all(re.fullmatch(r".*  \d\d:\d\d:\d\d", line) for line in lines)
    assert [line[:-10] for line in lines] == [
        f"step   1/100  {numbers}  eta -",
        f"step  11/100  {numbers}  eta 0:01:29",
        "eval at step 11  loss 0.6000  accuracy 0.750",
    ]


def test_date_is_shown_in_the_first_line_of_a_day(run, capsys, monkeypatch):
    times = iter(["2026-11-28 23:59:58", "2026-11-28 23:59:59", "2026-11-29 00:00:00", "2026-11-29 00:00:01"])

    class FakeTime(datetime):
        @classmethod
        def now(cls):
            return cls.fromisoformat(next(times))

    monkeypatch.setattr(console_sink, "datetime", FakeTime)
    console = open_console("plain", 10, 0)
    for step in (1, 2, 3):
        console.write(step, {}, "eval/")
    ends = ["23:59:59", "2026-11-29 00:00:00", "00:00:01"]
    assert capsys.readouterr().out.splitlines() == [f"eval at step {i}  {end}" for i, end in enumerate(ends, 1)]


def test_log_file_keeps_the_lines_of_all_starts(run):
    config = run(progress="off")
    for start_step, error in ((0, None), (1, DataError("pairs.jsonl:3: \x1b[1mnot a record"))):
        opened = open_sinks(config, total_steps=20, writer=True, start_step=start_step)
        opened.say("two\nlines")
        opened.log(start_step + 1, {"loss": 0.5})
        opened.log(start_step + 1, {"loss": 0.25}, prefix="eval/")
        opened.close(error)
        opened.close()
    lines = Path(config.train.output_dir, "log.txt").read_text().splitlines()
    dated = [line for line in lines if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)]
    assert [line for line in lines if line not in dated] == ["lines", "lines"]
    where = f"process {os.getpid()} on {socket.gethostname()}"
    assert [line[20:] for line in dated] == [
        f"--- started after step 0 of 20, {where} ---",
        "two",
        "step  1/20  loss 0.5000",
        "eval at step 1  loss 0.2500",
        f"--- started again after step 1 of 20, {where} ---",
        "two",
        "step  2/20  loss 0.5000",
        "eval at step 2  loss 0.2500",
        "ended: pairs.jsonl:3: \\x1b[1mnot a record",
    ]


def test_progress_off_still_prints_messages(run, capsys):
    opened = open_sinks(run(progress="off"), total_steps=1, writer=True)
    opened.log(1, METRICS)
    opened.say("hello")
    opened.close()
    assert capsys.readouterr().out == "hello\n"


def test_terminal_gets_a_live_line(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    console = open_console("auto", 10, 0)
    assert isinstance(console, RichConsole)
    console.close()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert not isinstance(open_console("auto", 10, 0), RichConsole)


@pytest.mark.parametrize("width", [80, 160])
def test_live_line_shows_steps_eta_and_metrics(width):
    text = io.StringIO()
    terminal = Console(file=text, force_terminal=True, width=width, color_system=None)
    console = RichConsole(10, 2, force=True, console=terminal)
    console.say("[not markup]")
    console.write(3, METRICS, "")
    console.write(3, {"loss": 0.5}, "eval/")
    console.write(10, METRICS, "")
    console.close()
    shown = text.getvalue()
    assert "[not markup]" in shown and "eval at step 3  loss 0.5000" in shown
    assert "10/10" in shown and "loss 0.6931  accuracy 0.500  margin +0.0000  pairs/s 12.0" in shown


def test_tensorboard_gets_every_scalar(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = run(tensorboard=True, progress="off")
    opened = open_sinks(config, total_steps=2, writer=True)
    opened.log(1, METRICS)
    opened.log(2, {"loss": 0.5}, prefix="eval/")
    opened.close()
    events = EventAccumulator(f"{config.train.output_dir}/tensorboard")
    events.Reload()
    assert set(events.Tags()["scalars"]) == {*METRICS, "eval/loss"}
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("loss")] == [(1, 0.6931)]


def test_trackers_are_imported_only_if_configured():
    code = (
        "import sys; from dpo_engine.reporting import sinks; from dpo_engine.config.run import Config;"
        "names = {'wandb', 'mlflow', 'torch.utils.tensorboard', 'tensorboard', 'rich', 'megatron'};"
        "assert not names & set(sys.modules), names & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wandb_offline_needs_no_network_and_resumes_its_run(run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = run(wandb={"project": "p", "mode": "offline"}, progress="off")
    out = config.train.output_dir
    for start_step in (0, 1):
        opened = open_sinks(config, total_steps=2, writer=True, start_step=start_step)
        opened.log(start_step + 1, METRICS)
        opened.close()
    with open(f"{out}/wandb/run_id", encoding="utf-8") as file:
        run_id = file.read().strip()
    folders = [name for name in os.listdir(f"{out}/wandb") if name.startswith("offline-run-")]
    assert folders and all(run_id in name for name in folders)


def test_wandb_error_names_a_way_out(run, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def fail(**_):
        raise wandb.errors.CommError("no network\nmore")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(ConfigError) as caught:
        open_sinks(run(wandb={"project": "p"}), total_steps=1, writer=True)
    assert caught.value.problems == [
        "logging.wandb.project=p: W&B cannot be opened (no network); log in, or set logging.wandb.mode=offline"
    ]


def test_mlflow_gets_parameters_and_metrics_and_resumes_its_run(run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "tracking").as_uri()
    config = run(mlflow={"experiment": "e", "tracking_uri": uri}, progress="off")
    for start_step in (0, 1):
        opened = open_sinks(config, total_steps=2, writer=True, start_step=start_step)
        opened.log(start_step + 1, METRICS)
        opened.close()
    with open(f"{config.train.output_dir}/mlflow/run_id", encoding="utf-8") as file:
        run_id = file.read().strip()
    client = mlflow.MlflowClient(uri)
    assert [m.step for m in client.get_metric_history(run_id, "rewards/accuracies")] == [1, 2]
    assert client.get_run(run_id).data.params["optim.lr"] == "1e-06"


def test_mlflow_error_names_a_way_out(run):
    pytest.importorskip("mlflow")
    with pytest.raises(ConfigError, match=r"^logging.mlflow.experiment=e: MLflow cannot be opened \(.*\); check "):
        open_sinks(run(mlflow={"experiment": "e", "tracking_uri": "nonsense://x"}), total_steps=1, writer=True)


def test_full_disk_is_reported_once(tmp_path):
    """Use /dev/full as the metrics file. On Linux, every write to /dev/full fails."""
    from dpo_engine.reporting.sinks import JsonlSink

    sink = JsonlSink(tmp_path / "metrics.jsonl", 0)
    sink._file = open("/dev/full", "a", encoding="utf-8", buffering=1)
    with pytest.raises(OSError) as error:
        sink.write(1, {"loss": 0.5}, "")
    assert error.value.filename == "/dev/full"
    sink.close()


@pytest.fixture
def lists(monkeypatch):
    """Register :class:`ListSink` for one test."""
    monkeypatch.setitem(SINKS, "test_list", ListSink)


class ListSink:
    """A sink that keeps everything in lists. If `fails` is true, opening the sink raises an error."""

    opened: ClassVar[list] = []

    def __init__(self, opening, *, fails: bool = False):
        if fails:
            raise CannotOpen("no key", "log in")
        self.opening, self.lines, self.closed = opening, [], False
        self.opened.append(self)

    def write(self, step, values, prefix):
        self.lines.append((step, prefix, dict(values)))

    def close(self):
        self.closed = True


def test_registered_sink_gets_every_metric(run, tmp_path, lists):
    config = run(sinks={"test_list": {}}, progress="off")
    opened = open_sinks(config, total_steps=4, writer=True, start_step=2)
    opened.log(3, METRICS)
    opened.log(3, {"loss": 0.5}, prefix="eval/")
    opened.close()
    sink = ListSink.opened.pop()
    assert sink.opening == (config, tmp_path / "out", 2) and sink.closed
    assert sink.lines == [(3, "", METRICS), (3, "eval/", {"loss": 0.5})]


def test_sinks_that_cannot_be_opened_are_all_reported(run, tmp_path, lists):
    problem = "logging.sinks.test_list: cannot be opened (no key); log in"
    config = run(sinks={"test_list": {"fails": True}}, mlflow={"experiment": "e", "tracking_uri": "nonsense://x"})
    for attempt in (
        lambda: open_sinks(config, total_steps=1, writer=True),
        lambda: open_trackers(config, Opening(config, tmp_path, 0)),
    ):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert problem in caught.value.problems and len(caught.value.problems) == 2
    assert problem in try_open(config, tmp_path)
    unknown = run(sinks={"test_lst": {}})
    (line,) = try_open(unknown, tmp_path)
    assert line.startswith("logging.sinks.test_lst: no such sink; did you mean test_list? ")
    assert try_open(run(sinks={"test_list": {}}), tmp_path) == [] and ListSink.opened.pop().closed


def test_opened_sinks_are_closed_if_another_cannot_be_opened(run, tmp_path, lists, monkeypatch):
    monkeypatch.setitem(SINKS, "other", ListSink)
    with pytest.raises(ConfigError):
        open_sinks(run(sinks={"test_list": {}, "other": {"fails": True}}), total_steps=1, writer=True)
    assert ListSink.opened.pop().closed


def test_missing_package_of_a_sink(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert try_open(run(sinks={"trackio": {}}), tmp_path) == [
        "logging.sinks.trackio: cannot be opened (import of trackio halted; None in sys.modules); fix this, or remove "
        "the sink"
    ]


def tracked(config):
    """Start a run twice. The first start logs step 1, and the second one logs step 2."""
    for start_step in (0, 1):
        opened = open_sinks(config, total_steps=2, writer=True, start_step=start_step)
        opened.log(start_step + 1, METRICS)
        opened.log(start_step + 1, {"loss": 0.5}, prefix="eval/")
        opened.close()


@pytest.mark.slow
def test_trackio_stores_metrics_and_resumes_its_run(run, tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed: it needs pillow < 13, but the tested stack has 13")
    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio, trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "store")
    config = run(sinks={"trackio": {"project": "p"}}, progress="off")
    tracked(config)
    with sqlite3.connect(tmp_path / "store" / "p.db") as base:
        rows = base.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
    assert len({row[0] for row in rows}) == 1 and {row[1] for row in rows} == {
        (tmp_path / "out" / "trackio" / "run_id").read_text().strip()
    }
    assert [(row[2], json.loads(row[3])) for row in rows] == [
        *((1, METRICS), (1, {"eval/loss": 0.5}), (2, METRICS), (2, {"eval/loss": 0.5})),
    ]


@pytest.mark.slow
def test_swanlab_offline_writes_files_and_needs_no_network(run, tmp_path, monkeypatch):
    pytest.importorskip("swanlab", reason="swanlab is not installed: it needs protobuf 6, but the tested stack has 7")
    config = run(sinks={"swanlab": {"project": "p", "mode": "offline"}}, progress="off")
    tracked(config)
    stored = sorted((tmp_path / "out" / "swanlab").glob("run-*/run-*.swanlab"))
    assert len(stored) == 2 and all(b"eval/loss" in path.read_bytes() for path in stored)
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path / "no-account"))
    (line,) = try_open(run(sinks={"swanlab": {"mode": "online"}}), tmp_path)
    assert line.startswith("logging.sinks.swanlab: cannot be opened (") and line.endswith(
        "; log in, or set logging.sinks.swanlab.mode=offline"
    )
