"""Tests of a run's identity: the settings and data that determine the run's results.

When a run resumes, its identity is compared with the identity in the checkpoint. A difference is refused, unless its
key can be accepted and `checkpoint.accept_changes` lists this key. A change of the training pairs, of their order, or
of the global batch size can also change `total_steps`. If such a change is accepted, `total_steps` need not be listed.
"""

import json
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest

from dpo_engine.batching.plan import Position
from dpo_engine.checkpoint import identity as module
from dpo_engine.checkpoint.identity import code_version, commit, identity, record
from dpo_engine.checkpoint.resume import (
    ACCEPTED,
    Change,
    accepted_lines,
    compare,
    entries,
    keeps_following,
    keeps_random,
    next_position,
)
from dpo_engine.config import run as schema
from dpo_engine.config.run import Config
from dpo_engine.config.sections import Acceptable, OptimConfig
from dpo_engine.errors import CheckpointError, ConfigError
from dpo_engine.optim.schedules import reads_length

RAW = {"model": {"path": "m"}, "data": {"train": "a.jsonl"}, "train": {"output_dir": "o"}}


def identity_of(arch, **sections):
    facts = {
        "dtype": "float32",
        "loss_options": {"beta": 0.1},
        "reference": {"weights": "abc"},
        "train_data": {"pairs": 24, "digest": "d0"},
        "tokenizer": "t0",
        "total_steps": 12,
    }
    facts |= {name: sections.pop(name) for name in list(sections) if name in facts}
    raw = {name: {**RAW.get(name, {}), **sections.get(name, {})} for name in {**RAW, **sections}}
    return identity(Config.parse(raw), arch, **facts)


@pytest.fixture(scope="module")
def arch(tiny_hf):
    from dpo_engine.model.architecture import read_architecture

    return read_architecture(tiny_hf("llama"))


def test_unchanged_run_has_no_differences(arch):
    facts = identity_of(arch)
    assert compare(facts, identity_of(arch), where="c") == []
    assert json.loads(json.dumps(facts)) == facts


def test_every_key_but_those_of_saved_state_can_be_accepted(arch):
    expected = set(identity_of(arch)) - {"model", "adapter", "optim.optimizer", "optim.freeze"}
    assert set(ACCEPTED) == expected == set(typing.get_args(Acceptable))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"loss_options": {"beta": 0.5}}, "loss.beta was 0.1 and is now 0.5"),
        ({"loss_options": {}, "loss": {"name": "sft"}}, "loss was {name: sigmoid, beta: 0.1} and is now {name: sft}"),
        ({"loss": {"ld_alpha": 0.5}}, "loss.ld_alpha was absent and is now 0.5"),
        ({"tokenizer": "t1"}, "tokenizer was t0 and is now t1"),
        ({"train_data": {"pairs": 24, "digest": "d1"}}, "train_data.digest was d0 and is now d1"),
        ({"train": {"global_batch_size": 32}}, "global_batch_size was 64 and is now 32"),
        ({"train": {"seed": 7}}, "seed was 1234 and is now 7"),
        ({"data": {"seed": 7}}, "order.seed was 0 and is now 7"),
        ({"data": {"shuffle": False}}, "order.shuffle was true and is now false"),
        ({"data": {"group_by_prompt": True}}, "order.group_by_prompt was false and is now true"),
        ({"data": {"max_length": 128}}, "limits.max_length was 2048 and is now 128"),
        ({"data": {"add_eos": False}}, "limits.add_eos was true and is now false"),
        ({"optim": {"lr": 1e-7}}, "optim.lr was 1e-06 and is now 1e-07"),
        ({"optim": {"betas": [0.9, 0.95]}}, "optim.betas was [0.9, 0.999] and is now [0.9, 0.95]"),
        ({"optim": {"schedule_options": {"a": 1}}}, "optim.schedule_options was absent and is now {a: 1}"),
        ({"total_steps": 24}, "total_steps was 12 and is now 24"),
        ({"reference": None}, "reference was {weights: abc} and is now null"),
        ({"reference": {"weights": "abd"}}, "reference.weights was abc and is now abd"),
        ({"dtype": "bfloat16"}, "dtype was float32 and is now bfloat16"),
    ],
    ids=lambda value: value.partition(" ")[0] if isinstance(value, str) else "",
)
def test_change_is_refused_or_accepted_on_one_line(change, says, arch):
    saved, current = identity_of(arch), identity_of(arch, **change)
    key = says.partition(" ")[0].partition(".")[0]
    with pytest.raises(CheckpointError) as error:
        compare(saved, current, where="out/step_4")
    way_out = f"restore the old value, set checkpoint.accept_changes=[{key}], or set another train.output_dir"
    assert error.value.problems == [f"out/step_4: {says}; {way_out}"] and len(str(error.value)) < 200
    (accepted,) = compare(saved, current, [key], where="out/step_4")
    assert str(accepted) == says
    assert entries([accepted], 4) == [{"step": 4, "key": key, "old": saved[key], "new": current[key]}]
    assert accepted_lines([accepted], [key], 4) == [f"change accepted after step 4: {says}; {ACCEPTED[key]}"]


