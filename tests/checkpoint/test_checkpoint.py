"""Tests of checkpoints: resumed runs continue in any layout, damage is reported, and old checkpoints are deleted."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo_engine.errors import CheckpointError
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.testing.pairs import RandomPairs, global_batches
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import VOCAB, run_config

SIZES = [4] * 6
HALF = 3
IDENTITY = {"model": "tiny", "loss": {"name": "sigmoid"}}


def saver_of(engine, trained, folder, identity=IDENTITY, **options):
    from dpo_engine.checkpoint.directory import tidy
    from dpo_engine.checkpoint.save import Saver

    if engine.groups.world.rank() == 0:
        tidy(folder)
    torch.distributed.barrier()
    given = {"keep_last": 2, "asynchronous": False, "device": engine.platform.device, "history": folder / "none"}
    return Saver(folder, trained, engine.arch, engine.groups, identity, **{**given, **options})


def run(
    config, *, save_at=None, load_from=None, folder=None, identity=IDENTITY, asynchronous=False, draws=False, **load
):
    """Train with batches of the sizes ``SIZES``, from the beginning or from a checkpoint.

    draws  whether to also record numbers drawn from every random generator after each step
    load   options of load_checkpoint

    Returns the metrics of each step, or the text of the error if the checkpoint cannot be used.
    """
    from dpo_engine.checkpoint.load import find_checkpoint, load_checkpoint
    from dpo_engine.checkpoint.resume import compare
    from dpo_engine.training.engine import Engine, batch_facts
    from dpo_engine.training.references import open_reference
    from dpo_engine.training.step import train_step

    engine = Engine.open(config)
    pairs = RandomPairs(sum(SIZES), VOCAB)
    trained = engine.load_policy(total_steps=len(SIZES))
    reference = open_reference(engine, trained.chunks)
    start = 0
    if load_from is not None:
        try:
            found = find_checkpoint(Path(folder), engine.groups.world, step=load_from)
            compare(found.manifest["identity"], identity, where=found.directory)
            load_checkpoint(found, trained, engine.arch, engine.groups, **load)
            start = found.step
        except CheckpointError as error:
            return str(error)
    steps = []
    saver = saver_of(engine, trained, Path(folder), identity, asynchronous=asynchronous) if folder else None
    if save_at == 0:
        saver.save(0, {})
    for step, indices in enumerate(global_batches(SIZES)):
        if step < start:
            continue
        steps.append(
            train_step(
                trained,
                reference,
                engine.batches(pairs, indices),
                engine.objective,
                known=batch_facts(pairs, indices),
                vocab_size=VOCAB,
                groups=engine.groups,
            )
        )
        if draws:
            steps[-1]["draws"] = draw()
        if saver:
            saver.advance()
        if step + 1 == save_at:
            saver.save(save_at, {})
    if saver:
        saver.finish()
    engine.close()
    return steps


def draw():
    """Draw numbers from each random generator of a rank."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(()).item()
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item(), tracked]


