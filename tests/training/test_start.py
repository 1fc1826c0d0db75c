"""Tests of the start of a run.

A run must resume if it is started again with its own config.yaml, or if an older version of the engine saved the
checkpoint. If the engine chooses the size of micro-batches, the log and the checkpoints must contain this size.
"""

import yaml

from dpo_engine.checkpoint.resume import with_all_options
from dpo_engine.config.run import Config
from dpo_engine.testing.ranks import run_ranks
from support.small_run import config_of, run


def test_run_of_a_mixed_loss_resumes_from_its_own_configuration_file(files, tiny_hf, tmp_path):
    loss = {"name": "mix", "losses": [{"name": "sigmoid", "beta": 0.3}, {"name": "sft", "weight": 0.5}]}
    settings = {"loss": loss, "checkpoint": {"export": False}, "optim": {"schedule": "constant"}}
    model = tiny_hf("llama", num_hidden_layers=2)
    config = config_of(files, model, tmp_path / "out", train={"max_steps": 1}, **settings)
    run_ranks(run, 1, config=config)
    written = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert written["loss"]["losses"][1] == {"name": "sft", "weight": 0.5, "nll": "batch_mean"}
    written["train"]["max_steps"] = 2
    for again in (Config.parse(written), config_of(files, model, tmp_path / "out", train={"max_steps": 3}, **settings)):
        assert run_ranks(run, 1, config=again)[0]["step"] == again.train.max_steps


def told(config):
    """Train. Return the log lines about micro-batches, and the section `batch` that the checkpoint records."""
    from dpo_engine.batching import micro_batches
    from dpo_engine.checkpoint.directory import committed, read_manifest
    from dpo_engine.reporting.sinks import Sinks

    assert not micro_batches.is_settled(config)
    lines, say = [], Sinks.say
    Sinks.say = lambda sinks, line: (lines.append(line), say(sinks, line))
    run(config)
    saved = read_manifest(committed(config.checkpoint_dir)[-1])["run"]["config"]["batch"]
    return [line for line in lines if "batch" in line and "global" not in line and "planned" not in line], saved


def test_chosen_micro_batches_are_logged_and_recorded(files, tiny_hf, tmp_path, monkeypatch):
    from dpo_engine.model import batch_size

    asked = {"checkpoint": {"export": False}, "optim": {"schedule": "constant"}}
    configs = [
        config_of(
            files, tiny_hf("llama"), tmp_path / "out", train={"max_steps": step, "micro_batch_size": None}, **asked
        )
        for step in (1, 2, 3)
    ]
    choice = "micro-batches: at most {} tokens; more would save little time"
    (first, saved), (second, _) = (run_ranks(told, 1, config=config)[0] for config in configs[:2])
    assert first == second and first[1:] == [choice.format("2,048")]
    assert saved == {"layout": "tree", "share": True, "tokens_per_micro_batch": 2048}
    monkeypatch.setitem(batch_size.ENOUGH, "cpu", 999)  # as on another device
    third, saved = run_ranks(told, 1, config=configs[2])[0]
    assert third[1:] == [
        choice.format("999"),
        "batch.tokens_per_micro_batch was 2048 when the checkpoint was saved and is now 999: results may differ by "
        "rounding",
    ]
    assert saved["tokens_per_micro_batch"] == 999


def test_identity_of_an_older_checkpoint_is_completed():
    old = {"seed": 1, "loss": {"name": "mix", "losses": [{"name": "sft"}]}}
    assert with_all_options(old) == {
        "seed": 1,
        "loss": {"name": "mix", "losses": [{"name": "sft", "weight": 1.0, "nll": "batch_mean"}]},
    }
    for other in ({"loss": {"name": "sigmoid", "beta": 1}}, {"loss": {"name": "lost"}}, {"seed": 1}):
        assert with_all_options(other) == other
    unknown = {"loss": {"name": "mix", "losses": [{"name": "lost"}]}}
    assert with_all_options(unknown) == unknown
