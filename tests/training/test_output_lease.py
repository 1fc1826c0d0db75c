"""Tests of two rules about directories.

All ranks must share the directories of a run; only a cache may be a different directory on each node. No two exports
may write to the same directory at the same time.
"""

import os
import re
from pathlib import Path

import pytest

from dpo_engine.testing.ranks import run_ranks

HOST = re.escape(os.uname().nodename)


def shared(folder, keys, apart=(), late_s=0.0):
    """Check the directories of ``keys`` under ``folder``. Return the notes, followed by the error if there is one.

    apart   keys whose directories are different on rank 1
    late_s  seconds after which these directories become links to the other ranks' directories; 0: never
    """
    import threading

    import torch.distributed as dist

    from dpo_engine.errors import EngineError
    from dpo_engine.training import output_lease

    output_lease.LOOK_S, output_lease.LOOK_PER_NODE_S = 1.0, 0.2
    rank, notes = dist.get_rank(), []
    directories = {key: folder / key for key in keys}
    for key in apart if rank == 1 else ():
        place = folder / "node1" / key
        directories[key] = place
        place.mkdir(parents=True)
        if late_s:
            threading.Timer(late_s, become_link, (place, folder / key)).start()
    try:
        output_lease.require_shared(directories, dist.group.WORLD, notes.append)
    except EngineError as error:
        notes.append((error.exit_code, str(error)))
    return notes


def become_link(place, target):
    place.rmdir()
    place.symlink_to(target)


def left(folder):
    return [path for path in folder.rglob("*") if not path.is_dir() and not path.is_symlink()]


def test_same_directories_pass_and_no_file_is_left(tmp_path):
    assert run_ranks(shared, 2, folder=tmp_path, keys=["train.output_dir", "data.cache_dir"]) == [[], []]
    assert left(tmp_path) == []


def test_directories_that_are_not_shared_are_named_on_every_rank(tmp_path):
    keys = ["train.output_dir", "reference.store", "data.cache_dir"]
    found = run_ranks(shared, 3, folder=tmp_path, keys=keys, apart=keys[:2])
    assert found[0] == found[2] and len(found[0]) == 1
    code, text = found[0][0]
    assert code == 2
    for key, line in zip(keys[:2], text.split("\n"), strict=True):
        assert re.fullmatch(
            rf"{key}={re.escape(str(tmp_path / key))}: is not the same directory for all ranks: the file that "
            rf"rank 0 wrote there on host {HOST} is not visible on {HOST} \(rank 1\); set a directory on storage that "
            "all nodes share",
            line,
        )
    assert left(tmp_path) == []


def test_directory_that_appears_late_passes(tmp_path):
    key = "train.output_dir"
    assert run_ranks(shared, 2, folder=tmp_path, keys=[key], apart=[key], late_s=0.3) == [[], []]


def test_cache_that_is_not_shared_gives_a_note(tmp_path):
    first, second = run_ranks(shared, 2, folder=tmp_path, keys=["data.cache_dir"], apart=["data.cache_dir"])
    (line,) = first
    assert re.fullmatch(
        rf"data\.cache_dir={re.escape(str(tmp_path))}/data\.cache_dir: is a different directory on {HOST} "
        r"\(rank 1\), so the data is tokenized there again",
        line,
    )
    assert len(second) == 1


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("resident", {"train.output_dir": "o", "data.cache_dir": "c"}),
        ("stored", {"train.output_dir": "o", "data.cache_dir": "c", "reference.store": "s"}),
    ],
)
def test_directories_that_the_ranks_share(mode, expected):
    from dpo_engine.config.run import draft
    from dpo_engine.training.output_lease import shared_directories

    overrides = ["model.path=m", "data.train=d", "train.output_dir=o", "data.cache_dir=c", f"reference.mode={mode}"]
    config = draft(None, [*overrides, *(["reference.store=s"] if mode == "stored" else [])]).finished()
    assert shared_directories(config) == {key: Path(path) for key, path in expected.items()}
    bare = draft(None, overrides[:3]).finished()
    assert set(shared_directories(bare)) == {"train.output_dir"}


def two_exports(folder):
    """Export to one directory from both ranks, as if from two jobs.

    Rank 1 begins an export while rank 0 exports. Then rank 0 begins an export while rank 1 exports.
    """
    import torch.distributed as dist

    from dpo_engine.errors import EngineError
    from dpo_engine.training.output_lease import sole_exporter

    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    said = []
    for first in (True, False):
        if first == (dist.get_rank() == 0):
            with sole_exporter(folder / "hf", alone, said.append):
                dist.barrier()
                dist.barrier()
        else:
            dist.barrier()
            try:
                with sole_exporter(folder / "link" / "hf", alone, said.append):
                    said.append("exporting, too")
            except EngineError as error:
                said.append((error.exit_code, str(error)))
            dist.barrier()
        dist.barrier()
    return said


def test_second_export_to_a_directory_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for said in run_ranks(two_exports, 2, folder=tmp_path):
        ((code, text),) = said
        assert code == 4
        assert re.fullmatch(
            rf"--to={tmp_path}/hf: another run is writing there \(host {HOST}, process \d+, since .* UTC\); stop it, "
            "wait until it ends, or set another --to",
            text,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link"]


def test_export_to_a_directory_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    ((code, text),) = run_ranks(export_into_a_file, 1, folder=tmp_path)
    assert code == 4
    assert text.startswith(f"{tmp_path}/file/hf: cannot be written ([Errno 20] Not a directory")
    assert text.endswith("); fix this and export again")


def export_into_a_file(folder):
    import torch.distributed as dist

    from dpo_engine.errors import EngineError
    from dpo_engine.training.output_lease import sole_exporter

    try:
        with sole_exporter(folder / "file" / "hf", dist.group.WORLD, print):
            return (0, "exporting")
    except EngineError as error:
        return (error.exit_code, str(error))
