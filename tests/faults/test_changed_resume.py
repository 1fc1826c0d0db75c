"""Fault tests: resume a stopped run unchanged, in another layout, or with changed settings.

The run must continue with the expected metrics, or the resume must be refused.
"""

import hashlib
import json
import math
import re
import shutil
from functools import partial

import pytest
from safetensors.torch import load_file, save_file

from support.jobs import run_job
from support.outcomes import record_pairs, recorded_pairs, steps_of, trajectory
from support.small_run import write_pairs
from support.tiny_tokenizers import CHATML, piece_model

slow = pytest.mark.slow
STOP = 4
STEPS = 12
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "cp2": (2, {"cp": 2}),
    "dp2": (2, {}),
    "dp2 plain": (2, {"distributed_optimizer": False}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "tp2 dp2": (4, {"tp": 2}),
    "cp2 pp2": (4, {"cp": 2, "pp": 2}),
}


def copies(layout):
    """Return the number of ranks that share a copy of the model and work on the same pairs."""
    return layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1)


def pairs_of_job(log, ranks, layout):
    return recorded_pairs(log / "pairs", ranks, copies(layout))


def job_of(run, log, ranks, *overrides, fault=""):
    """Run a job that records the pairs of its steps."""
    return run_job(
        ["train", str(run), *overrides], ranks, log, fault=fault, before=partial(record_pairs, log / "pairs")
    )


@pytest.fixture(scope="session")
def made(run_files, tiny_hf, tmp_path_factory):
    """Return a function: ``made(name, write, stop=4)`` trains in the layout ``name``.

    The function returns the output directory and the pairs of each step. If ``stop`` is not 0, SIGTERM stops the run in
    step ``stop``. The results are cached, so tests must copy the output directory before they resume the run.
    """
    kept = {}

    def make(name, write, *, stop=0, **sections):
        key = (name, stop, json.dumps(sections, sort_keys=True))
        if key not in kept:
            ranks, parallel = LAYOUTS[name]
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            run = write("run", folder=folder, parallel=parallel, **sections)
            job = job_of(run, folder / "log", ranks, fault=f"step:0:{stop}:term" if stop else "")
            assert job.codes == [75 if stop else 0] * ranks, job.said
            kept[key] = folder / "run", pairs_of_job(folder / "log", ranks, parallel)
        return kept[key]

    return make


@pytest.fixture
def write(run_yaml, run_files, tiny_hf, tmp_path):
    """Return a function that writes a run's YAML file, as ``run_yaml`` does.

    The function's argument ``folder`` is the parent of the output directory. The run has no validation data. The model
    has four layers. The learning rate is so low that the steps do not amplify rounding errors.
    """

    def make(name="run", *, folder=tmp_path, **sections):
        model = {"path": str(tiny_hf("llama")), "tokenizer": run_files["tokenizer"], **sections.pop("model", {})}
        optim = {"lr": 1e-4, **sections.pop("optim", {})}
        data = {"validation": None, **sections.pop("data", {})}
        train = {"output_dir": str(folder / name), **sections.pop("train", {})}
        return run_yaml(name, model=model, data=data, optim=optim, train=train, **sections)

    return make


def go_on(stopped, write, tmp_path, name, *overrides, code=0, **sections):
    """Copy a stopped run, and resume the copy in the layout ``name`` with the given settings.

    Return the job, its output directory, and a dictionary that maps each step of the job to its pairs. If the expected
    exit code is not 0, the dictionary is empty.
    """
    ranks, parallel = LAYOUTS[name]
    output, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(stopped, output)
    job = job_of(write("run", parallel=parallel, **sections), log, ranks, *overrides)
    assert job.codes == [code] * ranks, job.said
    return job, output, pairs_of_job(log, ranks, parallel) if code == 0 else {}


def record_of(output, step):
    """Return the entry `run` of the manifest in the checkpoint of a step."""
    from dpo_engine.checkpoint.directory import read_manifest

    return read_manifest(output / f"checkpoints/step_{step:08d}")["run"]


