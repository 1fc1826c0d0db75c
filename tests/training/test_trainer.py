"""Tests of complete training runs that read and write real files: outputs, resuming, evaluation, and the first step."""

import json
import math

import pyarrow.parquet
import pytest
import yaml

from dpo_engine.testing.ranks import run_ranks
from dpo_engine.verbs.rehearse import CLOCK
from support.small_run import config_of, log_of, run, write_pairs


@pytest.mark.parametrize(
    "ranks, layout", [(1, {}), (2, {"pp": 2}), pytest.param(2, {}, marks=pytest.mark.slow)], ids=["one", "pp2", "dp2"]
)
def test_run_writes_all_outputs(ranks, layout, files, tiny_hf, tmp_path):
    config = config_of(
        files,
        tiny_hf("llama"),
        tmp_path,
        parallel=layout,
        train={"eval_interval": 2, "eval_at_start": True},
        checkpoint={"save_interval": 2, "keep_last": 2},
    )
    summaries = run_ranks(run, ranks, config=config)
    assert all(summary["step"] == 6 for summary in summaries), "two epochs of 22 pairs in batches of 8 have 3 + 3 steps"
    lines = log_of(tmp_path)
    steps = {line["step"]: line for line in lines if "loss" in line}
    evaluations = {line["step"]: line for line in lines if "eval/loss" in line}
    assert sorted(steps) == [1, 2, 3, 4, 5, 6] and sorted(evaluations) == [0, 2, 4, 6]
    assert steps[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert evaluations[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert evaluations[0]["eval/rewards/accuracies"] == 0.5
    assert evaluations[6]["eval/loss"] < evaluations[0]["eval/loss"]
    for name in ("grad_norm", "learning_rate", "pairs_per_s", "tokens_per_s", "sft_loss", "rewards/margins"):
        assert name in steps[2]
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["latest", "step_00000004", "step_00000006"]
    rows = pyarrow.parquet.read_table(tmp_path / "eval/step_00000006.parquet").to_pylist()
    assert summaries[0]["eval_pairs"] == str(tmp_path / "eval/step_00000006.parquet")
    assert [row["index"] for row in rows] == list(range(7)), (
        "every held-out pair must be evaluated, including those in the last, smaller batch"
    )
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]["epochs"] == 2
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.vocab_size == 515


def test_evaluation_and_export_match_transformers(files, tiny_hf, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from dpo_engine.data.tokenize import build_dataset
    from dpo_engine.data.tokenizer import load_tokenizer
    from dpo_engine.testing.hf_training import sequence_logp

    config = config_of(files, tiny_hf("llama"), tmp_path, parallel={"tp": 2})
    summary = run_ranks(run, 2, config=config)[0]
    tokenizer = load_tokenizer(config.tokenizer_path, None)
    pairs, _ = build_dataset(config.data.validation, tokenizer, config.data, config.cache_dir)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    rows = pyarrow.parquet.read_table(tmp_path / "eval/step_00000006.parquet").to_pylist()
    margins = []
    with torch.no_grad():
        for row in rows:
            pair = pairs[row["index"]]
            expected = {
                f"{prefix}{name}_logps": sequence_logp(model, pair.prompt, getattr(pair, name)).item()
                for prefix, model in (("", exported), ("ref_", start))
                for name in ("chosen", "rejected")
            }
            assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
            chosen = expected["chosen_logps"] - expected["ref_chosen_logps"]
            margins.append(0.1 * (chosen - expected["rejected_logps"] + expected["ref_rejected_logps"]))
    assert summary["eval"]["rewards/margins"] == pytest.approx(sum(margins) / 7, rel=1e-4)
    assert summary["eval"]["rewards/accuracies"] == pytest.approx(sum(m > 0 for m in margins) / 7)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, None])
def test_stopped_run_resumes_bitwise(size, files, tiny_hf, tmp_path):
    model = tiny_hf("llama")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    asked = {"optim": {"lr": 1e-3, "schedule": "constant"}, "parallel": {"tp": 2} if size else {"pp": 2}}
    run_ranks(run, 2, config=config_of(files, model, whole, train={"micro_batch_size": size}, **asked))
    for stop in (2, 6):
        train = {"max_steps": stop, "micro_batch_size": size}
        config = config_of(files, model, parts, train=train, **asked)
        run_ranks(run, 2, config=config)

    def trajectory(folder):
        lines = [line for line in log_of(folder) if "loss" in line]
        return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]

    assert trajectory(parts) == trajectory(whole)
    again = run_ranks(run, 2, config=config)
    assert again[0]["step"] == 6, "a finished run must have nothing left to train"


