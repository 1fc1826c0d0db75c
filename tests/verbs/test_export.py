"""Tests of exports by `export` and `train`: checkpoint, dtype, tokenizer, chat template, and model card."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dpo_engine.checkpoint.best import best_saved
from dpo_engine.config.run import Config
from dpo_engine.config.sections import KeepBest
from dpo_engine.errors import CheckpointError, ConfigError
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.training.model_card import RunFacts, code, hub_id, last_metrics, model_card, shown
from dpo_engine.verbs.export import export
from dpo_engine.verbs.inspect import saved_line
from dpo_engine.verbs.train import train
from support.small_run import WORDS, log_of

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} says: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant says:{% endif %}"
)


def talks(path, count):
    rows = []
    for i in range(count):
        prompt = [{"role": "user", "content": f"which is larger {i} {WORDS[i % len(WORDS)]}"}]
        chosen, rejected = " ".join(WORDS[: 1 + i % 5]), f"smaller  {i}"
        rows.append({"prompt": prompt, "chosen": said(chosen), "rejected": said(rejected)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def said(text):
    return [{"role": "assistant", "content": text}]


def export_quietly(config, options):
    lines = []
    return export(config, say=lines.append, **options), lines


def exported(config, **options):
    """Export on one rank. Return the directory of the export, and the lines that `export` reports."""
    return run_ranks(export_quietly, 1, config=config, options=options)[0]


@pytest.fixture(scope="module")
def done(files, tiny_hf, tmp_path_factory):
    """Train 6 steps on conversations. The tokenizer is a bare SentencePiece model, and the chat template is a file.

    Returns the run's configuration and the records of its data file.
    """
    folder = tmp_path_factory.mktemp("export")
    (folder / "own.jinja").write_text(TEMPLATE)
    rows = talks(folder / "talks.jsonl", 8)
    config = Config.parse(
        {
            "model": {"path": str(tiny_hf("llama", num_hidden_layers=2)), "tokenizer": files["tokenizer"]},
            "data": {
                "train": str(folder / "talks.jsonl"),
                "validation": str(folder / "talks.jsonl"),
                "chat_template": str(folder / "own.jinja"),
                "max_length": 96,
            },
            "optim": {"lr": 3e-3, "schedule": "constant"},
            "loss": {"name": "hinge", "beta": 0.2},
            "train": {"output_dir": str(folder / "out"), "global_batch_size": 4, "epochs": 3, "eval_interval": 1},
            "checkpoint": {
                "save_interval": 1,
                "keep_last": 2,
                "keep_best": {"metric": "eval/rewards/accuracies"},
                "async_save": False,
            },
            "logging": {"progress": "off", "page": False, "token_samples": 0},
        }
    )
    run_ranks(train, 1, config=config)
    return config, rows


def test_exported_directory_encodes_the_runs_pairs_to_the_trained_ids(done):
    from dpo_engine.data.tokenize import build_dataset
    from dpo_engine.data.tokenizer import load_tokenizer

    config, rows = done
    trained_with = load_tokenizer(config.tokenizer_path, config.data.chat_template)
    pairs, _ = build_dataset(config.data.train, trained_with, config.data, config.cache_dir)
    found = AutoTokenizer.from_pretrained(f"{config.train.output_dir}/hf")
    assert found.chat_template == TEMPLATE
    assert len(pairs) == len(rows)
    for pair, row in zip((pairs[i] for i in range(len(pairs))), rows, strict=True):
        ids = {"tokenize": True, "return_dict": False}
        prompt = found.apply_chat_template(row["prompt"], add_generation_prompt=True, **ids)
        assert pair.prompt.tolist() == prompt
        for name in ("chosen", "rejected"):
            whole = found.apply_chat_template([*row["prompt"], *row[name]], **ids)
            assert [*pair.prompt.tolist(), *getattr(pair, name).tolist()] == whole


def test_configuration_of_the_run_has_the_defaults_of_the_loss(done):
    config, _ = done
    written = yaml.safe_load((config.cache_dir.parent / "config.yaml").read_text())
    assert written["loss"] == {
        "name": "hinge",
        "ld_alpha": None,
        "use_weighting": False,
        "balance": 0.0,
        "router_z": 0.0,
        "beta": 0.2,
        "divergence": "reverse_kl",
        "alpha": None,
        "reference_free": False,
    }
    assert Config.parse(written).loss.name == "hinge"


def test_best_checkpoint_is_kept_and_chosen(done):
    config, _ = done
    log = {line["step"]: line.get("eval/rewards/accuracies") for line in log_of(config.cache_dir.parent)}
    best = max(log, key=lambda step: (log[step], -step))
    assert best < 5, "the test proves nothing if the best checkpoint is one of the newest two, which are kept anyway"
    kept = sorted(path.name for path in config.checkpoint_dir.iterdir() if path.is_dir())
    assert kept == [f"step_{step:08d}" for step in (best, 5, 6)]
    lines = []
    assert (config.checkpoint_dir / "best").read_text() == f"step_{best:08d}\n"
    assert best_saved(config, lines.append) == best
    assert lines == [f"best checkpoint by highest eval/rewards/accuracies: step {best} ({log[best]:.6g})"]
    target, lines = exported(config, best=True)
    assert target == f"{config.train.output_dir}/hf_step_{best:08d}" and len(lines) == 1
    assert saved_line(config) == (
        f"checkpoints: steps {best}, 5, 6; best by highest eval/rewards/accuracies: step {best} ({log[best]:.6g})"
    )
    assert "| step chosen by | `highest eval/rewards/accuracies` |" in card_of(Path(target))[1]


def card_of(directory):
    text = (directory / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_step_dtype_and_card_of_an_export(done, tmp_path):
    config, _ = done
    written = exported(config, step=5, to=str(tmp_path / "bf16"), dtype="bf16")
    assert written == (str(tmp_path / "bf16"), [])
    weights = load_file(tmp_path / "bf16/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    settings = json.loads((tmp_path / "bf16/config.json").read_text())
    assert settings.get("dtype", settings.get("torch_dtype")) == "bfloat16"
    front, body = card_of(tmp_path / "bf16")
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo-engine", "preference-optimization", "hinge"],
    }
    log = {line["step"]: line for line in log_of(config.cache_dir.parent) if "loss" in line}
    judged = {line["step"]: line for line in log_of(config.cache_dir.parent) if "eval/loss" in line}
    assert f"| `loss` | {log[5]['loss']:.4g} | {judged[5]['eval/loss']:.4g} |" in body
    for part in (
        "| metric | training, step 5 | held-out, step 5 |",
        "| loss | `hinge` with `beta=0.2, divergence=reverse_kl, alpha=None, reference_free=False` |",
        "| layout | tp 1, pp 1, cp 1, ep 1, 1 rank |",
        "| steps | 5, with a global batch size of 4 |",
        "| dtype | `float32`, exported as `bf16` |",
        "| training | `talks.jsonl` | `auto` |",
        "| chat template | `own.jinja`, exported as `chat_template.jinja` |",
        "Training pairs: 8.",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
    ):
        assert part in body, part
    assert str(tmp_path.parent) not in body and config.train.output_dir not in body, "a card must not show local paths"
    assert "learning_rate" not in body and "pairs_per_s" not in body


def digests(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_exports_of_a_step_are_equal_and_replace_each_other(done, tmp_path):
    config, _ = done
    first, again = tmp_path / "first", tmp_path / "again"
    for target in (first, again, again):
        exported(config, to=str(target))
    assert digests(first) == digests(again)
    hf = digests(config.checkpoint_dir.parent / "hf")
    assert hf == digests(first), "train and export must write the same files"
    assert {"README.md", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"} <= hf.keys()


def test_changed_template_is_named(done, tmp_path):
    config, _ = done
    (tmp_path / "other.jinja").write_text("{{ messages }}")
    changed = config.model_copy(
        update={"data": config.data.model_copy(update={"chat_template": str(tmp_path / "other.jinja")})}
    )
    _, lines = exported(changed, to=str(tmp_path / "hf"))
    assert lines == [
        "export: the chat template or the tokenizer's files have changed since training; the export contains the "
        "current template and files"
    ]


def run_of(tmp_path, steps, lines):
    config = Config.parse({"model": {"path": "m"}, "data": {"train": "d"}, "train": {"output_dir": str(tmp_path)}})
    for step in steps:
        (config.checkpoint_dir / f"step_{step:08d}").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config


def test_better_step_without_a_checkpoint_is_named(tmp_path):
    config = run_of(
        tmp_path, [4, 6], [{"step": step, "eval/loss": loss} for step, loss in ((2, 0.25), (4, 0.5), (6, 0.75))]
    )
    lines = []
    assert best_saved(config, lines.append) == 4
    assert lines == [
        "best checkpoint by lowest eval/loss: step 4 (0.5)",
        "step 2 (0.25) was better but has no checkpoint; to keep the checkpoint of the best step, set "
        "checkpoint.keep_best in the next run",
    ]


def test_no_advice_that_the_run_follows_already(tmp_path):
    config = run_of(tmp_path, [4], [{"step": step, "eval/loss": loss} for step, loss in ((2, 0.25), (4, 0.5))])
    kept = config.checkpoint.model_copy(update={"keep_best": KeepBest(metric="eval/loss")})
    lines = []
    assert best_saved(config.model_copy(update={"checkpoint": kept}), lines.append) == 4
    assert lines[1] == "step 2 (0.25) was better but has no checkpoint"


def test_no_advice_if_the_model_before_training_was_better(tmp_path):
    config = run_of(tmp_path, [4], [{"step": step, "eval/loss": loss} for step, loss in ((0, 0.25), (4, 0.5))])
    lines = []
    assert best_saved(config, lines.append) == 4
    assert lines[1] == "step 0 (0.25) was better, but it is the model before training and has no checkpoint"


def test_best_without_an_evaluated_checkpoint_is_refused(tmp_path):
    config = run_of(tmp_path, [4], [{"step": 2, "eval/loss": 0.5}, {"step": 4, "loss": 0.5}])
    with pytest.raises(CheckpointError) as caught:
        best_saved(config)
    assert str(caught.value) == (
        f"{tmp_path}/checkpoints: no checkpoint has a value of eval/loss in {tmp_path}/metrics.jsonl; evaluate at the "
        "steps that are saved (train.eval_interval), or choose a step with --step"
    )
    with pytest.raises(ConfigError, match="--best: cannot be combined with --step=4; remove one of them"):
        export(config, 4, best=True)


def test_check_says_that_the_export_will_be_read_differently(tiny_hf, tmp_path):
    from dpo_engine.verbs.summary import summarize
    from support.tiny_tokenizers import byte_level

    talks(tmp_path / "talks.jsonl", 4)
    for family, count in (("qwen2", 1), ("llama", 0)):
        model = tiny_hf(family, num_hidden_layers=2)
        raw = {
            "model": {"path": str(model), "tokenizer": str(byte_level(tmp_path / "tok"))},
            "data": {"train": str(tmp_path / "talks.jsonl")},
            "train": {"output_dir": str(tmp_path / "out")},
        }
        lines = [line for line in summarize(Config.parse(raw), 1) if line.strip().startswith("export")]
        assert len(lines) == count and all(
            "AutoTokenizer of transformers" in line and "does not reproduce the training tokenizer" in line
            for line in lines
        )
        raw["checkpoint"] = {"export": False}
        assert not any("AutoTokenizer" in line for line in summarize(Config.parse(raw), 1))


@pytest.mark.parametrize(
    "place, name, written",
    [
        ("org/name", "org/name", "org/name"),
        ("org/name@main", "org/name", "org/name"),
        ("org/name:train[:10%]", "org/name", "org/name"),
        ("org/name/easy@v1:train", "org/name", "org/name"),
        ("/data/me/hub/models--org--name/snapshots/0123abcd", "org/name", "org/name"),
        ("data/pairs.jsonl", None, "pairs.jsonl"),
        ("/data/me/secret/llama", None, "llama"),
        ("../up", None, "up"),
    ],
)
def test_names_on_the_hub_and_local_paths(place, name, written):
    assert (hub_id(place), shown(place)) == (name, written)


def test_card_of_a_model_of_the_hub(tmp_path):
    config = Config.parse(
        {
            "model": {"path": "org/base|model"},
            "data": {"train": ["org/pairs:train", "a b.jsonl"], "validation_fraction": 0.1},
            "train": {"output_dir": "runs/first"},
        }
    ).model_dump(mode="json")
    config["model"]["path"] = "org/base"
    identity = {
        "loss": {"name": "sigmoid", "beta": 0.1},
        "train_data": {"pairs": 1234},
        "global_batch_size": 8,
        "optim": {"lr": 1e-6, "schedule": "cosine"},
        "dtype": "bfloat16",
        "reference": None,
    }
    layout = {"tp": 2, "pp": 2, "vpp": 2, "cp": 1, "ep": 1, "world": 8}
    train, held_out = {"loss": 0.5, "grad_norm": None, "step_time_s": 3.0}, {"loss": 0.25}
    text = model_card(RunFacts(config, identity, layout, 7, train, 5, held_out, 6), "PreTrainedTokenizerFast")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "datasets": ["org/pairs"],
        "tags": ["dpo-engine", "preference-optimization", "dpo"],
    }
    for line in (
        "`org/base`, trained on preference pairs with dpo-engine",
        "| reference | `none` |",
        "| layout | tp 2, pp 2, vpp 2, cp 1, ep 1, 8 ranks |",
        "| training | `a b.jsonl` | `auto` |",
        "| held-out | 0.1 of the training prompts |  |",
        "Training pairs: 1,234.",
        "| steps | 7, with a global batch size of 8 |",
        "| metric | training, step 5 | held-out, step 6 |",
        "| `loss` | 0.5 | 0.25 |",
        "| `grad_norm` |  |  |",
        "tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)",
    ):
        assert line in body, line
    assert "step_time_s" not in body and code("a|b`\n") == "`a\\|b'`"


def test_last_metrics_up_to_a_step():
    lines = [
        {"step": 0, "eval/loss": 0.7},
        {"step": 2, "loss": 0.6},
        {"step": 3, "eval/loss": 0.5},
        {"step": 4, "loss": 0.4},
        {"step": 4, "eval/loss": 0.3},
    ]
    assert last_metrics(lines, 3) == ({"loss": 0.6}, 2, {"loss": 0.5}, 3)
    assert last_metrics(lines, 9) == ({"loss": 0.4}, 4, {"loss": 0.3}, 4)
    assert last_metrics(lines, 1) == ({}, 0, {"loss": 0.7}, 0) and last_metrics([], 5) == ({}, 0, {}, 0)