SAME = [
    pytest.param("dp2", "stacked", "fp32", id="dp2 stacked fp32", marks=slow),
    pytest.param("tp2", "tree", "bf16", id="tp2 tree bf16", marks=slow),
    *(
        pytest.param(name, layout, dtype, id=f"{name} {layout} {dtype}", marks=slow)
        for name in ("one", "dp2 plain", "tp2 pp2", "pp2 vpp2", "cp2")
        for layout, dtype in (("stacked", "fp32"), ("tree", "bf16"))
    ),
    pytest.param("dp2", "tree", "fp32", id="dp2 tree fp32", marks=slow),
    pytest.param("dp2", "stacked", "bf16", id="dp2 stacked bf16", marks=slow),
]


@pytest.mark.parametrize("name, layout, dtype", SAME)
def test_same_layout_resumes_bitwise(name, layout, dtype, made, write, tmp_path):
    sections = {"batch": {"layout": layout}, "model": {"dtype": dtype}}
    whole, expected = made(name, write, **sections)
    stopped, first = made(name, write, stop=2, **sections)
    _, output, rest = go_on(stopped, write, tmp_path, name, **sections)
    assert sorted(rest) == list(range(3, STEPS + 1)), "the resumed job must run the remaining ten of twelve steps"
    assert first | rest == expected
    assert trajectory(output) == trajectory(whole)
    assert steps_of(output)[2]["rewards/margins"] != 0, "the reference must still have its original weights"


CHANGES = [
    pytest.param("one", "tp2 pp2", id="one to tp2 pp2"),
    pytest.param("tp2 pp2", "one", id="tp2 pp2 to one", marks=slow),
    *(
        pytest.param(*pair, id=" to ".join(pair), marks=slow)
        for pair in (
            ("one", "tp2"),
            ("tp2", "one"),
            ("one", "pp2"),
            ("pp2", "dp2"),
            ("one", "cp2"),
            ("cp2", "tp2"),
            ("one", "dp2"),
            ("dp2", "one"),
            ("dp2", "dp2 plain"),
            ("dp2 plain", "tp2 dp2"),
            ("one", "pp2 vpp2"),
            ("pp2 vpp2", "pp2"),
            ("tp2 dp2", "cp2 pp2"),
            ("cp2 pp2", "tp2 dp2"),
        )
    ),
]