LAYOUTS = {
    "one": (1, {}),
    "one plain": (1, {"distributed_optimizer": False}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2 uneven": (2, {"pp": 2, "layers": [3, 1]}),
    "dp2": (2, {}),
    "dp2 plain": (2, {"distributed_optimizer": False}),
    "cp2": (2, {"cp": 2}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "tp2 dp2": (4, {"tp": 2}),
}


def config_of(start, tmp_path, layout, **sections):
    optim = {"lr": 3e-4, "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.01}
    return run_config(start, tmp_path, parallel=layout, optim=optim, **sections)


QUICK = {("fp32", "dp2 plain"), ("bf16", "tp2 pp2")}


@pytest.mark.parametrize(
    "dtype, name",
    [
        pytest.param(dtype, name, marks=() if (dtype, name) in QUICK else pytest.mark.slow)
        for dtype in ("fp32", "bf16")
        for name in ("one", "one plain", "dp2", "dp2 plain", "tp2 pp2", "pp2 vpp2")
    ],
)
def test_resume_in_the_same_layout_is_bitwise_identical(name, dtype, tiny_hf, tmp_path):
    ranks, layout = LAYOUTS[name]
    model = tiny_hf("llama", tie_word_embeddings=name == "tp2 pp2")
    config = config_of(model, tmp_path, layout, model={"path": str(model), "dtype": dtype})
    expected = run_ranks(run, ranks, config=config, save_at=HALF, folder=str(tmp_path / "c"))
    got = run_ranks(run, ranks, config=config, load_from=HALF, folder=str(tmp_path / "c"))
    assert got[0] == expected[0][HALF:]


@pytest.mark.parametrize(
    "name", ["dp2", pytest.param("one", marks=pytest.mark.slow), pytest.param("tp2 pp2", marks=pytest.mark.slow)]
)
def test_async_save_holds_the_state_of_its_step(name, tiny_hf, tmp_path):
    """The resumed run is bitwise equal to the uninterrupted run.

    This must hold although later steps change the weights while the checkpoint is written.
    """
    ranks, layout = LAYOUTS[name]
    config = config_of(tiny_hf("llama"), tmp_path, layout)
    expected = run_ranks(run, ranks, config=config)
    folder = str(tmp_path / "c")
    saved = run_ranks(slow_run, ranks, config=config, save_at=HALF, folder=folder, asynchronous=True)
    got = run_ranks(run, ranks, config=config, load_from=HALF, folder=folder)
    assert saved[0] == expected[0]
    assert got[0] == expected[0][HALF:]


def slow_run(config, **asked):
    """Call :func:`run`, but write each shard only after a delay, during later steps."""
    import time

    from dpo_engine.checkpoint import save as saver

    original = saver.write_shard

    def write_shard(path, tensors, *rest):
        time.sleep(1)
        return original(path, tensors, *rest)

    saver.write_shard = write_shard
    return run(config, **asked)


@pytest.mark.parametrize(
    "dtype, name",
    [
        pytest.param("bf16", "dp2 plain", marks=pytest.mark.slow),
        ("fp32", "one"),
        pytest.param("fp32", "dp2 plain", marks=pytest.mark.slow),
        pytest.param("bf16", "one", marks=pytest.mark.slow),
    ],
)
def test_save_before_the_first_update_changes_nothing(name, dtype, tiny_hf, tmp_path):
    """Before the first update, Adam's state has no moments and no update count."""
    ranks, layout = LAYOUTS[name]
    model = tiny_hf("llama")
    config = config_of(model, tmp_path, layout, model={"path": str(model), "dtype": dtype})
    expected = run_ranks(run, ranks, config=config)
    folder = str(tmp_path / "c")
    assert run_ranks(run, ranks, config=config, save_at=0, folder=folder) == expected
    assert run_ranks(run, ranks, config=config, load_from=0, folder=folder) == expected


@pytest.mark.parametrize(
    "name", [*(pytest.param(one, marks=pytest.mark.slow) for one in ("one", "dp2 plain")), "pp2 uneven"]
)
def test_random_generators_continue_after_resume(name, tiny_hf, tmp_path):
    ranks, layout = LAYOUTS[name]
    config = config_of(tiny_hf("llama"), tmp_path, layout)
    folder = str(tmp_path / "c")
    expected = run_ranks(run, ranks, config=config, save_at=HALF, folder=folder, draws=True)
    got = run_ranks(run, ranks, config=config, load_from=HALF, folder=folder, draws=True)
    assert [steps[-1]["draws"] for steps in got] == [steps[-1]["draws"] for steps in expected]
    fresh = run_ranks(run, ranks, config=config, load_from=HALF, folder=folder, draws=True, random=False)
    assert all(a[-1]["draws"] != b[-1]["draws"] for a, b in zip(fresh, got, strict=True))


def test_layouts_of_earlier_versions_are_recognized():
    from dpo_engine.checkpoint.load import same_layout

    groups = SimpleNamespace(dims=ParallelDims(tp=2, pp=2, world=4))
    saved = {"tp": 2, "pp": 2, "vpp": None, "cp": 1, "ep": 1, "world": 4}
    assert same_layout(saved, groups) and same_layout({**saved, "etp": 2, "layers": None}, groups)
    assert not same_layout({**saved, "layers": [1, 3]}, groups) and not same_layout({**saved, "etp": 1}, groups)


@pytest.mark.parametrize(
    "written, read",
    [
        pytest.param("one", "tp2 pp2", marks=pytest.mark.slow),
        pytest.param("tp2 pp2", "one plain", marks=pytest.mark.slow),
        ("tp2 dp2", "pp2 uneven"),
        pytest.param("dp2", "tp2", marks=pytest.mark.slow),
        pytest.param("dp2 plain", "dp2", marks=pytest.mark.slow),
        ("pp2 vpp2", "tp2 dp2"),
        pytest.param("cp2", "one", marks=pytest.mark.slow),
    ],
)
def test_resume_in_another_layout(written, read, tiny_hf, tmp_path):
    model = tiny_hf("llama", tie_word_embeddings=written == "tp2 pp2" or read == "tp2 pp2")
    (ranks, layout), (ranks_after, layout_after) = LAYOUTS[written], LAYOUTS[read]
    folder = str(tmp_path / "c")
    expected = run_ranks(run, ranks, config=config_of(model, tmp_path, layout), save_at=HALF, folder=folder)[0]
    got = run_ranks(run, ranks_after, config=config_of(model, tmp_path, layout_after), load_from=HALF, folder=folder)[0]
    assert len(got) == len(SIZES) - HALF
    for step, want in zip(got, expected[HALF:], strict=True):
        assert step["loss"] == pytest.approx(want["loss"], rel=2e-6)
        assert step["grad_norm"] == pytest.approx(want["grad_norm"], rel=5e-6)
        assert step["learning_rate"] == want["learning_rate"]


@pytest.fixture(scope="module")
def saved(tiny_hf, tmp_path_factory):
    """Save a checkpoint of two ranks. Return its parent folder and the configuration.

    A test that damages the checkpoint must do this in a copy of the folder.
    """
    folder = tmp_path_factory.mktemp("saved")
    config = config_of(tiny_hf("llama"), folder, {"tp": 2})
    run_ranks(run, 2, config=config, save_at=HALF, folder=str(folder / "c"))
    return folder / "c", config


def damaged(saved, tmp_path, change):
    folder, config = saved
    shutil.copytree(folder, tmp_path / "c")
    change(tmp_path / "c" / f"step_{HALF:08d}")
    messages = run_ranks(run, 2, config=config, load_from=HALF, folder=str(tmp_path / "c"))
    assert messages[0] == messages[1], "all ranks must report the same error"
    return messages[0]


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: flip(d / "rank_00001.safetensors", -5), "rank_00001.safetensors: SHA-256 differs"),
        (
            lambda d: (d / "rank_00000.safetensors").write_bytes(b"x" * 10),
            "rank_00000.safetensors: its size is 10 B, but must be",
        ),
        (lambda d: (d / "rank_00001.safetensors").unlink(), "No such file"),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json: is damaged"),
    ],
    ids=["flipped byte", "short shard", "missing shard", "torn manifest"],
)
def test_damage_is_reported_on_every_rank(change, message, saved, tmp_path):
    found = damaged(saved, tmp_path, change)
    assert found.startswith(f"checkpoint for step {HALF} skipped: ") and message in found
    assert found.endswith(f"c: the checkpoint for step {HALF} is damaged; choose another step")


