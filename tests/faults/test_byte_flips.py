"""Fault tests: if a byte in a checkpoint folder changes, loading restores a saved state exactly, or is refused."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from dpo_engine.testing.ranks import run_ranks
from support.jobs import run_job
from support.small_run import write_run


@pytest.fixture(scope="module")
def saved(run_files, tiny_hf, tmp_path_factory):
    """Train on two ranks, with checkpoints at two steps. Return the run's YAML file."""
    folder = tmp_path_factory.mktemp("saved")
    sections = {"parallel": {"tp": 2}, "train": {"max_steps": 4}, "checkpoint": {"save_interval": 2}}
    path = write_run(folder, "run", run_files, tiny_hf, sections)
    finished = run_job(["train", str(path)], 2, folder / "log")
    assert finished.codes == [0, 0], finished.said
    return path


def flips(path: str, folder: str, seed: int, count: int) -> list[tuple[str, str]]:
    """Repeat ``count`` times: change one byte of a file, load the newest intact checkpoint, and restore the byte.

    Returns each change and its outcome:

    - "newest": the state of the newest checkpoint was loaded exactly.
    - "older": the state of the older checkpoint was loaded exactly.
    - "refused": loading was refused.
    - "WRONG": all other cases.
    """
    from torch import distributed as dist

    from dpo_engine.checkpoint.load import find_checkpoint, load_checkpoint
    from dpo_engine.config.run import Config
    from dpo_engine.errors import CheckpointError
    from dpo_engine.optim.state import adam_step, owned_slices
    from dpo_engine.training.engine import Engine

    engine = Engine.open(Config.load(path, ["parallel.tp=1"]))
    trained = engine.load_policy(total_steps=6)
    draw = random.Random(seed)
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())

    def state() -> tuple:
        tensors = [one for owned in owned_slices(trained) for one in (owned.main, *owned.moments().values())]
        content = b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)
        return hash(content), adam_step(trained), trained.schedule.num_steps

    def loaded() -> tuple | str:
        try:
            found = find_checkpoint(Path(folder), dist.group.WORLD)
            load_checkpoint(found, trained, engine.arch, engine.groups)
        except CheckpointError:
            return "refused"
        return found.step, found.manifest["identity"], found.manifest["run"], state()

    def of(step: int) -> tuple:
        found = find_checkpoint(Path(folder), dist.group.WORLD, step=step)
        load_checkpoint(found, trained, engine.arch, engine.groups)
        return step, found.manifest["identity"], found.manifest["run"], state()

    right = [(of(4), "newest"), (of(2), "older"), ("refused", "refused")]
    assert right[0][0][3] != right[1][0][3]
    outcomes = []
    for _ in range(count):
        file = draw.choice(files)
        content = file.read_bytes()
        place, mask = draw.randrange(len(content)), draw.randrange(1, 256)
        file.write_bytes(content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :])
        got = loaded()
        outcome = next((name for state, name in right if state == got), "WRONG")
        outcomes.append((f"{file.relative_to(folder)} byte {place} ^ {mask:#x}", outcome))
        file.write_bytes(content)
    assert loaded() == right[0][0], "after the last changed byte is restored, the newest checkpoint must load"
    engine.close()
    return outcomes


@pytest.mark.parametrize("count", [50, pytest.param(400, marks=pytest.mark.slow)])
def test_flipped_bytes_never_load_a_wrong_state(count, saved, tmp_path):
    shutil.copytree(saved.with_suffix("") / "checkpoints", tmp_path / "c")
    outcomes = run_ranks(flips, 1, path=str(saved), folder=str(tmp_path / "c"), seed=5, count=count)[0]
    wrong = [what for what, outcome in outcomes if outcome == "WRONG"]
    assert not wrong
    harmed = Counter((what.split("/")[0], outcome) for what, outcome in outcomes)
    assert sum(number for (where, _), number in harmed.items() if where == "step_00000004") > count / 3
    newer = [outcome for what, outcome in outcomes if what.startswith("step_00000004")]
    assert newer.count("newest") < count / 50, "a changed checkpoint may load only if the change is in JSON formatting"
    assert all(outcome == "newest" for what, outcome in outcomes if not what.startswith("step_00000004"))
