"""Tests of the benchmarks.

Counted operations match formulas. The lengths of generated pairs have the published medians. The comparisons run.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_engine.testing.pairs import RandomPairs
from dpo_kernels import dispatch
from support.tiny_tokenizers import byte_level

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

trl = pytest.importorskip("trl")

import attention  # noqa: E402
import causal  # noqa: E402
import compare_trl  # noqa: E402
import contest  # noqa: E402
import flops  # noqa: E402
import head  # noqa: E402
import pair_sets  # noqa: E402
import repeats  # noqa: E402
import weight_gradient  # noqa: E402
from measure import Job, Measured, Meter  # noqa: E402
from report import Disagreement, Setting, check_agreement, machine, rate, table  # noqa: E402

SHAPE = flops.Shape(hidden=8, layers=3, intermediate=20, heads=4, kv_heads=2, head_dim=2, vocab=50)


def counted(run) -> float:
    with flops.executed_flops() as counter:
        run()
    return counter.get_total_flops()


def test_matrix_products_are_counted_including_in_place():
    weight = torch.randn(5, 7, requires_grad=True)
    rows = torch.randn(3, 7, requires_grad=True)
    assert counted(lambda: torch.nn.functional.linear(rows, weight).sum().backward()) == 3 * (2 * 3 * 7 * 5)
    assert counted(lambda: torch.zeros(3, 5).addmm_(rows.detach(), weight.detach().T)) == 2 * 3 * 7 * 5


@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_the_computed_area_on_a_cpu(masked):
    rows, batch, heads, width = 48, 2, 4, 16
    query, key, value = (torch.randn(batch, heads, rows, width, requires_grad=True) for _ in range(3))
    mask = torch.ones(rows, rows, dtype=torch.bool).tril() if masked else None

    def run():
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=not masked)
        out.sum().backward()

    area = rows**2 if masked else sum(range(1, rows + 1))
    forward = batch * heads * 4 * width * area  # per score: 2 * width operations, and as many for the output
    expected = forward + 2.5 * forward
    assert counted(run) == expected


def test_bound_matches_a_models_operations_on_one_row(tiny_hf):
    """A single row has no shared prompt, so ``tree_flops`` must predict the operations of transformers.

    Only attention differs. The executed backward pass computes the scores again, and the formula approximates the
    number of scores, ``tokens * (tokens + 1) / 2``, by ``tokens**2 / 2``.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_hf("llama"))
    shape = flops.Shape.read(tiny_hf("llama"))
    tokens = 40
    ids = torch.randint(0, shape.vocab, (1, tokens))
    executed = counted(lambda: model(ids).logits.sum().backward())
    attention = 4 * shape.layers * shape.heads * shape.head_dim
    formula = flops.tree_flops(shape, 0, [tokens], prune=False)
    assert formula == shape_forward(shape, tokens) + attention * tokens**2 / 2
    expected = 3 * formula + attention * (3.5 * tokens * (tokens + 1) / 2 - 3 * tokens**2 / 2)
    assert executed == pytest.approx(expected, rel=1e-3)  # the rotary embedding also multiplies matrices


def test_bound_with_adapters_matches_operations_of_peft_on_one_row(tiny_hf):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_hf("llama"))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    shape, tokens = flops.Shape.read(tiny_hf("llama")), 40
    ids = torch.randint(0, shape.vocab, (1, tokens))
    executed = counted(lambda: model(ids).logits.sum().backward())
    attention = 4 * shape.layers * shape.heads * shape.head_dim
    recomputed = attention * (3.5 * tokens * (tokens + 1) / 2 - 3 * tokens**2 / 2)
    expected = flops.bound(shape, [(0, tokens)], passes=flops.TRAINING, prune=False, rank=4) + recomputed
    assert executed == pytest.approx(expected, rel=1e-3)