@pytest.mark.parametrize("written, read", CHANGES)
def test_other_layout_resumes_up_to_rounding(written, read, made, write, tmp_path):
    whole, expected = made(written, write)
    stopped, first = made(written, write, stop=STOP)
    _, output, rest = go_on(stopped, write, tmp_path, read)
    assert first | rest == expected, "the steps must use the same pairs in the same order"
    drift = []
    for line, want in zip(steps_of(output), steps_of(whole), strict=True):
        assert line["loss"] == pytest.approx(want["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(want["grad_norm"], rel=2e-6)
        assert line["learning_rate"] == want["learning_rate"]
        drift.append(line["loss"] / want["loss"] - 1)
    assert abs(sum(drift) / len(drift)) <= 1e-7


def other_template(folder):
    path = folder / "other.jinja"
    path.write_text(CHATML + " ", encoding="utf-8")
    return {"data": {"chat_template": str(path)}}


def other_tokenizer(folder):
    return {"model": {"tokenizer": str(piece_model(folder / "other.model", split_digits=True))}}


def other_pairs(folder, count=24):
    return {"data": {"train": write_pairs(folder / "other.jsonl", count, start=200)}}


REFUSED = [
    pytest.param({"num_hidden_layers": 2}, ["model.num_layers was 4 and is now 2"], id="model"),
    pytest.param({"vocab_size": 600}, ["model.vocab_size was 515 and is now 600"], id="vocabulary", marks=slow),
    pytest.param(other_template, ["tokenizer was "], id="chat template", marks=slow),
    pytest.param(other_tokenizer, ["tokenizer was ", "train_data.digest was "], id="tokenizer", marks=slow),
    pytest.param(other_pairs, ["train_data.digest was "], id="dataset", marks=slow),
    pytest.param(
        lambda f: {"train": {"global_batch_size": 8}},
        ["global_batch_size was 4 and is now 8"],
        id="global batch",
        marks=slow,
    ),
    pytest.param(lambda f: {"data": {"seed": 5}}, ["order.seed was 0 and is now 5"], id="order"),
    pytest.param(lambda f: {"train": {"seed": 5}}, ["seed was 1234 and is now 5"], id="seed", marks=slow),
    pytest.param(lambda f: {"loss": {"beta": 0.5}}, ["loss.beta was 0.1 and is now 0.5"], id="beta", marks=slow),
    pytest.param(lambda f: {"loss": {"name": "ipo"}}, ["loss was {name: sigmoid"], id="loss", marks=slow),
    pytest.param(lambda f: {"data": {"max_length": 60}}, ["limits.max_length was 64 and is now 60"], id="limit"),
    pytest.param(lambda f: {"optim": {"lr": 1e-5}}, ["optim.lr was 0.0001 and is now 1e-05"], id="optim", marks=slow),
    pytest.param(lambda f: {"train": {"epochs": 3}}, ["total_steps was 12 and is now 18"], id="epochs", marks=slow),
    pytest.param(lambda f: {"model": {"dtype": "bf16"}}, ["dtype was float32 and is now"], id="dtype", marks=slow),
]


@pytest.mark.parametrize("change, says", REFUSED)
def test_changed_run_is_refused(change, says, made, write, tiny_hf, tmp_path):
    stopped, _ = made("dp2", write, stop=STOP)
    sections = change(tmp_path) if callable(change) else {"model": {"path": str(tiny_hf("llama", **change))}}
    job, output, _ = go_on(stopped, write, tmp_path, "dp2", code=4, **sections)
    lines = job.said.splitlines()
    assert len(lines) == len(says)
    for line, expected in zip(lines, says, strict=True):
        key = expected.partition(" ")[0].partition(".")[0]
        place, _, rest = line.partition("step_00000004: ")
        assert place == f"{output}/checkpoints/" and rest.startswith(expected) and len(rest) <= 250
        way_out = "the saved weights do not fit" if key == "model" else f"set checkpoint.accept_changes=[{key}]"
        assert way_out in rest and rest.endswith("or set another train.output_dir")
    assert trajectory(output) == trajectory(stopped), "the metrics in the directory must be unchanged"


def without_moments(directory):
    from dpo_engine.checkpoint.directory import seal

    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["sha256"]
    for path in directory.glob("*.safetensors"):
        save_file({key: value for key, value in load_file(path).items() if not key.startswith("exp_avg")}, path)
        facts = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        manifest["files"][path.name] = facts
    (directory / "manifest.json").unlink()
    seal(directory, manifest)


def newer(directory):
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


@slow
@pytest.mark.parametrize(
    "harm, says",
    [(without_moments, "exp_avg of "), (newer, "has format 99, but this version of dpo-engine reads ")],
    ids=["optimizer", "format"],
)
def test_unusable_checkpoint_is_refused(harm, says, made, write, tmp_path):
    stopped, _ = made("dp2", write, stop=STOP)
    shutil.copytree(stopped, tmp_path / "before")
    harm(tmp_path / "before/checkpoints/step_00000004")
    job, _, _ = go_on(tmp_path / "before", write, tmp_path, "dp2", code=4)
    (line,) = job.said.splitlines()
    assert says in line


def continued(made, write, tmp_path, accepted, *, counts=False, **sections):
    """Resume a stopped run of one rank with accepted changes.

    Returns the metrics of each step of the run, the pairs of each step after the resume, and the result of
    :func:`record_of` for the last step. Metrics and pairs are dictionaries whose keys are the steps.

    counts  whether the change also affects the total number of steps; if so, accepting the change also accepts the new
            total number of steps
    """
    stopped, _ = made("one", write, stop=STOP)
    asked = f"checkpoint.accept_changes=[{', '.join(accepted)}]"
    job, output, pairs = go_on(stopped, write, tmp_path, "one", asked, **sections)
    steps = {line["step"]: line for line in steps_of(output)}
    record = record_of(output, max(steps))
    changed = [*accepted, *["total_steps"] * counts]
    assert [(entry["step"], entry["key"]) for entry in record["history"]] == [(STOP, key) for key in changed]
    printed = job.output[0].splitlines()
    for key in changed:
        assert [line for line in printed if line.startswith(f"change accepted after step {STOP}: {key}")]
    return steps, pairs, record


def cosine(step, total, peak=1e-4, warmup=1):
    """Return the learning rate of a step according to transformers' formula. Steps are counted from 1."""
    done = step - 1
    if done < warmup:
        return peak * done / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (total - warmup)))