def test_another_model_is_always_refused(arch):
    from dataclasses import replace

    saved, current = identity_of(arch), identity_of(replace(arch, vocab_size=600), tokenizer="t1")
    with pytest.raises(CheckpointError) as error:
        compare(saved, current, ["model", "tokenizer"], where="c")
    says = "model.vocab_size was 515 and is now 600; the saved weights do not fit"
    assert error.value.problems == [f"c: {says}; restore the old value, or set another train.output_dir"]
    assert compare(saved, identity_of(replace(arch, max_positions=9)), where="c") == [], (
        "max_positions limits only the length of rows, and does not change computed values"
    )


@pytest.mark.parametrize(
    "optim, says",
    [
        ({"freeze": ["lm.*", "a"]}, "optim.freeze was [] and is now [a, lm.*]"),
        ({"optimizer": "sgd"}, "optim.optimizer was adamw and is now sgd"),
    ],
)
def test_state_of_another_optimizer_is_always_refused(optim, says, arch):
    """Earlier versions had only AdamW and could not freeze weights.

    Their checkpoints therefore contain neither ``optim.optimizer`` nor ``optim.freeze``.
    """
    changed = identity_of(arch, optim=optim)
    earlier = {key: value for key, value in identity_of(arch).items() if not key.startswith("optim.")}
    assert compare(earlier, identity_of(arch), where="c") == []
    for saved in (earlier, identity_of(arch)):
        with pytest.raises(CheckpointError) as error:
            compare(saved, changed, ["optim"], where="c")
        ending = "the saved optimizer state does not fit; restore the old value, or set another train.output_dir"
        assert error.value.problems == [f"c: {says}; {ending}"]
    with pytest.raises(CheckpointError, match="is now"):  # the reverse change, to the default, is refused too
        compare(changed, identity_of(arch), where="c")


def test_error_lists_every_change_that_is_not_accepted(arch):
    current = identity_of(arch, tokenizer="t1", total_steps=24, train={"seed": 7})
    with pytest.raises(CheckpointError) as error:
        compare(identity_of(arch), current, ["seed"], where="c")
    assert [line.split()[1] for line in error.value.problems] == ["tokenizer", "total_steps"]


@pytest.mark.parametrize(
    "change",
    [{"train_data": {"pairs": 20, "digest": "d1"}}, {"data": {"seed": 7}}, {"train": {"global_batch_size": 8}}],
)
def test_accepting_a_change_also_accepts_its_change_of_total_steps(change, arch):
    saved, current = identity_of(arch), identity_of(arch, **change, total_steps=10)
    with pytest.raises(CheckpointError) as error:
        compare(saved, current, where="c")
    (line,) = error.value.problems
    key = line.split()[1].partition(".")[0]
    assert [one.key for one in compare(saved, current, [key], where="c")] == [key, "total_steps"]


