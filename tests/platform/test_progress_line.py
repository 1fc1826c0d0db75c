"""Tests of the display of progress: lines at intervals, one line that is redrawn on a terminal, or no output."""

import io
import sys

import pytest

from dpo_engine.platform import progress_line
from dpo_engine.platform.progress_line import ERASE, advance, choose_progress, counting, pace


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(progress_line.time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(progress_line, "_mode", "auto")
    return Clock


def test_pace():
    assert pace(1, 4, "4.0 MB", "2.0 MB/s", 30) == "25% of 4.0 MB, 2.0 MB/s, 0:01:30 left"
    assert pace(0, 4, "4.0 MB", "-", 30) == "0% of 4.0 MB, -, - left"
    assert pace(9, 4, "4.0 MB", "-", 30) == "100% of 4.0 MB, -, 0:00:00 left"


def work(clock, seconds=40, **options):
    """Work on 200 pairs in 50 parts of one second each, but stop after `seconds` seconds."""
    with counting("eval\x1buating", 200, parts=50, **options):
        for _ in range(seconds):
            clock.now += 1
            advance(1)


def test_lines_at_intervals(clock, capsys):
    work(clock)
    advance(1)  # has no effect outside of a counting() block
    assert capsys.readouterr().out.splitlines() == [
        r"eval\x1buating: 10% of 200 pairs, 4 pairs/s, 0:00:45 left",
        r"eval\x1buating: 40% of 200 pairs, 4 pairs/s, 0:00:30 left",
        r"eval\x1buating: 70% of 200 pairs, 4 pairs/s, 0:00:15 left",
    ]


def test_nothing_for_short_work_other_ranks_and_off(clock, capsys):
    work(clock, seconds=4)
    work(clock, shown=False)
    choose_progress("off")
    work(clock)
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_one_line_that_disappears(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "30")
    work(clock, seconds=6)
    first = ERASE + r"eval\x1buating: 10% of 200 pairs, 4"[:29]
    assert sys.stdout.getvalue() == first + first.replace("10%", "12%") + ERASE


def test_plain_mode_never_redraws_a_line(clock, monkeypatch, capsys):
    choose_progress("rich")
    work(clock, seconds=5)
    assert capsys.readouterr().out.startswith(ERASE)
    choose_progress("plain")
    work(clock, seconds=5)
    assert capsys.readouterr().out.endswith(" left\n")


def test_inner_work_has_its_own_count(clock, capsys):
    with counting("outer", 10, parts=10):
        work(clock, seconds=5)
        clock.now += 1
        advance(5)
    assert capsys.readouterr().out.splitlines()[1] == "outer: 50% of 10 pairs, 0.8333 pairs/s, 0:00:06 left"