@slow
class TestAccepted:
    """An accepted change has only the intended effect.

    The expected values come from uninterrupted runs, and expected learning rates come from :func:`cosine`.
    """

    @pytest.fixture
    def whole(self, made, write):
        output, pairs = made("one", write)
        return {line["step"]: line for line in steps_of(output)}, pairs

    def test_lower_learning_rate(self, whole, made, write, tmp_path):
        steps, pairs, record = continued(made, write, tmp_path, ["optim"], optim={"lr": 1e-5})
        assert record["history"][0]["old"]["lr"] == 1e-4 and record["history"][0]["new"]["lr"] == 1e-5
        for step in range(STOP + 1, STEPS + 1):
            assert steps[step]["learning_rate"] == pytest.approx(cosine(step, STEPS, peak=1e-5), rel=1e-6)
            assert pairs[step] == whole[1][step]
        assert steps[STOP + 1]["loss"] == whole[0][STOP + 1]["loss"], (
            "the loss before the first update with the new rate must be that of the uninterrupted run"
        )
        assert steps[STOP + 1]["grad_norm"] == whole[0][STOP + 1]["grad_norm"]

    def test_additional_epoch(self, whole, made, write, tmp_path):
        steps, pairs, _ = continued(made, write, tmp_path, ["total_steps"], train={"epochs": 3})
        assert sorted(steps) == list(range(1, 19))
        for step in range(STOP + 1, 19):
            assert steps[step]["learning_rate"] == pytest.approx(cosine(step, 18), rel=1e-6)
        assert {step: pairs[step] for step in range(STOP + 1, STEPS + 1)} == {
            step: whole[1][step] for step in range(STOP + 1, STEPS + 1)
        }
        assert sorted(sum((pairs[step] for step in range(13, 19)), [])) == sorted(set(sum(whole[1].values(), [])))

    def test_changed_loss(self, whole, made, write, tmp_path):
        steps, pairs, _ = continued(made, write, tmp_path, ["loss"], loss={"beta": 0.2})
        assert pairs.items() <= whole[1].items()
        margin = whole[0][STOP + 1]["rewards/margins"]
        assert steps[STOP + 1]["rewards/margins"] == pytest.approx(2 * margin, rel=1e-5) and margin
        assert steps[STOP + 1]["logps/chosen"] == whole[0][STOP + 1]["logps/chosen"]

    def test_training_on_new_pairs_starts_with_the_first_of_them(self, whole, made, write, tmp_path):
        other = other_pairs(tmp_path, 20)
        fresh = run_fresh(write, tmp_path, **other)
        steps, pairs, record = continued(made, write, tmp_path, ["train_data"], counts=True, **other)
        assert sorted(steps) == list(range(1, STOP + 10 + 1)), "the run must train on the 20 new pairs for two epochs"
        assert {step - STOP: ids for step, ids in pairs.items()} == fresh
        assert record["position"] == {"step": 14, "epoch": 2, "pair": 0}
        assert steps[STOP + 1]["learning_rate"] == pytest.approx(cosine(STOP + 1, 14), rel=1e-6)

    def test_new_order_starts_over_and_survives_another_resume(self, made, write, tmp_path):
        other = {"data": {"seed": 5}}
        fresh = run_fresh(write, tmp_path, **other)
        stopped, _ = made("one", write, stop=STOP)
        shutil.copytree(stopped, tmp_path / "run")
        run, log = write("run", **other), tmp_path / "log"
        asked = "checkpoint.accept_changes=[order]"
        assert job_of(run, log, 1, asked, fault="step:0:3:term").codes == [75]
        assert job_of(run, log, 1).codes == [0], "a change that was accepted once need not be accepted again"
        pairs = pairs_of_job(log, 1, {})
        assert {step - STOP: ids for step, ids in pairs.items()} == fresh
        history = record_of(tmp_path / "run", STOP + STEPS)["history"]
        assert [(entry["step"], entry["key"]) for entry in history] == [(STOP, "order"), (STOP, "total_steps")]

    def test_changed_batch_size_loses_no_pair(self, whole, made, write, tmp_path):
        _, pairs, _ = continued(
            made, write, tmp_path, ["global_batch_size"], counts=True, train={"global_batch_size": 6}
        )
        expected = sum((whole[1][step] for step in range(STOP + 1, STEPS + 1)), [])
        assert sum((pairs[step] for step in sorted(pairs)), []) == expected
        assert [len(pairs[step]) for step in sorted(pairs)] == [6, 2, 6, 6, 6, 6]

    def test_changed_reference(self, whole, made, write, tiny_hf, tmp_path):
        other = {"reference": {"path": str(tiny_hf("llama", initializer_range=0.03))}}
        steps, pairs, _ = continued(made, write, tmp_path, ["reference"], **other)
        assert pairs.items() <= whole[1].items()
        assert steps[STOP + 1]["logps/chosen"] == whole[0][STOP + 1]["logps/chosen"]
        assert abs(steps[STOP + 1]["rewards/margins"] - whole[0][STOP + 1]["rewards/margins"]) > 1e-3

    def test_changed_dtype(self, whole, made, write, tmp_path):
        steps, pairs, _ = continued(made, write, tmp_path, ["dtype"], model={"dtype": "bf16"})
        assert pairs.items() <= whole[1].items()
        for step in range(STOP + 1, STEPS + 1):
            assert steps[step]["loss"] == pytest.approx(whole[0][step]["loss"], rel=0.02)
        assert steps[STOP + 1]["loss"] != whole[0][STOP + 1]["loss"]

    @pytest.mark.parametrize(
        "key, change",
        [
            ("tokenizer", other_template),
            ("limits", lambda folder: {"data": {"max_length": 60}}),
            ("seed", lambda folder: {"train": {"seed": 5}}),
        ],
        ids=["tokenizer", "limits", "seed"],
    )
    def test_change_without_effect_on_the_pairs_changes_no_metric(self, key, change, whole, made, write, tmp_path):
        continued(made, write, tmp_path, [key], **change(tmp_path))
        assert trajectory(tmp_path / "run") == trajectory(made("one", write)[0])

    def test_changes_of_several_resumes_are_all_recorded(self, made, write, tmp_path):
        stopped, _ = made("one", write, stop=STOP)
        shutil.copytree(stopped, tmp_path / "run")
        log = tmp_path / "log"
        first = [write("run", loss={"beta": 0.2}), log, 1, "checkpoint.accept_changes=[loss]"]
        assert job_of(*first, fault="step:0:3:term").codes == [75]
        run = write("run", loss={"beta": 0.2}, optim={"lr": 1e-5})
        job = job_of(run, log, 1, "checkpoint.accept_changes=[loss, optim]")
        assert job.codes == [0], job.said
        assert re.search(r"^checkpoint\.accept_changes: loss has not changed$", job.output[0], re.MULTILINE)
        record = record_of(tmp_path / "run", STEPS)
        assert [(entry["step"], entry["key"]) for entry in record["history"]] == [(STOP, "loss"), (7, "optim")]
        assert record["config"]["optim"]["lr"] == 1e-5 and record["code"]["torch"]


def run_fresh(write, tmp_path, **sections):
    """Train on one rank from the beginning. Return the pairs of each step."""
    job = job_of(write("fresh", **sections), tmp_path / "fresh-log", 1)
    assert job.codes == [0], job.said
    return pairs_of_job(tmp_path / "fresh-log", 1, {})


@slow
def test_updated_reference_resumes_exactly(made, write, tmp_path):
    sections = {"reference": {"sync_every": 3, "sync_alpha": 0.5}}
    whole, _ = made("one", write, **sections)
    stopped, _ = made("one", write, stop=STOP, **sections)
    _, output, _ = go_on(stopped, write, tmp_path, "one", **sections)
    assert trajectory(output) == trajectory(whole)
    assert record_of(output, STEPS)["history"] == []