def shape_forward(shape, tokens: int) -> int:
    """Return the number of operations in a forward pass without attention: two per weight and token."""
    width = shape.heads * shape.head_dim
    narrow = shape.kv_heads * shape.head_dim
    layer = 2 * shape.hidden * width + 2 * shape.hidden * narrow + 3 * shape.hidden * shape.intermediate
    return 2 * tokens * (shape.layers * layer + shape.hidden * shape.vocab)


def test_pair_computes_its_prompt_once_and_prunes_the_last_layer():
    p, c, r = 11, 5, 3
    area = p * p / 2 + c * (p + c / 2) + r * (p + r / 2)
    whole = 3 * (2 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 20) * (p + c + r) + 4 * 4 * 2 * area) + 2 * 8 * 50 * (c + r)
    assert flops.tree_flops(SHAPE, p, (c, r), prune=False) == whole
    expected = whole - 2 * (8 * 8 * 2 + 3 * 8 * 20) * p - 4 * 4 * 2 * p * p / 2
    assert flops.tree_flops(SHAPE, p, (c, r)) == expected
    lengths = np.array([[p, c, r], [p, c, r]], dtype=np.int32)
    assert flops.bound(SHAPE, lengths) == pytest.approx(2 * 4 * expected)
    assert flops.bound(SHAPE, lengths, passes=flops.TRAINING + 1 / 3) == pytest.approx(2 * (3 + 1 / 3) * expected)


@pytest.mark.parametrize(
    "name, together, ratio", [("hh-like", 186, 2.15), ("uf-like", 409, 0.42), ("helpsteer-like", 775, 6.34)]
)
@pytest.mark.parametrize("count", [32, 500])
def test_generated_pairs_have_the_published_medians(name, together, ratio, count):
    """The lengths must match two published medians.

    One is the median length of a prompt plus one response. The other is the median ratio of prompt length to response
    length.
    """
    pairs = list(pair_sets.generate(name, count, vocab_size=300))
    prompts = np.array([len(pair.prompt) for pair in pairs])
    responses = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    expected_prompt, expected_response = together * ratio / (1 + ratio), together / (1 + ratio)
    assert np.median(prompts) == pytest.approx(expected_prompt, rel=0.05)
    assert np.median(responses) == pytest.approx(expected_response, rel=0.05)
    if count == 500:
        assert np.median(prompts + responses[:, 0]) == pytest.approx(together, rel=0.15)


def test_generated_pairs_are_reproducible_and_share_prompts(tmp_path):
    first, again = (list(pair_sets.generate("tldr-like", 7, vocab_size=300)) for _ in range(2))
    assert [pair.digest for pair in first] == [pair.digest for pair in again]
    assert len({pair.prompt.tobytes() for pair in first}) == 3  # the last prompt has one pair, the others three each
    assert len({pair.chosen.tobytes() for pair in first[:3]} | {pair.rejected.tobytes() for pair in first[:3]}) == 3
    written = pair_sets.write(tmp_path / "pairs.arrow", first)
    assert [written[i].digest for i in range(7)] == [pair.digest for pair in first]