def test_directory_of_another_run_is_refused(files, tiny_hf, tmp_path):
    model = tiny_hf("llama")
    run_ranks(run, 1, config=config_of(files, model, tmp_path, train={"max_steps": 1}))
    kind, message = run_ranks(run, 1, config=config_of(files, model, tmp_path, loss={"beta": 0.5}))[0]
    assert kind == "CheckpointError" and "loss.beta was 0.1 and is now 0.5" in message
    kind, message = run_ranks(run, 1, config=config_of(files, model, tmp_path, checkpoint={"resume": False}))[0]
    assert kind == "CheckpointError" and "contains a checkpoint for step 1, but checkpoint.resume is false" in message


def run_with_wrong_reference(config):
    """Train with a reference whose weights change after loading, as if by a bug."""
    from dpo_engine.scoring import reference

    original = reference.ResidentReference.__init__

    def spoiled(self, chunks, **kwargs):
        original(self, chunks, **kwargs)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.mul_(1.1)  # the effects of a smaller change on a few pairs could cancel

    reference.ResidentReference.__init__ = spoiled
    return run(config)


def test_unexpected_first_loss_stops_the_run(files, tiny_hf, tmp_path):
    config = config_of(files, tiny_hf("llama"), tmp_path)
    kind, message = run_ranks(run_with_wrong_reference, 1, config=config)[0]
    assert (
        kind == "NumbersError"
        and "it must be 0.6931472" in message
        and "rewards/margins" in message
        and "likely causes" in message
    )


def test_other_reference_changes_the_start(files, tiny_hf, tmp_path):
    other = tiny_hf("llama", rope_theta=10000.0, initializer_range=0.03)
    config = config_of(files, tiny_hf("llama"), tmp_path, reference={"path": str(other)})
    run_ranks(run, 1, config=config)
    first = next(line for line in log_of(tmp_path) if "loss" in line)
    assert abs(first["rewards/margins"]) > 1e-3, "policy and reference must already differ in the first step"


def test_bad_data_ends_all_ranks_with_one_message(files, tiny_hf, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\nnot json\n')
    config = config_of(files, tiny_hf("llama"), tmp_path / "out", data={"train": str(bad)})
    outcomes = run_ranks(run, 2, config=config)
    assert outcomes[0] == outcomes[1] and outcomes[0][0] == "DataError"
    assert f"{bad}:2: " in outcomes[0][1]


MIX = {"name": "mix", "losses": [{"name": "sigmoid", "beta": 0.1}, {"name": "sft", "weight": 0.2}]}


SLOW = [pytest.param({"name": name}, marks=pytest.mark.slow) for name in ("cpo", "aot", "rpo_sq", "sft")]


@pytest.mark.parametrize("loss", [{"name": "simpo"}, MIX, *SLOW], ids=str)
def test_other_losses_train_to_the_end(loss, files, tiny_hf, tmp_path):
    rows = [json.loads(line) for line in open(files["train"], encoding="utf-8")]
    for i, row in enumerate(rows):
        row |= {"chosen_reward": 1.0 + i % 3, "rejected_reward": 0.5}
    rated = tmp_path / "rated.jsonl"
    rated.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"train": str(rated), "validation": None, "validation_fraction": 0.3}
    config = config_of(files, tiny_hf("llama"), tmp_path / "out", loss=loss, data=data, parallel={"pp": 2})
    summary = run_ranks(run, 2, config=config)[0]
    assert math.isfinite(summary["eval"]["loss"]) and summary["step"] > 0


def test_loss_without_its_columns_names_file_and_field(files, tiny_hf, tmp_path):
    config = config_of(files, tiny_hf("llama"), tmp_path, loss={"name": "rpo_sq"})
    kind, message = run_ranks(run, 1, config=config)[0]
    assert kind == "DataError"
    expected = "loss rpo_sq needs chosen_reward in every record of data.train, but chosen_reward is missing in 22 of 22"
    assert message.startswith(f"{files['train']}: {expected}")


@pytest.fixture(scope="module")
def one_step(files, tiny_hf, tmp_path_factory):
    """Run one training step. Return the run's directory."""
    output = tmp_path_factory.mktemp("one_step")
    run_ranks(run, 1, config=config_of(files, tiny_hf("llama"), output, train={"max_steps": 1}))
    return output


