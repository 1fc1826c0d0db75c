"""Tests of the parts of a run that `check` tries (loss, resuming, trackers, intervals), and of warnings."""

import json

import pytest

from dpo_engine.errors import CheckpointError, ConfigError
from dpo_engine.objective.losses import LOSSES
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.verbs.dry_run import dry_run, try_resume, try_trackers
from dpo_engine.verbs.summary import run_warnings
from support.small_run import config_of, run, write_pairs


@pytest.fixture(scope="module")
def saved_run(files, tiny_hf, tmp_path_factory):
    """Return a function that takes changed settings, and returns the config of a run with a checkpoint for step 3."""
    folder = tmp_path_factory.mktemp("dry_run") / "run"
    model = tiny_hf("llama", num_hidden_layers=2)
    common = {"optim": {"lr": 1e-3, "warmup_steps": 1, "schedule": "cosine"}, "train": {"epochs": 1}}

    def make(**sections):
        merged = {name: {**common.get(name, {}), **sections.get(name, {})} for name in {**common, **sections}}
        merged["checkpoint"] = {"export": False, **merged.get("checkpoint", {})}
        return config_of(files, model, folder, **merged)

    (summary,) = run_ranks(run, 1, config=make())
    assert summary["step"] == 3
    return make


CHANGES = {
    "lr": {"optim": {"lr": 2e-3}},
    "loss": {"loss": {"beta": 0.3}},
    "length": {"train": {"epochs": 2}},
    "batch": {"train": {"global_batch_size": 4}},
    "limits and seed": {"data": {"max_length": 60}, "train": {"seed": 7}},
    "resume": {"checkpoint": {"resume": False}},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "length" else pytest.mark.slow) for name in CHANGES]
)
def test_check_and_train_refuse_the_same_checkpoint_with_the_same_words(name, saved_run):
    config = saved_run(**CHANGES[name])
    with pytest.raises(CheckpointError) as error:
        dry_run(config)
    refused = run_ranks(run, 1, config=config)[0]
    assert refused == ("CheckpointError", str(error.value))


def test_a_run_that_may_resume(saved_run):
    assert try_resume(saved_run()) == [
        "would resume after step 3; `train` also compares the training data and the reference with those of the "
        "checkpoint, and checks the hashes of the checkpoint's files"
    ]
    accepted = saved_run(train={"global_batch_size": 4}, checkpoint={"accept_changes": ["global_batch_size"]})
    (line,) = try_resume(accepted)
    assert line.startswith("would resume after step 3, with accepted changes of global_batch_size; `train` also")
    assert try_resume(saved_run(train={"output_dir": "/nonexistent/run"})) == []


def test_a_run_with_adapters_may_resume(files, tiny_hf, tmp_path):
    """The first run exports an adapter. The second run, in another directory, starts from this adapter."""

    def make(folder, **adapter):
        sections = {"adapter": adapter, "train": {"max_steps": 1}, "checkpoint": {"save_interval": 1}}
        return config_of(files, tiny_hf("llama", num_hidden_layers=2), tmp_path / folder, **sections)

    first = make("first", rank=4)
    run_ranks(run, 1, config=first)
    assert try_resume(first)[0].startswith(
        "would resume after step 1; `train` also compares the training data, the base weights and the reference with"
    )
    with pytest.raises(CheckpointError, match="adapter.rank was 4 and is now 8; the saved weights do not fit; restore"):
        try_resume(make("first", rank=8))
    with pytest.raises(CheckpointError, match="adapter was .* and is now null; the saved weights do not fit; restore"):
        try_resume(first.model_copy(update={"adapter": None}))
    second = make("second", path=str(tmp_path / "first" / "hf_adapter"))
    run_ranks(run, 1, config=second)
    assert try_resume(second)[0].startswith("would resume after step 1; `train` also")


def test_a_damaged_checkpoint_is_named(saved_run, tmp_path):
    broken = tmp_path / "checkpoints" / "step_00000009"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{}")
    (line,) = try_resume(saved_run(train={"output_dir": str(tmp_path)}))
    assert line.startswith("step_00000009 cannot be read and would be skipped: ")


