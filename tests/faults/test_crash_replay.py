"""Replay a run's operations on its checkpoint folder, and check which checkpoint the loader finds after a crash.

Once the first checkpoint has been published, the loader must always find an intact checkpoint.

After every operation of the run, a test rebuilds the folder in each of three states. A crash can leave the disk in any
of these states:

- `as written`: all operations up to the crash have taken effect.
- `names first`: files have only the content that was synced, but names are as if all directories had been synced.
- `only what was synced`: files have only the content that was synced. A new name exists only if its directory was
  synced afterwards, and a removed name still exists if its directory was not synced afterwards.

A process that is killed leaves the state `as written`. A machine that loses power can leave any of the three states.
"""

import builtins
import io
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dpo_engine.testing.ranks import run_ranks
from support.small_run import write_run


def record(config_path: str, folder: str) -> list[tuple]:
    """Train, and return this rank's operations on ``folder`` and on its contents.

    Each operation is a tuple (start time, operation, path, argument).
    """
    from dpo_engine.config.run import Config
    from dpo_engine.verbs.train import train

    log: list[tuple] = []
    prefix = folder + "/"

    def whole(path, dir_fd=None) -> str:
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}").removesuffix(" (deleted)")
        path = os.fspath(path)
        return path if dir_fd is None else f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{path}"

    def note(begun: int, what: str, path: str, argument=None) -> None:
        if f"{path}/".startswith(prefix):
            log.append((begun, what, path, argument))

    class Recorded(io.FileIO):
        """An unbuffered file that records each write after the write is complete."""

        def write(self, content):
            begun = time.monotonic_ns()
            done = super().write(content)
            note(begun, "write", self.name, bytes(content[:done]))
            return done

    real_open, real = builtins.open, {name: getattr(os, name) for name in ("fsync", "rename", "replace", "mkdir")}
    real |= {name: getattr(os, name) for name in ("unlink", "remove", "rmdir")}

    def open_(path, mode="r", *rest, **options):
        if not isinstance(path, int) and set(mode) & set("wx") and os.fspath(path).startswith(prefix):
            begun = time.monotonic_ns()
            file = io.BufferedWriter(Recorded(os.fspath(path), mode[0] + "b"))
            note(begun, "create", os.fspath(path))
            return file
        return real_open(path, mode, *rest, **options)

    def one(name: str):
        def call(path, *rest, dir_fd=None, **options):
            begun, place = time.monotonic_ns(), whole(path, dir_fd)
            given = {} if dir_fd is None else {"dir_fd": dir_fd}
            answer = real[name](path, *rest, **given, **options)
            note(begun, "unlink" if name == "remove" else name, place)
            return answer

        return call

    def two(name: str):
        def call(source, target, **options):
            begun = time.monotonic_ns()
            real[name](source, target, **options)
            note(begun, "rename", os.fspath(source), os.fspath(target))

        return call

    builtins.open = io.open = open_
    for name in ("fsync", "mkdir", "unlink", "remove", "rmdir"):
        setattr(os, name, one(name))
    for name in ("rename", "replace"):
        setattr(os, name, two(name))
    train(Config.load(config_path))
    return log


@dataclass
class Node:
    """A file or directory: its current content or entries, and the content or entries that have been synced."""

    content: bytes = b""
    synced: bytes = b""
    entries: dict[str, "Node"] | None = None
    synced_entries: dict[str, "Node"] = field(default_factory=dict)


class Disk:
    """The folder after a sequence of operations."""

    def __init__(self, folder: str):
        self.folder = folder
        self.root = Node(entries={})

    def find(self, path: str) -> Node | None:
        node = self.root
        for part in Path(path).relative_to(self.folder).parts:
            node = (node.entries or {}).get(part)
            if node is None:
                return None
        return node

    def apply(self, what: str, path: str, argument) -> None:
        parent, name = self.find(os.path.dirname(path)) if path != self.folder else None, os.path.basename(path)
        if what in ("create", "mkdir"):
            if parent is not None:
                parent.entries[name] = Node(entries={} if what == "mkdir" else None)
        elif what == "write":
            self.find(path).content += argument
        elif what == "rename":
            self.find(os.path.dirname(argument)).entries[os.path.basename(argument)] = parent.entries.pop(name)
        elif what in ("unlink", "rmdir"):
            del parent.entries[name]
        elif what == "fsync":
            node = self.find(path)
            node.synced, node.synced_entries = node.content, dict(node.entries or {})

    def files(self, names: str, contents: str) -> dict[str, bytes | None]:
        """Return, by path, the contents that a reader would find after the crash. A directory's content is ``None``.

        names     name of the attribute of `Node` that holds the surviving entries
        contents  name of the attribute of `Node` that holds the surviving content
        """
        found: dict[str, bytes | None] = {}

        def walk(node: Node, path: str) -> None:
            for name, child in getattr(node, names).items():
                found[f"{path}{name}"] = None if child.entries is not None else getattr(child, contents)
                if child.entries is not None:
                    walk(child, f"{path}{name}/")

        walk(self.root, "")
        return found


