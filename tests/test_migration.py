"""Tests of the tables that map other systems' keys to the engine's keys.

Each of the engine's keys in the tables must exist, and docs/migrating.md must match the tables.
"""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from dpo_engine.config.errors import dotted_names
from dpo_engine.config.run import Config
from dpo_engine.migration import foreign_key, migration_pages, systems
from dpo_engine.objective.losses import LOSSES, loss_options

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
SCHEMA = set(dotted_names(Config))
OPTIONS = {f"loss.{option}" for loss in LOSSES.values() for option in loss_options(loss)}
ENTRIES = [(system.name, entry) for system in systems() for entry in system.entries]
SMALLEST = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "train": {"output_dir": "o"}}


def test_every_system_has_a_table_and_its_differences():
    sizes = {system.name: sum(len(entry.keys) for entry in system.entries) for system in systems()}
    assert list(sizes) == ["TRL", "NeMo-Aligner", "NeMo-RL", "Megatron-SWIFT", "ROLL", "ColossalChat", "EasyDeL"]
    assert min(sizes.values()) >= 25
    assert all(2 <= len(system.meaning) <= 7 for system in systems())


def test_mapped_keys_exist():
    missing = {(name, entry.here) for name, entry in ENTRIES if entry.target and entry.target not in SCHEMA | OPTIONS}
    assert not missing


def test_mapped_values_are_accepted():
    """Each ``key=value`` in the tables and notes must be valid.

    The config schema must accept the key and the value. The section ``loss`` is checked differently: the value of
    ``loss.name`` must be the name of a loss. The other keys of the section must exist, but their values are not
    checked.
    """
    written = {entry.here for _, entry in ENTRIES if entry.here and "=" in entry.here}
    written |= set(re.findall(r"`([a-z_]+\.[a-z_.]+=[^`]+)`", migration_pages()))
    assert len(written) >= 10
    for text in sorted(written):
        key, _, value = text.partition("=")
        section, _, name = key.partition(".")
        parsed = {"true": True, "false": False, "null": None}.get(value, value)
        if isinstance(parsed, str) and re.fullmatch(r"[0-9.]+", parsed):
            parsed = float(parsed) if "." in parsed else int(parsed)
        if key == "loss.name":
            assert value in LOSSES, text
        elif section == "loss":
            assert key in OPTIONS | SCHEMA, text
        else:
            Config.parse({**SMALLEST, section: {**SMALLEST.get(section, {}), name: parsed}})


def test_keys_in_prose_exist():
    """Text in backticks that starts with a section's name must be a key of the engine or of another system."""
    theirs = {key for _, entry in ENTRIES for key in entry.keys}
    sections = "|".join(Config.model_fields)
    written = set(re.findall(rf"`((?:{sections})\.[a-z_.]+)(?:=[^`]*)?`", migration_pages()))
    assert "train.global_batch_size" in written
    assert not written - SCHEMA - OPTIONS - theirs


def test_entries_without_a_key_say_what_to_do():
    assert not [entry.keys for _, entry in ENTRIES if entry.here is None and not entry.way_out]
    assert not [entry.keys for _, entry in ENTRIES if "`" in entry.way_out or len(entry.way_out) > 150]
    assert not [entry.way_out for _, entry in ENTRIES if re.search(r"\([^)]*\(", entry.way_out)]


def test_each_system_lists_a_key_once():
    for system in systems():
        keys = [key for entry in system.entries for key in entry.keys]
        assert len(keys) == len(set(keys)), system.name


def test_our_own_keys_are_never_answered():
    assert not {key: foreign_key(key) for key in SCHEMA | OPTIONS if foreign_key(key)}


def test_systems_agree_on_keys_that_are_not_nested():
    """The tables must agree on a key without a dot, because the key alone does not show which system it comes from."""
    targets: dict[str, set] = {}
    for _, entry in ENTRIES:
        for key in entry.keys:
            if "." not in key:
                targets.setdefault(key, set()).add(entry.target)
    assert not {key for key, found in targets.items() if len(found) > 1}


def test_page_matches_the_tables():
    assert PAGE.read_text(encoding="utf-8") == migration_pages(), "run python docs/generate.py"


@pytest.mark.filterwarnings("ignore")
def test_keys_of_trl_exist_in_trl():
    trl = pytest.importorskip("trl")
    cpo, orpo = pytest.importorskip("trl.experimental.cpo"), pytest.importorskip("trl.experimental.orpo")
    configs = (trl.DPOConfig, cpo.CPOConfig, orpo.ORPOConfig, trl.ScriptArguments, trl.ModelConfig)
    known = {field.name for config in configs for field in dataclasses.fields(config)}
    known |= set(inspect.signature(trl.DPOTrainer.__init__).parameters)
    table = systems()[0]
    assert not {key for entry in table.entries for key in entry.keys} - known
    missed = {field.name for field in dataclasses.fields(trl.DPOConfig)} - {
        field.name for field in dataclasses.fields(trl.DPOConfig.__mro__[2])
    }
    assert not missed - {key for entry in table.entries for key in entry.keys}