def test_window_counts_only_if_rows_may_be_longer(tiny_hf):
    """The size of the sliding window is recorded only if rows may be longer than the window.

    Earlier versions never recorded the size, because they refused such rows.
    """
    from dpo_engine.model.architecture import read_architecture

    narrow, wide = (read_architecture(tiny_hf("mistral", sliding_window=window)) for window in (64, 96))
    short, long = {"data": {"max_length": 64}}, {"data": {"max_length": 128}}
    assert compare(identity_of(narrow, **short), identity_of(wide, **short), where="c") == []
    assert "sliding_window" not in identity_of(narrow, **short)["limits"]
    with pytest.raises(CheckpointError, match="c: limits.sliding_window was 64 and is now 96; restore the old value"):
        compare(identity_of(narrow, **long), identity_of(wide, **long), where="c")


def test_missing_keys_of_checkpoint_and_run(arch):
    facts = identity_of(arch)
    older = {key: value for key, value in facts.items() if key != "limits"}
    with pytest.raises(CheckpointError, match=r"c: limits was absent and is now \{max_length: 2048"):
        compare(older, facts, where="c")
    (change,) = compare(older, facts, ["limits"], where="c")
    assert entries([change], 1)[0]["old"] is None
    assert compare(facts, {"model": facts["model"]}, where="c") == []


def test_accepted_key_without_a_change_is_reported(arch):
    assert accepted_lines([], ["loss"], 4) == ["checkpoint.accept_changes: loss has not changed"]


@pytest.mark.parametrize(
    "optim",
    [
        {"schedule": "constant"},
        {"schedule": "constant", "warmup_steps": 2},
        {"schedule": "constant", "warmup_ratio": 0.2},
        {"schedule": "cosine"},
        {"schedule": "linear", "min_lr": 1e-7},
        {"schedule": "wsd", "decay_steps": 3},
        {"schedule": "inverse_sqrt", "warmup_steps": 2},
        {"schedule": "inverse_sqrt", "warmup_ratio": 0.2},
    ],
    ids=str,
)
def test_identity_has_total_steps_only_if_the_learning_rate_depends_on_them(optim, arch):
    """Compare the learning rates of two runs that differ only in their total number of steps: 10 and 20.

    The identity must contain the total number of steps if and only if these learning rates differ.
    """
    from dpo_engine.optim.schedule import build_schedule

    optim = OptimConfig(**optim)
    optimizer = types.SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])

    def rates(total):
        schedule, found = build_schedule(optimizer, optim, total_steps=total), []
        for step in range(10):
            schedule.num_steps = step
            found.append(schedule.get_lr({"max_lr": optim.lr, "min_lr": optim.min_lr}))
        return found

    expected = rates(10) != rates(20)
    assert reads_length(optim) == expected
    steps = identity_of(arch, optim=optim.model_dump(exclude_unset=True))["total_steps"]
    assert steps == (12 if expected else None)


def test_new_pairs_or_order_start_with_their_first_pair(arch):
    facts, position = identity_of(arch), Position(5, 1, 8)
    assert next_position(facts, facts, position) == position
    assert next_position(facts, identity_of(arch, optim={"lr": 1e-7}), position) == position
    assert next_position(facts, identity_of(arch, data={"seed": 1}), position) == Position(5, 0, 0)
    assert next_position(facts, identity_of(arch, train_data={"digest": "d1"}), position) == Position(5, 0, 0)


def test_updated_reference_continues_unless_it_changed():
    moving = {"reference": {"weights": "a", "sync_every": 4, "sync_alpha": 0.5}}
    assert keeps_following(moving, moving)
    assert keeps_following(moving, {"reference": {"weights": "a", "sync_every": 2, "sync_alpha": 0.5}})
    assert not keeps_following(moving, {"reference": {"weights": "b", "sync_every": 4}})
    assert not keeps_following({"reference": {"weights": "a"}}, moving)
    assert not keeps_following({"reference": None}, moving)


