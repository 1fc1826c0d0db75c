"""Tests that files are written atomically, and that files left by killed writers are removed."""

import os

import pytest

from dpo_engine import atomic_files as durable


def test_leftovers_of_a_killed_writer_can_be_removed(tmp_path):
    place = tmp_path / "a.txt"
    durable.write_whole(place, b"old")
    if not (pid := os.fork()):
        os.fsync = lambda file: os._exit(9)
        durable.write_whole(place, b"new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert place.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    for name in (".mine", "x.7.tmp", ".x.tmp"):
        (tmp_path / name).touch()
    durable.remove_unfinished(tmp_path, older_than_s=60)
    assert len(list(tmp_path.iterdir())) == 5
    durable.remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", ".mine", "x.7.tmp", ".x.tmp"}
    durable.remove_unfinished(tmp_path / "nowhere")


def test_failed_writer_leaves_no_files(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        durable.write_whole(tmp_path / "a.txt", b"new")
    assert not list(tmp_path.iterdir())
