"""Tests of extensions in a package outside the source tree. The extensions' code comes from docs/extending.md.

The fast tests run in this process, and import the package if they need it. The slow tests start other processes: one
test checks that importing the package does not import Megatron, and the other test trains through the command line.
"""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dpo_engine.config.run import Config, import_plugins
from dpo_engine.optim.optimizers import optimizer_problems
from dpo_engine.optim.schedules import schedule_problems
from dpo_engine.reporting.sinks import sink_problems
from dpo_engine.training.callbacks import CALLBACKS, callback_problems
from support.small_run import write_run

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
MODULES = {"patience": "A callback", "csv_sink": "A metrics sink", "staircase": "A learning rate schedule"}
MODULES["rmsprop"] = "An optimizer"
PLUGINS = [f"my_lab.{module}" for module in MODULES]


def section(title: str, language: str) -> str:
    """Return the first code block of a language in a section of the page."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.search(f"```{language}\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write the package, and return the folder that contains the package."""
    folder = tmp_path / "elsewhere"
    (folder / "my_lab").mkdir(parents=True)
    (folder / "my_lab" / "__init__.py").touch()
    for module, title in MODULES.items():
        (folder / "my_lab" / f"{module}.py").write_text(section(title, "python"))
    return folder


@pytest.fixture
def registered(package, monkeypatch):
    from dpo_engine import OPTIMIZERS, SCHEDULES, SINKS

    registries = (CALLBACKS, SINKS, SCHEDULES, OPTIMIZERS)
    before = [dict(registry) for registry in registries]
    monkeypatch.syspath_prepend(str(package))
    assert import_plugins(PLUGINS) == []
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        del sys.modules[name]


def config(**sections) -> Config:
    required = {"model": {"path": "m"}, "data": {"train": "a"}, "train": {"output_dir": "o"}, "plugins": PLUGINS}
    return Config.parse(required | sections)


def problems(given: Config) -> list[str]:
    checks = (callback_problems, sink_problems, schedule_problems, optimizer_problems)
    return [line for check in checks for line in check(given)]


def test_the_settings_on_the_page_are_valid(registered):
    for title in MODULES.values():
        given = yaml.safe_load(section(title, "yaml"))
        assert given.pop("plugins")[0] in PLUGINS
        assert problems(config(**given)) == []


@pytest.mark.parametrize(
    "sections, expected",
    [
        (
            {"callbacks": {"patience": {"evaluatoins": 1}}},
            "callbacks.patience.evaluatoins=1: callback patience has no such option; did you mean "
            "callbacks.patience.evaluations?",
        ),
        (
            {"callbacks": {"patince": {}}},
            "callbacks.patince: no such callback; did you mean patience? Registered callbacks: patience",
        ),
        (
            {"callbacks": {"patience": {"evaluations": "two"}}},
            "callbacks.patience.evaluations=two: must be a whole number; the default is 3",
        ),
        (
            {"logging": {"sinks": {"cvs": {}}}},
            "logging.sinks.cvs: no such sink; did you mean csv? Registered sinks: csv, swanlab and trackio",
        ),
        (
            {"logging": {"sinks": {"csv": {"columns": ["loss"]}}}},
            "logging.sinks.csv.columns=[loss]: sink csv has no such option; its options: metrics",
        ),
        (
            {"logging": {"sinks": {"csv": {"metrics": "loss"}}}},
            "logging.sinks.csv.metrics=loss: must be a list (each item is text); the default is [loss, grad_norm]",
        ),
        (
            {"optim": {"schedule": "staircase", "schedule_options": {"stairs": 2.5}}},
            "optim.schedule_options.stairs=2.5: must be a whole number; the default is 4",
        ),
    ],
)
def test_messages(sections, expected, registered):
    assert problems(config(**sections)) == [expected]


def test_without_plugins_the_message_says_how_to_register():
    given = config(callbacks={"patience": {}}).model_copy(update={"plugins": ()})
    assert callback_problems(given) == [
        "callbacks.patience: no such callback; registered callbacks: none (add more with plugins: [my.module])"
    ]


def test_required_option(monkeypatch):
    class Needs:
        def __init__(self, folder: str, depth: int = 1):
            pass

    monkeypatch.setitem(CALLBACKS, "needs", Needs)
    assert problems(config(callbacks={"needs": {"depth": 2}})) == [
        "callbacks.needs.folder: is required by callback needs; give text"
    ]


def command(package: Path, *arguments: str) -> subprocess.CompletedProcess:
    root = str(PAGE.parents[1])
    path = os.pathsep.join([str(package), root, f"{root}/kernels"])
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=package, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_plugins_are_imported_without_megatron(package):
    names = ", ".join(PLUGINS)
    done = command(package, "-c", f"import sys, {names}; print('megatron' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


SECTIONS = {
    "plugins": PLUGINS,
    "parallel": {"distributed_optimizer": False},
    "optim": {
        "lr": 1e-12,  # so small that the held-out loss does not fall
        "warmup_steps": 1,
        "schedule": "staircase",
        "schedule_options": {"stairs": 2},
        "optimizer": "rmsprop",
    },
    "train": {"eval_interval": 2},
    "callbacks": {"patience": {"evaluations": 1}},
    "logging": {"sinks": {"csv": {"metrics": ["loss", "learning_rate"]}}, "progress": "plain"},
}


@pytest.mark.slow
def test_run_from_the_command_line(package, run_files, tiny_hf, tmp_path):
    path = write_run(tmp_path, "run", run_files, tiny_hf, SECTIONS)

    def engine(verb, *overrides):
        return command(package, "-m", "dpo_engine", verb, str(path), *overrides)

    wrong = engine("check", "callbacks.patience.evaluatoins=1", "optim.freeze=[x]")
    assert wrong.returncode == 2
    assert "callbacks.patience.evaluatoins=1: callback patience has no such option; did you mean " in wrong.stderr
    assert "optim.freeze[0]=x: matches no weight of the model; " in wrong.stderr
    done = engine("train")
    assert done.returncode == 0, done.stderr
    assert "the run ends after step 4 of 12: callbacks.patience: evaluations without a lower loss: 1" in done.stdout
    table = list(csv.reader((tmp_path / "run" / "metrics.csv").open()))
    assert table[0] == ["step", "loss", "learning_rate"] and [row[0] for row in table[1:]] == ["1", "2", "3", "4"]
    rates = [float(row[2]) for row in table[1:]]
    assert rates == pytest.approx([0.0, 1e-12, 1e-12, 1e-12])
    more = engine("train", "callbacks.patience.evaluations=4")
    assert more.returncode == 0, more.stderr
    rows = list(csv.reader((tmp_path / "run" / "metrics.csv").open()))
    assert rows[: len(table)] == table and [row[0] for row in rows[1:]] == [str(step) for step in range(1, 13)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/best_loss" in line for line in lines)