def test_unknown_format_is_refused(saved, tmp_path):
    found = damaged(saved, tmp_path, lambda d: (d / "manifest.json").write_text('{"format": 99}'))
    says = "has format 99, but this version of dpo-engine reads format 2; use the version that wrote this checkpoint"
    assert found.endswith(f"manifest.json: {says}")


def test_checkpoint_of_another_run_is_refused(saved):
    folder, config = saved
    other = {**IDENTITY, "loss": {"name": "sigmoid", "beta": 0.5}}
    message = run_ranks(run, 2, config=config, load_from=HALF, folder=str(folder), identity=other)[0]
    assert "loss.beta was absent and is now 0.5" in message


def test_checkpoint_of_another_model_is_refused(saved, tiny_hf, tmp_path):
    folder, _ = saved
    config = config_of(tiny_hf("llama", num_hidden_layers=6), tmp_path, {})
    message = run_ranks(run, 1, config=config, load_from=HALF, folder=str(folder))[0]
    assert "decoder.layers." in message and "missing" in message


def test_checkpoint_contents(saved):
    folder, _ = saved
    names = sorted(path.name for path in (folder / f"step_{HALF:08d}").iterdir())
    assert names == ["manifest.json", "metrics.jsonl", "rank_00000.safetensors", "rank_00001.safetensors"]
    manifest = json.loads((folder / f"step_{HALF:08d}" / "manifest.json").read_text())
    assert manifest["step"] == manifest["updates"] == manifest["schedule"] == HALF and manifest["identity"] == IDENTITY
    assert (folder / "latest").read_text() == f"step_{HALF:08d}\n"


def test_shard_is_a_safetensors_file(saved):
    """Read a shard with the safetensors library, which checks every tensor against the header."""
    from safetensors.torch import load_file

    folder, _ = saved
    tensors = load_file(folder / f"step_{HALF:08d}" / "rank_00001.safetensors")
    assert {key.partition("|")[0] for key in tensors} == {"main", "exp_avg", "exp_avg_sq", "random"}
    assert all(torch.isfinite(value).all() and value.dim() == 1 for value in tensors.values())