VIEWS = {
    "as written": ("entries", "content"),
    "names first": ("entries", "synced"),
    "only what was synced": ("synced_entries", "synced"),
}


def chosen(folder: Path) -> int | None:
    """Return the step that the loader chooses, None if there is no checkpoint, or -1 if all checkpoints are damaged."""
    from dpo_engine.checkpoint.directory import Damaged, committed, verify

    known = committed(folder)
    for directory in reversed(known):
        try:
            return verify(directory)["step"]
        except Damaged:
            continue
    return -1 if known else None


def rebuild(files: dict[str, bytes | None], before: dict[str, bytes | None], folder: Path) -> None:
    """Change the contents of ``folder`` from ``before`` to ``files``."""
    for path in sorted(before.keys() - files.keys(), reverse=True):
        (folder / path).rmdir() if before[path] is None else (folder / path).unlink()
    for path in sorted(files):
        content = files[path]
        if path not in before:
            (folder / path).mkdir() if content is None else (folder / path).write_bytes(content)
        elif content is not before[path]:
            (folder / path).write_bytes(content)


@pytest.fixture(scope="module", params=[1, 2])
def operations(request, run_files, tiny_hf, tmp_path_factory):
    """Return all ranks' operations on a checkpoint folder, ordered by start time, and the path of the folder."""
    folder = tmp_path_factory.mktemp("recorded")
    sections = {"train": {"max_steps": 5}, "checkpoint": {"save_interval": 1}}
    path = write_run(folder, "run", run_files, tiny_hf, sections)
    where = str(folder / "run/checkpoints")
    logs = run_ranks(record, request.param, config_path=str(path), folder=where)
    return [one[1:] for one in sorted((one for log in logs for one in log), key=lambda one: one[0])], where


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.slow
def test_loader_finds_an_intact_checkpoint_after_every_cut(view, operations, tmp_path):
    log, where = operations
    disk, before, seen = Disk(where), {}, []
    (tmp_path / "cut").mkdir()
    for operation in log:
        disk.apply(*operation)
        files = disk.files(*VIEWS[view])
        if files.keys() == before.keys() and all(files[path] is before[path] for path in files):
            continue
        rebuild(files, before, tmp_path / "cut")
        before = files
        seen.append(chosen(tmp_path / "cut"))
    renames = sum(what == "rename" and path.count(".tmp.") and "latest" not in path for what, path, _ in log)
    assert renames == 5 and len(log) > 300
    first = next(index for index, step in enumerate(seen) if step is not None)
    assert None not in seen[first:] and -1 not in seen, (
        "once a checkpoint has been published, the loader must always find an intact checkpoint"
    )
    assert seen[first:] == sorted(seen[first:]) and set(seen[first:]) == {1, 2, 3, 4, 5}, (
        "the loader must never choose an older checkpoint than before"
    )
    leftovers = [path for path in before if ".tmp" in path or ".old" in path]
    assert view != "as written" or not leftovers


def test_replay_detects_a_missing_sync(tmp_path):
    """Check the replay itself: if any sync is missing, at least one of the three states has no intact checkpoint."""
    from dpo_engine.checkpoint.directory import digest

    manifest = {
        "format": 2,
        "step": 4,
        "updates": 4,
        "schedule": 4,
        "layout": {},
        "identity": {},
        "run": {},
        "files": {},
    }
    content = json.dumps({**manifest, "sha256": digest(manifest)}).encode()
    work, final = "/c/step_00000004.tmp.a", "/c/step_00000004"
    steps = [
        ("mkdir", work, None),
        ("create", f"{work}/manifest.json", None),
        ("write", f"{work}/manifest.json", content),
        ("fsync", f"{work}/manifest.json", None),
        ("fsync", work, None),
        ("rename", work, final),
        ("fsync", "/c", None),
    ]

    def outcome(view: str, without: set[int]) -> int | None:
        disk, folder = Disk("/c"), tmp_path / f"{view}{without}"
        for index, operation in enumerate(steps):
            if index not in without:
                disk.apply(*operation)
        folder.mkdir()
        rebuild(disk.files(*VIEWS[view]), {}, folder)
        return chosen(folder)

    assert [outcome(view, set()) for view in VIEWS] == [4, 4, 4]
    assert [outcome(view, {3}) for view in VIEWS] == [4, -1, -1], "expected outcomes if the manifest is not synced"
    assert [outcome(view, {4}) for view in VIEWS] == [4, 4, -1], "expected outcomes if the directory is not synced"
    assert [outcome(view, {6}) for view in VIEWS] == [4, 4, None], "expected outcomes if its parent /c is not synced"
    shutil.rmtree(tmp_path)