@pytest.mark.parametrize(
    "section, change, key",
    [
        ("data", {"seed": 5}, "order.seed"),
        ("data", {"shuffle": False}, "order.shuffle"),
        ("train", {"global_batch_size": 4}, "global_batch_size"),
        ("model", {"dtype": "bf16"}, "dtype"),
        ("data", {"max_length": 9}, "train_data.digest"),
        ("data", {"max_length": 9}, "limits.max_length"),
        ("train", {"max_steps": 3}, "total_steps"),
        ("optim", {"clip_grad": 2.0}, "optim.clip_grad"),
    ],
)
def test_change_of_the_trajectory_is_refused(section, change, key, one_step, files, tiny_hf):
    config = config_of(files, tiny_hf("llama"), one_step)
    changed = getattr(config, section).model_copy(update=change)
    kind, message = run_ranks(run, 1, config=config.model_copy(update={section: changed}))[0]
    assert kind == "CheckpointError" and f"{key} was" in message


def test_refused_run_leaves_the_directory_unchanged(one_step, files, tiny_hf):
    before = (one_step / "config.yaml").read_text(), (one_step / "metrics.jsonl").read_text()
    outcome = run_ranks(run, 1, config=config_of(files, tiny_hf("llama"), one_step, loss={"beta": 0.5}))[0]
    assert outcome[0] == "CheckpointError"
    assert ((one_step / "config.yaml").read_text(), (one_step / "metrics.jsonl").read_text()) == before


def test_other_reference_is_refused_on_resume(files, tiny_hf, tmp_path):
    model, other = tiny_hf("llama"), tiny_hf("llama", rope_theta=10000.0, initializer_range=0.03)
    run_ranks(run, 1, config=config_of(files, model, tmp_path, train={"max_steps": 1}))
    outcome = run_ranks(run, 1, config=config_of(files, model, tmp_path, reference={"path": str(other)}))[0]
    assert outcome[0] == "CheckpointError" and "reference" in outcome[1]


def test_explicit_default_is_the_same_run(files, tiny_hf, tmp_path):
    model, optim = tiny_hf("llama"), {"schedule": "constant"}
    run_ranks(run, 1, config=config_of(files, model, tmp_path, optim=optim, train={"max_steps": 1}))
    outcome = run_ranks(run, 1, config=config_of(files, model, tmp_path, optim=optim, loss={"beta": 0.1}))[0]
    assert outcome["step"] == 6


def test_evaluation_means_are_weighted_by_pair(files, tiny_hf, tmp_path):
    """Each held-out pair counts in proportion to its weight, so the mean stays the same if all weights are tripled."""
    path = tmp_path / "heavy.jsonl"
    lines = [json.loads(line) for line in open(files["validation"], encoding="utf-8")]
    path.write_text("".join(json.dumps({**row, "weight": 3.0}) + "\n" for row in lines), encoding="utf-8")
    model = tiny_hf("llama")
    light, heavy = (
        run_ranks(run, 1, config=config_of(files, model, tmp_path / name, data=data, train={"max_steps": 2}))[0]
        for name, data in (("light", {}), ("heavy", {"validation": str(path)}))
    )
    assert heavy["eval"] == pytest.approx(light["eval"], rel=1e-6)


def test_log_interval_logs_its_steps_and_the_last(files, tiny_hf, tmp_path):
    run_ranks(run, 1, config=config_of(files, tiny_hf("llama"), tmp_path, logging={"log_interval": 4}))
    assert [line["step"] for line in log_of(tmp_path) if "loss" in line] == [4, 6]


def test_throughput_counts_the_whole_global_batch(files, tiny_hf, tmp_path):
    from dpo_engine.data.tokenize import build_dataset
    from dpo_engine.data.tokenizer import load_tokenizer

    train = {"max_steps": 3, "micro_batch_size": 1}
    config = config_of(files, tiny_hf("llama"), tmp_path, train=train, batch={"layout": "stacked"})
    run_ranks(run, 2, config=config)
    line = next(line for line in log_of(tmp_path) if line["step"] == 3)
    pairs, _ = build_dataset(
        config.data.train, load_tokenizer(config.tokenizer_path, None), config.data, tmp_path / "c"
    )
    from dpo_engine.batching.plan import Plan

    indices = Plan(pairs, global_batch_size=8).pairs(2)
    assert line["pairs_per_s"] * line["step_time_s"] == pytest.approx(len(indices))
    # Each pair is a micro-batch of two rows. Both rows have the length of the pair's longer sequence.
    expected = sum(2 * (len(pairs[i].prompt) + max(len(pairs[i].chosen), len(pairs[i].rejected))) for i in indices)
    assert line["tokens_per_s"] * line["step_time_s"] == pytest.approx(expected)
    assert line["layout_gain"] == pytest.approx(1)