def test_shard_writer_matches_the_safetensors_library(tmp_path):
    import hashlib

    from safetensors.torch import load_file

    from dpo_engine.checkpoint.shards import write_shard

    expected = {
        "odd bytes": torch.arange(13, dtype=torch.uint8),
        "empty": torch.empty(0),
        "large": torch.randn(3_000_000),
        "cut": torch.randn(10, 4).t().reshape(-1)[3:17],
    }
    written = write_shard(tmp_path / "s.safetensors", expected)
    content = (tmp_path / "s.safetensors").read_bytes()
    assert written == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    got = load_file(tmp_path / "s.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_which_directories_count_as_checkpoints(tmp_path):
    from dpo_engine.checkpoint.directory import committed, steps

    assert steps(tmp_path / "nowhere") == []
    counted = ["step_00000002", "step_00000010", "step_00000010.2", "step_00000012"]
    for name in (*counted, "step_00000011.tmp.ab12", "step_00000001.old.ab12", "other", "step_3"):
        (tmp_path / name).mkdir()
    assert [path.name for path in committed(tmp_path)] == counted
    assert steps(tmp_path) == [2, 10, 12]
    (tmp_path / "file").touch()
    says = "file: is not a directory; move it away, or set another train.output_dir"
    with pytest.raises(CheckpointError, match=says):
        committed(tmp_path / "file")


def test_step_that_is_saved_again_gets_the_next_number(tmp_path):
    from dpo_engine.checkpoint.directory import committed, publish, working_directory

    for again in range(11):
        work = working_directory(tmp_path, 8, f"{again:02d}")
        work.mkdir()
        (work / "file").touch()
        publish(work)
    names = ["step_00000008", *(f"step_00000008.{number}" for number in range(2, 12))]
    assert [path.name for path in committed(tmp_path)] == names, "the newest must be the last"


@pytest.mark.parametrize("part, flipped", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_each_rank_hashes_its_own_share_of_the_files(part, flipped, tmp_path):
    import hashlib

    from dpo_engine.checkpoint.directory import seal, verify

    directory, files = tmp_path / "step_00000004", {}
    directory.mkdir()
    for rank in range(2):
        path = directory / f"rank_{rank:05d}.safetensors"
        path.write_bytes(bytes([rank] * 9))
        files[path.name] = {"size": 9, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    empty = {"layout": {}, "identity": {}, "run": {}}
    seal(directory, {"format": 2, "step": 4, "updates": 4, "schedule": 4, "files": files, **empty})
    flip(directory / f"rank_{flipped:05d}.safetensors", 3)
    try:
        verify(directory, part=part, parts=2)
    except CheckpointError as error:
        assert part == flipped and "SHA-256 differs" in str(error)
    else:
        assert part != flipped


def resumed_reference(config, folder):
    """Save and load a bf16 reference that also keeps its exact weights in fp32.

    The checkpoint is for step 5, although Adam has made only 2 updates.

    Returns the reference's exact weights and Adam's number of updates, before saving and after loading.
    """
    from dpo_engine.checkpoint.load import find_checkpoint, load_checkpoint
    from dpo_engine.optim.state import adam_step
    from dpo_engine.scoring.reference import exact, parameters
    from dpo_engine.training.engine import Engine, batch_facts
    from dpo_engine.training.references import open_reference
    from dpo_engine.training.step import train_step

    engine, pairs, states = Engine.open(config), RandomPairs(4, VOCAB), []
    for again in (False, True):
        trained = engine.load_policy(total_steps=9)
        reference = open_reference(engine, trained.chunks)
        following = {"following": reference.chunks}
        if again:
            found = find_checkpoint(folder, engine.groups.world)
            load_checkpoint(found, trained, engine.arch, engine.groups, **following)
        else:
            indices = np.arange(4)
            known = {"known": batch_facts(pairs, indices), "vocab_size": VOCAB, "groups": engine.groups}
            for _ in range(2):
                train_step(trained, reference, engine.batches(pairs, indices), engine.objective, **known)
                reference.follow(trained.chunks, 0.3)
            saver_of(engine, trained, folder, **following).save(5, {})
        states.append(([exact(one).clone() for one in parameters(reference.chunks)], adam_step(trained)))
    engine.close()
    return states


def test_resume_keeps_the_exact_reference_and_the_count_of_updates(tiny_hf, tmp_path):
    """The checkpoint is for step 5, but Adam has made only two updates, as if three steps had been skipped.

    Adam must therefore continue with its third update.
    """
    model = tiny_hf("llama", num_hidden_layers=2)
    reference = {"sync_every": 1, "sync_alpha": 0.3}
    config = config_of(model, tmp_path, {}, model={"path": str(model), "dtype": "bf16"}, reference=reference)
    (before, updates), (after, resumed) = run_ranks(resumed_reference, 1, config=config, folder=tmp_path / "c")[0]
    assert updates == resumed == 2
    assert any(not torch.equal(one, one.bfloat16().float()) for one in before), "some weights must be inexact in bf16"
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_leftovers_of_dead_writers_are_removed(tmp_path):
    from dpo_engine.checkpoint.directory import tidy

    for name in ("step_00000011.tmp.ab12", "step_00000001.old.ab12", "step_00000010", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".latest.77.tmp").touch()
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "step_00000010"]


@pytest.mark.parametrize(
    "there, step, damaged, expected",
    [
        ("2", 4, "", ""),
        ("2 4", 6, "", "2"),
        ("2 4 6", 8, "", "2 4"),
        ("2 4 6", 8, "6", "2 6"),
        ("2 4 8", 6, "8", "2"),
        ("2 4 8", 8, "8", "2 8"),
        ("4 8 8.2", 10, "", "4 8"),
        ("4 8 8.2", 10, "8.2", "4 8.2"),
    ],
)
def test_which_checkpoints_are_deleted(there, step, damaged, expected, tmp_path):
    """Two intact checkpoints remain: the new checkpoint, and the newest intact checkpoint of an earlier step.

    The newest intact checkpoint of a best step also remains, unless the new checkpoint is of the same step.
    """
    from dpo_engine.checkpoint.directory import superseded

    def names(text):
        return [f"step_{int(part.partition('.')[0]):08d}{'.2' if '.' in part else ''}" for part in text.split()]

    for name in names(there):
        (tmp_path / name).mkdir()
    assert superseded(tmp_path, step, keep_last=2, damaged=set(names(damaged))) == names(expected)
    for best in {path.partition(".")[0] for path in there.split() if path not in damaged.split()}:
        kept = superseded(tmp_path, step, keep_last=2, damaged=set(names(damaged)), best={int(best)})
        newest = [part for part in there.split() if part.partition(".")[0] == best and part not in damaged.split()][-1]
        assert kept == [name for name in names(expected) if name != names(newest)[0] or int(best) == step]


def save_often(config, folder, asynchronous):
    from dpo_engine.training.engine import Engine

    engine = Engine.open(config)
    trained = engine.load_policy(total_steps=1)
    saver = saver_of(engine, trained, Path(folder), asynchronous=asynchronous)
    seen = []
    for step in (1, 2, 3, 3):
        saver.save(step, {})
        saver.finish()
        seen.append(sorted(path.name for path in Path(folder).iterdir()))
    engine.close()
    return seen


@pytest.mark.parametrize("asynchronous", [False, True])
def test_newest_are_kept_and_saving_a_step_again_replaces_its_checkpoint(asynchronous, tiny_hf, tmp_path):
    config = config_of(tiny_hf("llama"), tmp_path, {})
    folder = str(tmp_path / "c")
    first, second, third, again = run_ranks(save_often, 1, config=config, folder=folder, asynchronous=asynchronous)[0]
    assert first == ["latest", "step_00000001"]
    assert second == ["latest", "step_00000001", "step_00000002"]
    assert third == ["latest", "step_00000002", "step_00000003"]
    assert again == ["latest", "step_00000002", "step_00000003.2"]


EMPTY = {"format": 2, "step": 4, "updates": 4, "schedule": 4, "layout": {}, "identity": {}, "run": {}, "files": {}}


def test_ranks_that_read_different_storage_are_refused(tmp_path):
    """Each rank reads its own folder, as if each node had a different file system mounted at the same path."""
    from dpo_engine.checkpoint.directory import seal

    for node in (0, 1):
        directory = tmp_path / f"node_{node}" / "step_00000004"
        directory.mkdir(parents=True)
        seal(directory, {**EMPTY, "run": {"node": node}})
    with pytest.raises(AssertionError, match="ranks read different manifests; train.output_dir must be on storage"):
        run_ranks(disagreeing_paths, 2, folder=str(tmp_path))


def disagreeing_paths(folder):
    """Search for a checkpoint. Each rank reads its own folder instead of the folder that rank 0 found."""
    from dpo_engine.checkpoint import directory as checkpoint_directory
    from dpo_engine.checkpoint import load as checkpoint

    original, rank = checkpoint_directory.verify, torch.distributed.get_rank()

    def verify(directory, **parts):
        return original(Path(str(directory).replace("node_0", f"node_{rank}")), **parts)

    checkpoint_directory.verify = verify
    checkpoint.find_checkpoint(Path(folder) / "node_0", torch.distributed.group.WORLD)
