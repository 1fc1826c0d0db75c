"""Tests of the progress display while files are read: lines at intervals, and modes without a display."""

import pytest

from dpo_engine.platform import progress_line
from dpo_engine.reporting import progress
from dpo_engine.reporting.progress import FileProgress, Progress, open_progress


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(progress_line, "_mode", "auto")
    return Clock


def test_lines_with_rate_and_time_left(clock, capsys):
    shown = FileProgress()
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
    shown = FileProgress()
    shown.start("tokenizing d.jsonl in 1 process", 10)
    clock.now += 4
    shown.update(10, 3)
    shown.stop()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("mode", "shown", "kind"),
    [
        ("off", True, Progress),
        ("plain", False, Progress),
        ("plain", True, FileProgress),
        ("auto", True, FileProgress),
        ("rich", True, FileProgress),
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
