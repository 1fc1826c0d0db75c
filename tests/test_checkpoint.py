"""Checkpoints: resume continues the same trajectory, in the same or another layout; damage is refused and named."""

import json
import shutil

import pytest
from pairs import RandomPairs, global_batches
from ranks import run_ranks
from trajectory import VOCAB, run_config

SIZES = [4] * 6
HALF = 3
IDENTITY = {"model": "tiny", "loss": {"name": "sigmoid"}}


def run(config, *, save_at=None, load_from=None, folder=None, identity=IDENTITY):
    """Train over ``SIZES``, from the beginning or from a checkpoint; returns the metrics of each step made."""
    from pathlib import Path

    from dpo_engine.errors import CheckpointError
    from dpo_engine.training.checkpoint import load_checkpoint, save_checkpoint
    from dpo_engine.training.engine import Engine, batch_facts
    from dpo_engine.training.reference_modes import open_reference
    from dpo_engine.training.step import train_step

    engine = Engine.open(config)
    pairs = RandomPairs(sum(SIZES), VOCAB)
    trained = engine.load_policy(total_steps=len(SIZES))
    reference = open_reference(engine, trained.chunks)
    start = 0
    if load_from is not None:
        try:
            start = load_checkpoint(Path(folder), load_from, trained, engine.arch, engine.groups, identity)
        except CheckpointError as error:
            return str(error)
    steps = []
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
        if step + 1 == save_at:
            save_checkpoint(Path(folder), save_at, trained, engine.arch, engine.groups, identity, keep_last=2)
    engine.close()
    return steps


LAYOUTS = {
    "one": (1, {}),
    "one plain": (1, {"distributed_optimizer": False}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
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


@pytest.mark.parametrize("name", ["one", "one plain", "dp2", "dp2 plain", "tp2 pp2", "pp2 vpp2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_in_the_same_layout_is_bitwise(name, dtype, tiny_hf, tmp_path):
    ranks, layout = LAYOUTS[name]
    model = tiny_hf("llama", tie_word_embeddings=name == "tp2 pp2")
    config = config_of(model, tmp_path, layout, model={"path": str(model), "dtype": dtype})
    expected = run_ranks(run, ranks, config=config, save_at=HALF, folder=str(tmp_path / "c"))
    got = run_ranks(run, ranks, config=config, load_from=HALF, folder=str(tmp_path / "c"))
    assert got[0] == expected[0][HALF:]


@pytest.mark.parametrize(
    "written, read",
    [
        ("one", "tp2 pp2"),
        ("tp2 pp2", "one plain"),
        ("tp2 dp2", "pp2"),
        ("dp2", "tp2"),
        ("dp2 plain", "dp2"),
        ("pp2 vpp2", "tp2 dp2"),
        ("cp2", "one"),
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
    """A checkpoint of two ranks to damage, and the configuration that wrote it."""
    folder = tmp_path_factory.mktemp("saved")
    config = config_of(tiny_hf("llama"), folder, {"tp": 2})
    run_ranks(run, 2, config=config, save_at=HALF, folder=str(folder / "c"))
    return folder / "c", config


def damaged(saved, tmp_path, change):
    folder, config = saved
    shutil.copytree(folder, tmp_path / "c")
    change(tmp_path / "c" / f"step_{HALF:08d}")
    messages = run_ranks(run, 2, config=config, load_from=HALF, folder=str(tmp_path / "c"))
    assert messages[0] == messages[1], "ranks disagree"
    return messages[0]


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: flip(d / "rank_00001.safetensors", -5), "rank_00001.safetensors: SHA-256 differs"),
        (lambda d: (d / "rank_00000.safetensors").write_bytes(b"x" * 10), "rank_00000.safetensors: 10 bytes, must be"),
        (lambda d: (d / "rank_00001.safetensors").unlink(), "No such file"),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json: damaged"),
        (lambda d: (d / "manifest.json").write_text('{"format": 99}'), "format 99; this version reads 1"),
    ],
    ids=["flipped byte", "short shard", "missing shard", "torn manifest", "newer format"],
)
def test_damage_is_named_on_every_rank(change, message, saved, tmp_path):
    assert message in damaged(saved, tmp_path, change)


def test_another_runs_checkpoint_is_refused(saved):
    folder, config = saved
    other = {**IDENTITY, "loss": {"name": "sigmoid", "beta": 0.5}}
    message = run_ranks(run, 2, config=config, load_from=HALF, folder=str(folder), identity=other)[0]
    assert "loss.beta was not there and is now 0.5" in message


def test_a_checkpoint_of_another_model_is_refused(saved, tiny_hf, tmp_path):
    folder, _ = saved
    config = config_of(tiny_hf("llama", num_hidden_layers=6), tmp_path, {})
    message = run_ranks(run, 1, config=config, load_from=HALF, folder=str(folder))[0]
    assert "decoder.layers." in message and "missing" in message


def test_no_pickle_inside(saved):
    folder, _ = saved
    names = sorted(path.name for path in (folder / f"step_{HALF:08d}").iterdir())
    assert names == ["manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"]
    manifest = json.loads((folder / f"step_{HALF:08d}" / "manifest.json").read_text())
    assert manifest["step"] == HALF and manifest["identity"] == IDENTITY


def test_only_complete_directories_count(tmp_path):
    from dpo_engine.training.checkpoint import latest_step, steps

    assert latest_step(tmp_path / "nowhere") is None
    for name in ("step_00000002", "step_00000010", "step_00000011.tmp", "step_00000012", "other"):
        (tmp_path / name).mkdir()
    for name in ("step_00000002", "step_00000010", "step_00000011.tmp"):
        (tmp_path / name / "manifest.json").write_text("{}")
    assert steps(tmp_path) == [2, 10]
    assert latest_step(tmp_path) == 10


def save_often(config, folder):
    from pathlib import Path

    from dpo_engine.training.checkpoint import save_checkpoint
    from dpo_engine.training.engine import Engine

    engine = Engine.open(config)
    trained = engine.load_policy(total_steps=1)
    for step in (1, 2, 3, 3):
        save_checkpoint(Path(folder), step, trained, engine.arch, engine.groups, {}, keep_last=2)
    engine.close()


def test_the_newest_are_kept_and_saving_twice_replaces(tiny_hf, tmp_path):
    from dpo_engine.training.checkpoint import steps

    config = config_of(tiny_hf("llama"), tmp_path, {})
    run_ranks(save_often, 1, config=config, folder=str(tmp_path / "c"))
    assert steps(tmp_path / "c") == [2, 3]
    assert not list((tmp_path / "c").glob("*.tmp"))