def records(path: Path) -> Path:
    rows = [
        {"prompt": f"which is larger {i // 2} ?", "chosen": f" {i} it", "rejected": " so"}
        for i in (0, 2, 4, 1, 3, 5, 6)
    ]
    rows.append({"prompt": "which " * 500, "chosen": " 1", "rejected": " 2"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_of_a_file_are_grouped_by_prompt_and_long_pairs_are_left_out(tmp_path):
    path, tokenizer = records(tmp_path / "pairs.jsonl"), byte_level(tmp_path / "tokenizer")
    options = {"tokenizer": str(tokenizer), "template": None, "max_length": 64, "cache": tmp_path / "cache"}
    pairs = list(pair_sets.from_file(str(path), 99, **options))
    assert len(pairs) == 7
    prompts = [pair.prompt.tobytes() for pair in pairs]
    changes = sum(one != other for one, other in zip(prompts[1:], prompts[:-1], strict=True))
    assert changes == len(set(prompts)) - 1 == 3
    assert len(list(pair_sets.from_file(str(path), 5, **options))) == 5


def test_file_with_too_few_pairs_is_refused(tmp_path):
    path, tokenizer = records(tmp_path / "pairs.jsonl"), byte_level(tmp_path / "tokenizer")
    with pytest.raises(SystemExit, match="pairs.jsonl: has 7 pairs of at most 64 tokens; lower --pairs"):
        compare_trl.main([str(path), "--tokenizer", str(tokenizer), "--max-length", "64", "--pairs", "64"])


def test_meter_measures_time_and_memory_of_this_process():
    meter = Meter()
    meter.start()
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    for _ in range(20):
        held = held + 1
    processor, wall = meter.lap()
    assert 0 < processor and 0 < wall
    assert meter.lap()[1] < wall
    assert meter.peak_bytes() > 64 * 2**20


def measured(seconds: float, loss: float = 0.5, filling: float = 0.0) -> Measured:
    metrics = {"loss": loss, "chosen": -400.0, "rejected": -500.0}
    steps = [(9.0, 90.0), (seconds, 10 * seconds), (seconds, 10 * seconds)]
    return Measured((filling, filling), steps, peak_bytes=2_000_000, largest_tokens=1234, metrics=[metrics] * 3)


def setting(name: str, *runs: Measured, side: str = "engine", **facts) -> Setting:
    return Setting(name, Job(side, "m", "p", [[0]], 1.0, "fp32"), bound=4e9, runs=list(runs), **facts)


def test_rate_includes_filling_and_excludes_warmup_steps():
    assert rate(measured(2.0, filling=1.0), pairs=10, warmup=1, gpu=False) == 10 / (1 + 2 + 2)
    assert rate(measured(2.0), pairs=10, warmup=1, gpu=True) == 10 / 40


def test_table_has_medians_and_ratios_by_round():
    best = setting("TRL mb1", measured(4.0), measured(2.0), side="trl")
    ours = setting("ours", measured(2.0), measured(1.0), counted=Measured(flops=5e9))
    line = table([ours, best], best, pairs=8, warmup=1, gpu=False).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    expected = ["ours", "2", "3.00", "2.00", "2", "1.00", "0.62", "1.250", "1,234"]
    assert cells == expected


def test_headline_compares_both_sides_without_options_and_with_their_best_options(tmp_path):
    given = ["hh-like", "--quick", "--global-batch-size", "8", "--pairs", "8"]
    asked = compare_trl.arguments([*given, "--ours", "--ours", "batch.layout=stacked", "--trl", "no options", "mb1"])
    made = contest.Contest(asked, "hh-like", tmp_path)
    assert [one.name for one in made.settings] == [
        "ours no options",
        "ours batch.layout=stacked",
        "TRL no options",
        "TRL mb1",
    ]
    assert made.settings[2].job.micro_batch_size == 8
    for one, seconds in zip(made.settings, ([1, 2], [1, 0.5], [4], [3, 2]), strict=True):
        one.runs = [measured(value) for value in seconds]
    made.timed_pairs, asked.warmup_steps = 24, 1
    assert made.headline() == [
        "No options: ours no options 9.00 pairs per second and TRL no options 3.00 pairs per second; the median of "
        "the ratios by round is 4.00.",
        "The best of each: ours batch.layout=stacked 18.00 pairs per second and TRL mb1 5.00 pairs per second; the "
        "median of the ratios by round is 3.50.",
    ]
    made.settings = made.settings[1:3]
    assert [line.partition(":")[0] for line in made.headline()] == ["The best of each"]
    made.settings = made.settings[:1]
    assert made.headline() == []


def test_disagreeing_sides_are_not_compared():
    ours, close = setting("ours", measured(1.0)), setting("TRL mb1", measured(1.0, loss=0.50005))
    assert check_agreement([ours, close], 1e-4) == pytest.approx(5e-5)
    with pytest.raises(Disagreement, match="step 1: loss is 0.600000 with TRL mb2 and 0.500000 with ours; the results"):
        check_agreement([ours, close, setting("TRL mb2", measured(1.0, loss=0.6))], 1e-4)
    with pytest.raises(Disagreement, match="loss is nan"):
        check_agreement([ours, setting("TRL mb2", measured(1.0, loss=float("nan")))], 1e-4)


def test_results_describe_the_machine():
    facts = machine()
    assert facts["torch"] == torch.__version__ and facts["trl"] and facts["processor"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["hh-like", "--trl", "8"], "8: is not a valid TRL setting; examples: 'no options', mb4, mb4+grouped"),
        (["hh-like", "--trl", "mb3"], "--trl mb3: its micro-batch size must divide --global-batch-size 32"),
        (["hh-like", "--pairs", "33"], "--pairs 33: must be a multiple of --global-batch-size 32"),
        (["hh"], "hh: must be hh-like, uf-like, helpsteer-like, tldr-like or a file; a file also needs --tokenizer"),
    ],
)
def test_wrong_command_is_explained(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare_trl.arguments(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (BENCHMARKS / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("python ")]


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_parse(command):
    _, script, *argv = shlex.split(command)
    assert (BENCHMARKS.parent / script).is_file()
    compare_trl.arguments(argv)


def test_sweep_covers_micro_batches_grouping_and_precomputing():
    assert (
        len(compare_trl.SWEEP) == len(set(compare_trl.SWEEP)) == 4 * 2 * 2 - 2
    )  # two combinations are left out, because grouping has no effect on micro-batches of one pair
    assert compare_trl.arguments(["hh-like"]).trl == compare_trl.SWEEP and compare_trl.SWEEP[0] == "no options"
    assert compare_trl.arguments(["hh-like", "--trl", "no options", "mb4"]).trl == ["no options", "mb4"]
    assert contest.TRL_DEFAULT == trl.DPOConfig.per_device_train_batch_size
    assert compare_trl.arguments(["hh-like", "--quick", "--repeats", "2"]).repeats == 2


def test_shared_prompts_lower_the_bound(tmp_path):
    asked = compare_trl.arguments(["tldr-like", "--quick", "--pairs", "6", "--global-batch-size", "6"])
    made = contest.Contest(asked, "tldr-like", tmp_path)
    trees = [[made.pairs[i] for i in own] for own in (range(3), range(3, 6))]
    leaves = [{part.tobytes(): len(part) for pair in tree for part in (pair.chosen, pair.rejected)} for tree in trees]
    shared = sum(
        flops.tree_flops(made.shape, len(tree[0].prompt), found.values())
        for tree, found in zip(trees, leaves, strict=True)
    )
    apart = sum(flops.tree_flops(made.shape, p, (c, r)) for p, c, r in made.pairs.lengths.tolist())
    assert made.whole_trees() == pytest.approx(shared / apart)
    assert contest.Contest(compare_trl.arguments(["hh-like", "--quick"]), "hh-like", tmp_path).whole_trees() is None


def test_both_sides_get_the_same_steps(tmp_path):
    asked = compare_trl.arguments(["hh-like", "--quick", "--epochs", "2", "--warmup-steps", "1"])
    made = contest.Contest(asked, "hh-like", tmp_path)
    expected = [[0, 1], [0, 1], [2, 3], [0, 1], [2, 3]]
    assert [one.job.steps for one in made.settings] == [expected] * 3
    assert {(one.job.model, one.job.pairs, one.job.lr, one.job.dtype) for one in made.settings} == {
        (made.model, str(tmp_path / "pairs.arrow"), 5e-4, "fp32")
    }


def test_stored_reference_lowers_the_bound(tmp_path):
    asked = compare_trl.arguments(
        ["hh-like", "--quick", "--epochs", "3", "--ours", "--ours", "reference.mode=stored", "--trl", "mb1+precomputed"]
    )
    online, stored, theirs = contest.Contest(asked, "hh-like", tmp_path).settings
    assert stored.bound / online.bound == pytest.approx((6 * 3 + 2) / (8 * 3))
    assert theirs.bound == stored.bound


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [[], ["--adapter", "4"]], ids=["weights", "adapter"])
def test_full_comparison(adapter, tmp_path):
    """Run the whole comparison. Its exit code is 1 if the metrics of the engine and TRL differ."""
    command = [sys.executable, str(BENCHMARKS / "compare_trl.py"), "hh-like", "--quick"]
    ours = ["reference.mode=stored", "train.micro_batch_size=2"]
    command += ["--ours", *ours, "--trl", "mb2+grouped+precomputed+onednn", *adapter]
    root = BENCHMARKS.parent
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == [
        "| ours reference.mode=stored train.micro_batch_size=2",
        "| TRL mb2+grouped+precomputed+onednn",
    ]
    assert all(float(row[2]) > 0 and float(row[7]) > 1 for row in rows[1:])


@pytest.mark.slow
def test_failing_process_is_reported_with_its_error(tmp_path):
    pairs = RandomPairs(2, 300, weighted=False)
    pair_sets.write(tmp_path / "pairs.arrow", pairs.pairs)
    job = Job("engine", str(tmp_path), str(tmp_path / "pairs.arrow"), [[0, 1]], 1e-3, "fp32", overrides=("no.such=1",))
    with pytest.raises(SystemExit, match=r"run_engine.py exited with 1:(.|\n)*no"):
        contest.run_job(job, threads=1)


def test_attention_backends_are_timed_and_compared(monkeypatch, capsys):
    monkeypatch.setattr(attention, "TARGET_S", 0.0)
    monkeypatch.setattr(dispatch, "_chosen", {})
    options = ["--pairs", "4,3,2", "60,30,30", "--row", "1", "3", "--tokens", "130", "--heads", "2", "--kv-heads", "1"]
    assert attention.main(options) == 0
    said = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")]
    assert [row[:3] for row in rows[2:]] == [
        ["4+3+2 x 1", "9", f"{(7 * 8 / 2 + 2 * 4 + 2 * 3 / 2) / 9**2:.1%}"],
        ["4+3+2 x 3", "27", f"{3 * (7 * 8 / 2 + 2 * 4 + 2 * 3 / 2) / 27**2:.1%}"],
        ["60+30+30 x 1", "120", f"{(90 * 91 / 2 + 30 * 60 + 30 * 31 / 2) / 120**2:.1%}"],
    ]
    assert all(float(cell) >= 0 for row in rows[2:] for cell in row[3:])
    assert "2 heads (1 KV), head size 64, fp32" in said


def test_differing_attention_is_not_timed(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(attention.BACKENDS["sdpa"], "tree_attention", lambda q, k, v, tree: 2 * q + 0 * k + 0 * v)
    with pytest.raises(SystemExit, match="sdpa and eager differ on a row of"):
        attention.main(["--pairs", "4,3,2", "--row", "1", "--kv-heads", "4"])


def test_gradients_of_the_head_are_timed(monkeypatch, capsys):
    monkeypatch.setattr(attention, "TARGET_S", 0.0)
    monkeypatch.setattr(dispatch, "_chosen", {})
    assert head.main(["--shapes", "40,8,50", "9,4,30"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["tokens, hidden, vocabulary", "---", "40, 8, 50", "9, 4, 30"]
    assert rows[0][-1] == "best / products" and all(float(cell) >= 0 for row in rows[2:] for cell in row[1:])


def test_the_timed_head_is_that_of_training():
    given = head.tensors(40, 8, 50)
    hidden, weight = (given[name].double().requires_grad_() for name in ("hidden", "weight"))
    logps = torch.log_softmax(hidden @ weight.T, -1).gather(1, given["targets"][:, None])[:, 0]
    logps.backward(given["grad"].double())
    torch.testing.assert_close(head.kept("eager", given)().double(), hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given["d_weight"].double(), weight.grad, rtol=1e-4, atol=1e-5)


def test_a_differing_head_is_not_timed(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", {})
    results = iter([torch.ones(3), 2 * torch.ones(3)])
    monkeypatch.setattr(head, "kept", lambda backend, given: lambda: next(results))
    with pytest.raises(SystemExit, match="eager and eager differ on"):
        head.main(["--shapes", "40,8,50", "--backends", "eager", "eager"])


BUDGET_S = 840
"""Limit on the sum of the time limits in gpu_day.sh: 15 minutes, minus a minute to start the machine and copy files."""


def gpu_day(folder, python, script):
    """Run a copy of gpu_day.sh with a stand-in for Python.

    Return the result of each part, and the arguments of each call of the stand-in.
    """
    (folder / "benchmarks/results").mkdir(parents=True)
    (folder / "benchmarks/gpu_day.sh").write_text(script)
    stand_in, calls = folder / "python", folder / "calls"
    stand_in.write_text(f'#!/bin/bash\nprintf "%q " "$@" >>{calls}\necho >>{calls}\n{python}')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stand_in), "SCALE": "1"}
    command = ["bash", str(folder / "benchmarks/gpu_day.sh"), "day"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = dict(re.findall(r"^(\w+) +\d+ s  (.*)$", done.stdout, re.MULTILINE))
    return results, [shlex.split(line) for line in calls.read_text().splitlines()]


@pytest.mark.parametrize(
    "engine, override, backend",
    [("not installed", [], []), ("installed, but fails: ", ["model.spec=native"], []), ("2.20.2, largest", [], ["te"])],
)
def test_gpu_day_calls_benchmarks_with_arguments_that_exist(engine, override, backend, tmp_path):
    script = (BENCHMARKS / "gpu_day.sh").read_text()
    _, calls = gpu_day(tmp_path, f'[[ $1 == *stack.py ]] && echo "transformer_engine: {engine}"; exit 0\n', script)
    benchmarks = {one.__name__: one for one in (attention, causal, compare_trl, head, repeats)}
    asked = [(Path(path).stem, words) for path, *words in calls]
    assert benchmarks.keys() <= {name for name, _ in asked}
    parsed = [benchmarks[name].arguments(words) for name, words in asked if name in benchmarks]
    (against,) = [one for one in parsed if getattr(one, "trl", None)]
    (compared,) = [one for one in parsed if hasattr(one, "kv_heads") and hasattr(one, "backends")]
    assert compared.backends == ["varlen", "triton", "sdpa", *backend]
    assert against.ours == [override] and against.trl == ["no options", "mb4", "mb1"]


def test_the_limits_of_gpu_day_stay_within_the_budget():
    parts = re.findall(r"^part (\w+) (\d+) ", (BENCHMARKS / "gpu_day.sh").read_text(), re.MULTILINE)
    assert len(parts) >= 13 and sum(int(limit) for _, limit in parts) <= BUDGET_S


def test_a_failing_part_of_gpu_day_stops_neither_the_next_nor_the_summary(tmp_path):
    """A stand-in for Python fails in one part, hangs with a child process in another, and succeeds in the others."""
    script = (BENCHMARKS / "gpu_day.sh").read_text().replace("part head 35 ", "part head 1 ")
    python = (
        f"echo called with $1\ncase $1 in *head.py) sleep 60 & echo $! >{tmp_path}/left; wait ;;\n"
        "*attention.py) exit 3 ;; esac\n"
    )
    results, _ = gpu_day(tmp_path, python, script)
    assert results.pop("head") == "stopped after its limit of 1 s" and results.pop("attention") == "exit code 3"
    assert len(results) >= 7 and set(results.values()) == {"passed"}
    summary = (tmp_path / "benchmarks/results/day.md").read_text()
    assert re.findall(r"^## (\w+)$", summary, re.MULTILINE) == re.findall(r"^part (\w+) ", script, re.MULTILINE)
    assert "called with benchmarks/attention.py" in summary
    status = Path(f"/proc/{int((tmp_path / 'left').read_text())}/stat")
    assert not status.exists() or ") Z " in status.read_text(), "the child process must have ended"


@pytest.mark.parametrize(
    "part, log, expected",
    [
        ("trl", "run_trl.py exited with 1:", 0),
        ("trl", "run_engine.py exited with 1:", "parts failed: trl; their logs are in gpu-day/rehearsal"),
        ("head", "run_trl.py exited with 1:", "parts failed: head; their logs are in gpu-day/rehearsal"),
    ],
)
def test_a_rehearsal_excuses_only_trl(part, log, expected, tmp_path):
    """Stand-ins replace the null GPU and gpu_day.sh. The stand-in for gpu_day.sh reports that one part failed.

    The null GPU is a library that replaces CUDA and computes nothing.
    """
    for folder in ("tests/nullgpu", "benchmarks/results", "gpu-day/rehearsal"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(BENCHMARKS.parent / "tests/nullgpu/rehearse.sh", tmp_path / "tests/nullgpu")
    (tmp_path / "tests/nullgpu/build.sh").touch()
    (tmp_path / "tests/nullgpu/nullgpu").write_text('#!/bin/bash\nexec "$@"\n')
    (tmp_path / "tests/nullgpu/nullgpu").chmod(0o755)
    (tmp_path / "gpu-day/rehearsal/trl.log").write_text(f"{log}\n")
    lines = f"stack           9 s  passed\n{part:<12}   75 s  exit code 1"
    script = f'echo "{lines}"\ntouch benchmarks/results/rehearsal.md\n'
    (tmp_path / "benchmarks/gpu_day.sh").write_text(script)
    done = subprocess.run(["bash", str(tmp_path / "tests/nullgpu/rehearse.sh")], capture_output=True, text=True)
    assert done.returncode == (expected != 0), done.stderr
    assert not expected or done.stderr.splitlines()[-1] == expected


def test_causal_attention_is_timed(capsys):
    assert causal.main(["--lengths", "32", "--new-lengths", "2"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| flash")]
    assert float(line.split("|")[2]) > 0


def test_differing_bits_are_found():
    one = Measured(metrics=[{"loss": 1.0}, {"loss": 0.5}], digest="a")
    assert repeats.first_difference(one, replace(one)) == "equal"
    assert repeats.first_difference(one, replace(one, metrics=[{"loss": 1.0}, {"loss": 0.6}])) == "differs in step 2"
    assert repeats.first_difference(one, replace(one, digest="b")) == "only the final weights differ"


@pytest.mark.slow
def test_repeats_are_bitwise_equal(capsys, tmp_path):
    model = contest.save_random_model(tmp_path / "model", "smoke", 512)
    assert repeats.main([str(model), "--data", "hh-like", "--steps", "2", "--global-batch-size", "2"]) == 0
    lines = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in line] for line in lines[2:]] == [[name, "equal"] for name in repeats.RUNS]


def test_weight_gradients_added_to_a_buffer_are_accurate(capsys):
    assert weight_gradient.main(["--shapes", "64,32,48"]) == 0
    *_, line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 64")]
    assert all(float(error) < 1e-6 for error in line.split("|")[4:6])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "conversation"])
def test_tokenizing_is_compared_on_equal_ids(form, tmp_path):
    rows = [
        {"prompt": f"which is larger {n} ?", "chosen": f"\n\nthe {n}", "rejected": f"\n\nno {n}"} for n in range(30)
    ]
    if form == "conversation":
        rows = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in rows
        ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(BENCHMARKS / "tokenizing.py"), str(file), "--rounds", "1", "--repeat", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| pairs")]
    assert [row[1:4] for row in table] == [["60", "engine", "1"], ["60", "engine", "2"], ["60", "trl", "1"]]
