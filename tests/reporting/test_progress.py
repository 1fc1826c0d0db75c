"""Tests of progress displays: lines at intervals, a bar on a terminal, and no output if it is turned off."""

import io

import pytest
from rich.console import Console

from dpo_engine.reporting import progress
from dpo_engine.reporting.progress import BarProgress, PlainProgress, Progress, open_progress


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_lines_with_rate_and_time_left(clock, capsys):
    shown = PlainProgress()
    shown.start("tokenizing d\x1b.jsonl in 2 processes", 40_000_000)
    for seconds in range(1, 40):
        clock.now = 100.0 + seconds
        shown.update(seconds * 1_000_000, seconds * 2_500)
    shown.stop()
    assert capsys.readouterr().out.splitlines() == [
        r"tokenizing d\x1b.jsonl in 2 processes: 12% of 40.0 MB, 12,500 pairs, 2,500 pairs/s, 0:00:35 left",
        r"tokenizing d\x1b.jsonl in 2 processes: 50% of 40.0 MB, 50,000 pairs, 2,500 pairs/s, 0:00:20 left",
        r"tokenizing d\x1b.jsonl in 2 processes: 87% of 40.0 MB, 87,500 pairs, 2,500 pairs/s, 0:00:05 left",
    ]


def test_short_work_prints_nothing(clock, capsys):
    shown = PlainProgress()
    shown.start("tokenizing d.jsonl in 1 process", 10)
    clock.now += 4
    shown.update(10, 3)
    shown.stop()
    assert capsys.readouterr().out == ""


def test_bar_shows_rate_and_time_left(clock):
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=120, legacy_windows=False)
    shown = BarProgress(console=console)
    shown.start("tokenizing [b]d[/b].jsonl in 2 processes", 1000)
    clock.now += 10
    shown.update(250, 5_000)
    shown.stop()
    text = written.getvalue()
    assert "tokenizing [b]d[/b].jsonl in 2 processes" in text
    assert " 25%" in text and "500 pairs/s, 0:00:30 left" in text


@pytest.mark.parametrize(
    ("mode", "shown", "kind"),
    [
        ("off", True, Progress),
        ("plain", False, Progress),
        ("plain", True, PlainProgress),
        ("auto", True, PlainProgress),  # because pytest's stdout is not a terminal
        ("rich", True, BarProgress),
    ],
)
def test_mode(mode, shown, kind):
    assert type(open_progress(mode, shown=shown)) is kind


@pytest.mark.parametrize("mode", ["off", "plain"])
def test_work_can_be_stopped_after_an_update(mode):
    def stop():
        raise KeyboardInterrupt

    shown = open_progress(mode, between=stop)
    shown.start("work", 10)
    with pytest.raises(KeyboardInterrupt):
        shown.update(1, 1)