@pytest.mark.parametrize(
    ("path", "start"),
    [
        ("per_device_train_batch_size", "called train.micro_batch_size here (counted in pairs)"),
        ("train.per_device_train_batch_size", "called train.micro_batch_size here (counted in pairs)"),
        ("trainer.devices", "the launcher, srun or torchrun, sets this"),
        ("loss.loss_type", "called loss.name here"),
        ("report_to", "set logging.tensorboard, logging.wandb or logging.mlflow"),
        ("logging.report_to", "set logging.tensorboard, logging.wandb or logging.mlflow"),
        ("beta", "called loss.beta here"),
        ("train.beta", "called loss.beta here"),
        ("optim.beta", "called loss.beta here"),
        ("learning_rate", "called optim.lr here"),
        ("optim.learning_rate", "called optim.lr here"),
        ("train.lr", "called optim.lr here"),
        ("num_train_epochs", "called train.epochs here"),
        ("bf16", "called model.dtype here (true means bf16"),
        ("gradient_accumulation_steps", "set train.global_batch_size to pairs per device x data-parallel ranks"),
        ("max_grad_norm", "called optim.clip_grad here"),
        ("tensor_model_parallel_size", "called parallel.tp here"),
        ("model_name_or_path", "called model.path here"),
        ("precompute_ref_log_probs", "use reference.mode=stored"),
        ("save_steps", "called checkpoint.save_interval here"),
        ("eval_steps", "called train.eval_interval here"),
        ("gradient_checkpointing", "called model.recompute here"),
        ("model.gradient_checkpointing", "called model.recompute here"),
        ("save_best", "called checkpoint.keep_best here (a mapping {metric, mode, count}, for example"),
        ("checkpoint.save_best", "called checkpoint.keep_best here (a mapping {metric, mode, count}, for example"),
        ("early_stopping_patience", "called train.stop_after_no_gain here (number of evaluations without gain"),
        ("train.early_stopping", "called train.stop_after_no_gain here (number of evaluations without gain"),
        ("save_top_k", "called checkpoint.keep_best.count here"),
        ("lora_rank", "called adapter.rank here"),
        ("model.lora_r", "called adapter.rank here"),
        ("adapter.r", "called adapter.rank here"),
        ("adapter.lora_alpha", "called adapter.alpha here"),
        ("adapter.target_modules", "called adapter.targets here (names of projections in the checkpoint"),
        ("adapter.use_dora", "use adapter.kind=dora"),
        ("adapter.lora_dropout", "not supported, because dropout masks would depend on the layout"),
        ("peft_config", "called adapter here (a section of the run file"),
        ("policy.megatron_cfg.peft.dim", "called adapter.rank here"),
        ("qlora", "quantized base weights are not supported"),
        ("seed", "called train.seed here"),
        ("data.train[0].data_path", "called data.train.path here"),
        ("model.dpo.ref_policy_kl_penalty", "called loss.beta here"),
        ("policy.megatron_cfg.optimizer.lr", "called optim.lr here"),
        ("actor_train.training_args.learning_rate", "called optim.lr here"),
        ("total_batch_size", "called train.global_batch_size here"),
        ("trainer", "a section of NeMo-Aligner and EasyDeL; docs/migrating.md lists"),
        ("policy.megatron_cfg", "a section of NeMo-RL; docs/migrating.md lists"),
        ("model.dpo", "a section of NeMo-Aligner; docs/migrating.md lists"),
        ("warmup_ratio", "called optim.warmup_ratio here"),
    ],
)
def test_foreign_keys_are_answered(path, start):
    assert (foreign_key(path) or "").startswith(start)


@pytest.mark.parametrize(
    "option",
    [
        *("cpo_alpha", "discopop_tau", "f_alpha_divergence_coef", "f_divergence_type", "gt_reward_scale"),
        *("length_normalization", "loss_type", "loss_weights", "pref_beta", "pref_ftx", "pref_loss", "preference_loss"),
        *("preference_average_log_probs", "ref_policy_kl_penalty", "rpo_alpha", "sft_loss_weight", "simpo_gamma"),
    ],
)
def test_options_of_losses_are_answered(option):
    assert foreign_key(f"loss.{option}").startswith("called loss.")


@pytest.mark.parametrize("path", ["train.max_stepps", "nonsense", "model.nonsense", "train.name", "data.path"])
def test_other_keys_are_not_answered(path):
    assert foreign_key(path) is None