def test_non_finite_values_stop_the_run(files, tiny_hf, tmp_path):
    """A run that has diverged must not save bad checkpoints, which would replace good ones."""
    config = config_of(files, tiny_hf("llama"), tmp_path, optim={"lr": 1e30, "clip_grad": 0.0})
    outcome = run_ranks(run, 1, config=config)[0]
    assert outcome[0] == "NumbersError" and "step" in outcome[1]
    assert not list((tmp_path / "checkpoints").glob("step_*"))


WRONG_SHAPE = """
from dpo_engine.objective.losses import LOSSES


@LOSSES.register("summed", needs_reference=True, at_init=None)
def summed(policy, reference):
    return (policy.rejected - policy.chosen).sum()
"""


def test_loss_must_return_one_value_per_pair(files, tiny_hf, tmp_path, monkeypatch):
    from dpo_engine.config.run import import_plugins

    (tmp_path / "summed_loss.py").write_text(WRONG_SHAPE)
    monkeypatch.syspath_prepend(tmp_path)
    assert import_plugins(["summed_loss"]) == []
    kind, message = run_ranks(run, 1, config=config_of(files, tiny_hf("llama"), tmp_path, loss={"name": "summed"}))[0]
    assert kind == "ConfigError" and "the loss must return one value per pair" in message


def test_metrics_by_source_and_token_weights_on_resume(files, tiny_hf, tmp_path):
    """With `loss.use_weighting`, the first loss cannot be predicted, so its value must not stop the run."""
    other = write_pairs(tmp_path / "other.jsonl", 6, start=50)
    sections = {
        "data": {"train": [files["train"], other]},
        "train": {"epochs": 1, "max_steps": 2},
        "logging": {"entropy": True},
        "checkpoint": {"export": False},
    }
    weighted = {"ld_alpha": 0.5, "use_weighting": True}
    config = config_of(files, tiny_hf("llama"), tmp_path / "run", loss=weighted, **sections)
    run_ranks(run, 1, config=config)
    lines = log_of(tmp_path / "run")
    (first, second), (evaluation,) = [x for x in lines if "loss" in x], [x for x in lines if "eval/loss" in x]
    for line in (first, second):
        assert line["source/train/pairs"] + line["source/other/pairs"] == 8
        parts = [line[f"source/{name}/loss"] * line[f"source/{name}/pairs"] for name in ("train", "other")]
        assert sum(parts) / 8 == pytest.approx(line["loss"], rel=1e-6)
    assert first["loss"] != pytest.approx(math.log(2), rel=0.01) and first["entropy/chosen"] > 0
    assert evaluation["eval/entropy/rejected"] > 0 and not any("source/" in name for name in evaluation)
    kind, message = run_ranks(run, 1, config=config_of(files, tiny_hf("llama"), tmp_path / "run", **sections))[0]
    assert kind == "CheckpointError" and "loss was {ld_alpha: 0.5, use_weighting: true} and is now {}" in message


def prompts_of_steps(config):
    from dpo_engine.training.engine import Engine
    from dpo_engine.training.run_data import open_data

    engine = Engine.open(config)
    data = open_data(config, engine.groups)
    engine.close()
    return [data.train.prompt_keys[data.plan.pairs(step)].tolist() for step in range(data.plan.num_steps)]


def test_group_by_prompt_puts_a_prompts_pairs_in_one_step(files, tiny_hf, tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"prompt": f"which is larger {i % 4}", "chosen": f" first {i}", "rejected": " second"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    size = {"global_batch_size": 3, "epochs": 1}
    for grouped in (True, False):
        data = {"train": str(path), "group_by_prompt": grouped}
        config = config_of(files, tiny_hf("llama"), tmp_path / str(grouped), data=data, train=size)
        steps = run_ranks(prompts_of_steps, 1, config=config)[0]
        assert all(len(set(step)) == 1 for step in steps) == grouped