def test_a_wrong_loss_is_named(saved_run):
    LOSSES.register("only_a_sum")(lambda policy, reference: (policy.chosen - reference.chosen).sum())
    try:
        with pytest.raises(ConfigError) as error:
            dry_run(saved_run(loss={"name": "only_a_sum"}))
    finally:
        del LOSSES["only_a_sum"]
    assert str(error.value).startswith(
        "loss.name=only_a_sum: the loss returned a tensor of shape [] for 2 pairs; it must"
    )


def test_what_was_tried(saved_run, monkeypatch):
    config = saved_run(logging={"tensorboard": True, "sinks": {"trackio": {}}})
    before = sorted(config.checkpoint_dir.parent.iterdir())
    lines = dry_run(config)
    assert lines[0] == (
        "loss",
        "on two example pairs, it is finite, has gradients, and does not couple pairs",
    )
    assert lines[2:] == [
        ("tracker", "tensorboard: opened in a temporary directory, without a connection to a server"),
        ("tracker", "trackio: not opened, because a registered sink could create a run on a server"),
    ]
    assert sorted(config.checkpoint_dir.parent.iterdir()) == before, "nothing may be written"
    only_a_sink = saved_run(logging={"sinks": {"trackio": {}}})
    assert dry_run(only_a_sink)[2:] == [
        ("tracker", "trackio: not opened, because a registered sink could create a run on a server")
    ]

    def fail(opening):
        raise ConfigError("logging.tensorboard=true: broken; repair it")

    monkeypatch.setattr("dpo_engine.reporting.sinks.TensorBoardSink", fail)
    with pytest.raises(ConfigError, match="logging.tensorboard=true: broken; repair it"):
        dry_run(config)


@pytest.mark.slow
def test_online_trackers_are_opened_without_a_server(saved_run):
    pytest.importorskip("wandb"), pytest.importorskip("mlflow")
    online = {"project": "p", "mode": "online"}
    remote = {"experiment": "e", "tracking_uri": "http://127.0.0.1:9"}
    lines, problems = try_trackers(saved_run(logging={"wandb": online, "mlflow": remote}))
    assert problems == []
    assert lines == ["wandb, mlflow: opened in a temporary directory, without a connection to a server"]


def test_intervals_below_a_step_are_refused(saved_run):
    """An epoch of 22 pairs in batches of 8 has 3 steps."""
    with pytest.raises(ConfigError) as error:
        dry_run(saved_run(train={"eval_interval": "0.3epoch"}, checkpoint={"save_interval": "0.3epoch"}))
    assert error.value.problems == [
        f"{key}=0.3epoch: is less than one step, because an epoch has 3 steps; set at least 0.3334epoch, or 1 for "
        "every step"
        for key in ("train.eval_interval", "checkpoint.save_interval")
    ]
    dry_run(saved_run(checkpoint={"save_interval": "0.34epoch"}))


def test_warnings_before_a_run(files, tiny_hf, tmp_path):
    shared = write_pairs(tmp_path / "both.jsonl", 12)
    model = tiny_hf("llama", num_hidden_layers=2)
    bad = config_of(files, model, tmp_path, data={"train": shared, "validation": shared}, optim={"warmup_steps": 50})
    assert run_warnings(bad) == [
        "optim.warmup_steps=50: the run has 4 steps, so the learning rate never reaches optim.lr; shorten the warmup",
        f"data.validation: {shared} is also in data.train, so evaluations look better than they should; use other "
        "records",
    ]
    assert run_warnings(config_of(files, model, tmp_path)) == []

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for named, warned in (("lab/Other-8B", True), (f"lab/{model.name.upper()}", False), (None, False)):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
        assert (
            run_warnings(config_of(files, model, tmp_path, adapter={"path": str(adapter)}))
            == [
                f"adapter.path={adapter}: was trained on {named}, but model.path is {model}; if these are different "
                "weights, the adapter does not fit model.path"
            ]
            * warned
        )