def test_random_generators_continue_unless_the_seed_changed(arch):
    before = identity_of(arch)
    assert keeps_random(before, identity_of(arch, optim={"lr": 1e-7}))
    assert not keeps_random({**before, "seed": before["seed"] + 1}, before)


@pytest.mark.parametrize(
    "given, says",
    [
        (["model"], "checkpoint.accept_changes[0]=model: must be dtype, tokenizer, reference, loss"),
        (["los"], "checkpoint.accept_changes[0]=los: must be dtype, tokenizer"),
        ("loss", "checkpoint.accept_changes=loss: must be a list"),
    ],
    ids=str,
)
def test_key_that_cannot_be_accepted_is_a_config_error(given, says):
    with pytest.raises(ConfigError) as error:
        Config.parse({**RAW, "checkpoint": {"accept_changes": given}})
    assert str(error.value).startswith(says)


def test_accept_changes_without_resume_is_refused():
    from dpo_engine.config.rules import contradictions

    config = Config.parse({**RAW, "checkpoint": {"accept_changes": ["loss"], "resume": False}})
    assert contradictions(config) == [
        "checkpoint.accept_changes=[loss]: applies only to a run that resumes, but checkpoint.resume is false; "
        "remove checkpoint.accept_changes"
    ]


def test_code_version_depends_on_the_sources(monkeypatch, tmp_path):
    root, kernels = Path(schema.__file__).parents[1], Path(schema.__file__).parents[2] / "kernels" / "dpo_kernels"
    found = code_version()
    assert found["dpo-engine"].startswith("0.1.0 (sources ") and found["torch"] == __import__("torch").__version__
    assert found["transformers"] == __import__("transformers").__version__
    assert found == code_version() and root.is_dir() and kernels.is_dir()
    package = tmp_path / "copy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(module.version, "__file__", str(package / "__init__.py"))
    first = code_version()["dpo-engine"]
    (package / "a.py").write_text("x = 2\n")
    second = code_version()["dpo-engine"]
    (package / "a.py").rename(package / "b.py")
    assert len({found["dpo-engine"], first, second, code_version()["dpo-engine"]}) == 4
    plugin = tmp_path / "lab.py"
    plugin.write_text("y = 1\n")
    monkeypatch.setitem(sys.modules, "lab", types.SimpleNamespace(__file__=str(plugin)))
    before = code_version(["lab"])["plugin lab"]
    plugin.write_text("y = 2\n")
    assert before.startswith("sources ") and code_version(["lab"])["plugin lab"] != before
    assert code_version(["nowhere"])["plugin nowhere"] == "no file"
    assert commit() is None, "a copy without .git has no commit"


def test_checkout_reports_its_commit():
    root = Path(schema.__file__).parents[2]
    git = subprocess.run(["git", "log", "-1", "--format=%H"], cwd=root, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout")
    assert commit() == git.stdout.strip()


def test_record_is_json_and_holds_the_position():
    config = Config.parse(RAW)
    position = Position(5, 1, 8)
    history = entries([Change("loss", {"beta": 0.1}, {"beta": 0.2})], 4)
    found = record(config, plan="p0", position=position, code={"torch": "2.13"}, history=history)
    assert json.loads(json.dumps(found)) == found
    assert Position(**found["position"]) == position and found["plan"] == "p0" and found["code"]["torch"] == "2.13"
    assert found["history"] == [{"step": 4, "key": "loss", "old": {"beta": 0.1}, "new": {"beta": 0.2}}]
    assert Config.parse(found["config"]) == config


def test_page_describes_each_accepted_change():
    page = (Path(schema.__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    for key, effect in ACCEPTED.items():
        assert f"| `{key}` | " in page and f" | {effect} |" in page, f"| `{key}` | ... | {effect} |"
