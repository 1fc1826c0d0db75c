"""Tests of the start of a run: resuming from the run's own config.yaml, and from an older checkpoint's identity."""

import yaml

from dpo_engine.checkpoint.resume import with_all_options
from dpo_engine.config.run import Config
from support.ranks import run_ranks
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
