"""Tests of `dpo-engine parity`: equivalent layouts pass, and a planted difference is reported with exit code 1."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_engine.testing.ranks import run_ranks
from dpo_engine.verbs import parity as verb
from dpo_engine.verbs.parity import AFTER, LOGPS, LOSS, METRICS, NORM, REFERENCE, differences, table
from support.family_cases import checkpoint
from support.jobs import run_job
from support.small_run import config_of

PLAIN = {"distributed_optimizer": False}
WRONG = '''
import os
from dpo_kernels import eager
from dpo_kernels.dispatch import register_backend, use_backend


class Wrong:
    """Correct on one rank, but wrong on two: every vocabulary shard except the first gets a wrong sum."""

    linear_grad = staticmethod(eager.linear_grad)
    linear_kept_grad = staticmethod(eager.linear_kept_grad)

    @staticmethod
    def linear_stats(hidden, weight, targets, start, valid, **options):
        stats = eager.linear_stats(hidden, weight, targets, start, valid, **options)
        return stats._replace(sum_exp=stats.sum_exp * (1.01 if start else 1.0))

    @staticmethod
    def linear_keep(hidden, weight, targets, start, valid, **options):
        stats, kept = eager.linear_keep(hidden, weight, targets, start, valid, **options)
        return stats._replace(sum_exp=stats.sum_exp * (1.01 if start else 1.0)), kept


register_backend("wrong", Wrong)
use_backend("wrong")
'''


def parity(config, folder, *overrides, ranks=None):
    folder.mkdir(exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks else []
    return subprocess.run(
        [sys.executable, "-m", *launcher, "dpo_engine", "parity", str(path), *overrides],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_layout_matches_one_process(files, tiny_hf, tmp_path):  # noqa: F811
    # `parity` compares this run with a run in one process. That run has its optimizer states on the device.
    more = {"parallel": {"tp": 2}, "batch": {"layout": "tree"}, "optim": {"states": "host"}}
    done = parity(config_of(files, tiny_hf("llama"), tmp_path, **more), tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(
        "3 steps of 8 pairs in float32: tp 2, pp 1, vpp 1, cp 1 on 2 ranks, tree micro-batches of up to 2 pairs, "
        "compared with one process and stacked micro-batches of up to 1 pair\n"
    )
    assert done.stdout.count("equal") == 6 and "DIFFERENT" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, parallel, adapter",
    [
        (None, {"tp": 2, "cp": 2}, None),
        (2, {}, None),
        (None, {"tp": 2, "pp": 2, "layers": [1, 3]}, {"kind": "dora", "rank": 3}),
    ],
    ids=["alone", "torchrun", "adapter"],
)
def test_fp64_parity_finds_no_difference(files, tiny_hf, tmp_path, ranks, parallel, adapter):  # noqa: F811
    more = {"adapter": adapter} if adapter else {"optim": {"states": "host"}}
    # `parity --fp64` must leave out `pad_buckets_for_high_nccl_busbw`, which requires the distributed optimizer.
    more["megatron"] = {"ddp": {"pad_buckets_for_high_nccl_busbw": True}}
    config = config_of(files, tiny_hf("llama"), tmp_path, parallel=parallel, batch={"layout": "tree"}, **more)
    done = parity(config, tmp_path / "run", "--fp64", ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 pairs in float64, native layers and plain AdamW: " in done.stdout and done.stdout.count("equal") == 6
    lines = done.stdout.splitlines()[2:]
    found = [float(word) for line in lines for word in line.split() if "e-" in word or "e+" in word]
    assert len(found) == 4 * 3 + 2 + 6 and max(found) <= 1e-10


@pytest.mark.slow
def test_fp64_reveals_a_difference_that_fp32_hides(files, tiny_hf, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "wrong_kernels.py").write_text(WRONG.replace("1.01", "1.0000001"))
    config = config_of(files, tiny_hf("llama"), tmp_path, parallel={"tp": 2})
    assert parity(config, folder, "plugins=[wrong_kernels]").returncode == 0
    done = parity(config, folder, "plugins=[wrong_kernels]", "--fp64")
    assert done.returncode == 1 and "DIFFERENT" in done.stdout, done.stdout + done.stderr


def test_logps_scored_in_bf16_are_accepted_in_fp64(files, tiny_hf, tmp_path):  # noqa: F811
    from dpo_engine.training.short_run import measure

    def in_bf16(config):
        return config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bf16"})})

    config = in_bf16(config_of(files, tiny_hf("llama", num_hidden_layers=2), tmp_path))
    scored = run_ranks(measure, 1, config=config)[0]["before"]
    rows = [json.loads(line) for line in Path(files["train"]).read_text().splitlines()]
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(rows[int(p["index"])] | {c: p[c] for c in columns}) + "\n" for p in scored))
    data = {"train": str(own), "validation": None}
    sections = {"data": data, "reference": {"mode": "dataset"}, "parallel": PLAIN}
    given = config_of(files, tiny_hf("llama", num_hidden_layers=2), tmp_path, **sections)
    found = run_ranks(measure, 1, config=in_bf16(given), fp64=True)[0]
    assert found["dtype"] == "float64" and len(found["before"]) == len(scored)


def test_kernels_without_fp64_are_refused(files, tiny_hf, tmp_path, monkeypatch):  # noqa: F811
    from dpo_engine.errors import ConfigError
    from dpo_engine.training import engine

    monkeypatch.setattr(engine, "kernels_in_use", lambda: "triton (attention, head)")
    with pytest.raises(
        ConfigError, match=r"kernels=triton: sums in fp32, but --fp64 requires fp64; set model.attention=sdpa and m"
    ):
        engine.Engine.open(config_of(files, tiny_hf("llama"), tmp_path, parallel=PLAIN), fp64=True)
    unfit = "parallel.distributed_optimizer=true: does not support fp64; set it to false"
    with pytest.raises(ConfigError, match=unfit):
        engine.Engine.open(config_of(files, tiny_hf("llama"), tmp_path), fp64=True)


@pytest.mark.slow
def test_planted_difference_is_found(files, tiny_hf, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "wrong_kernels.py").write_text(WRONG)
    config = config_of(files, tiny_hf("llama"), tmp_path, parallel={"tp": 2})
    done = parity(config, folder, "plugins=[wrong_kernels]")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DIFFERENT" in done.stdout


@pytest.mark.slow
def test_error_on_one_side_is_one_line_with_its_exit_code(files, tiny_hf, tmp_path):  # noqa: F811
    rows = [json.loads(line) for line in Path(files["train"]).read_text().splitlines()]
    spoiled = tmp_path / "spoiled.jsonl"
    columns = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    spoiled.write_text("".join(json.dumps(row | columns) + "\n" for row in rows))
    config = config_of({**files, "train": str(spoiled)}, tiny_hf("llama"), tmp_path, parallel={"tp": 2})
    overrides = ("reference.mode=dataset", "data.validation=null")
    done = parity(config, tmp_path / "run", *overrides)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert "data records: log-probabilities of pair" in done.stderr.splitlines()[-1]


def measure_wrong_adapter(config):
    """Measure a run whose second tensor-parallel rank uses a wrong matrix A."""
    from dpo_engine.model.adapters import Adapter
    from dpo_engine.training.short_run import measure

    down = Adapter.down
    Adapter.down = lambda self: down(self) * (1 + 0.01 * self.tp.rank())
    return measure(config)


def test_wrong_matrix_of_a_new_adapter_is_found(files, tiny_hf, tmp_path):  # noqa: F811
    """If `measure` left the matrices B of a new adapter at zero, an error in a matrix A would have no effect."""
    from dpo_engine.training.short_run import measure

    def config(**parallel):
        model = tiny_hf("llama", num_hidden_layers=2)
        return config_of(files, model, tmp_path, parallel=parallel, adapter={"rank": 3}, batch={"layout": "stacked"})

    (one,) = run_ranks(measure, 1, config=config())
    wrong = run_ranks(measure_wrong_adapter, 2, config=config(tp=2))[0]
    assert not differences(one, wrong)[LOGPS][0].equal and differences(one, wrong)[REFERENCE][0].equal


SIBLINGS = '''
from dpo_kernels import Tree, eager
from dpo_kernels.dispatch import register_backend, use_backend


class Siblings:
    """On any number of ranks, each rejected response sees the chosen response before it."""

    @staticmethod
    def tree_attention(query, key, value, tree, scale=None):
        roots = [sum(tree.lengths[i:j]) for i, j in _trees(tree)]
        return eager.tree_attention(query, key, value, Tree.of(roots, [-1] * len(roots), tree.rows), scale)


def _trees(tree):
    starts = [i for i, parent in enumerate(tree.parents) if parent < 0]
    return zip(starts, [*starts[1:], len(tree.parents)])


register_backend("siblings", Siblings)
use_backend("siblings")
'''


@pytest.mark.slow
def test_trees_are_compared_with_padded_rows(files, tiny_hf, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "siblings.py").write_text(SIBLINGS)
    config = config_of(files, tiny_hf("llama"), tmp_path, batch={"layout": "tree"})
    done = parity(config, folder, "plugins=[siblings]")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DIFFERENT" in done.stdout


LOSSES = """
import torch
import torch.distributed as dist
import torch.nn.functional as F
from dpo_engine.objective.contract import log_ratios
from dpo_engine.objective.losses import LOSSES


def margins(policy, reference):
    chosen, rejected = log_ratios(policy, reference)
    return 0.1 * (chosen - rejected)


@LOSSES.register("secret_mean", needs_reference=True)
def secret_mean(policy, reference):
    found = margins(policy, reference)
    return -F.logsigmoid(found - found.detach().mean())


@LOSSES.register("secret_sort", needs_reference=True)
def secret_sort(policy, reference):
    chosen, rejected = log_ratios(policy, reference)
    return -F.logsigmoid(0.1 * (chosen.sort().values - rejected.sort().values))


@LOSSES.register("scaled_by_ranks", needs_reference=True)
def scaled_by_ranks(policy, reference):
    return -F.logsigmoid(margins(policy, reference)) * dist.get_world_size()


@LOSSES.register("honest", needs_reference=True)
def honest(policy, reference):
    return -F.logsigmoid(margins(policy, reference))
"""


def command(files, model, folder, loss, *, ranks=1, before=None, **sections):
    """Run `dpo-engine parity` with a loss of the plugin above.

    All pairs have the same weight in the loss. At the learning rate of 1e-6, training steps hardly change the margins.
    The margins come from the change that `parity` makes to the policy's weights before the first step.
    """
    folder.mkdir(exist_ok=True)
    (folder / "parity_losses.py").write_text(LOSSES)
    sections = {"batch": {"layout": "stacked"}, "train": {"micro_batch_size": 1}, "optim": {"lr": 1e-6}, **sections}
    config = config_of(files, model, folder / "run", **sections)
    config = config.model_copy(update={"plugins": ("parity_losses",)})
    (folder / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    environment = {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    def start():
        sys.path.insert(0, str(folder))
        if before:
            before()

    asked = ["parity", str(folder / "run.yaml"), f"loss.name={loss}"]
    return run_job(asked, ranks, folder / "job", environment=environment, before=start)


def in_forks():
    """Make `parity` measure in forks of its process. The forks need not import the packages again.

    This works only for runs of a single rank.
    """

    def measure_in_fork(config, ranks, folder, *, fp64):
        folder.mkdir()
        (folder / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
        pid = os.fork()
        if not pid:
            for key in verb.LAUNCHER_KEYS:
                os.environ.pop(key, None)
            verb.main(str(folder))
            os._exit(0)
        assert ranks == 1 and os.waitpid(pid, 0)[1] == 0
        return json.loads((folder / "numbers.json").read_text())

    verb._measure_in_processes = measure_in_fork


def verdicts(done):
    """Return a dictionary of the verdicts that the command printed, by kind of number, such as ``LOSS``."""
    lines = done.output[0].splitlines()[2:]
    return {
        line[:28].strip(): line[line.index(found) :] for line in lines for found in ("equal", "DIFF") if found in line
    }


def test_loss_that_reads_its_micro_batch_is_found(files, tiny_hf, tmp_path):
    """The run has one rank, stacked rows, and one pair per micro-batch.

    Only the comparison with a run that has different micro-batches can reveal a loss that depends on its micro-batch.
    """
    done = command(files, tiny_hf("llama", num_hidden_layers=2), tmp_path / "run", "secret_mean", before=in_forks)
    assert done.codes == [1], done.said
    found = verdicts(done)
    assert found[LOSS] == "DIFFERENT from step 1: loss of a pair", done.output[0]
    said = "micro-batches of up to 1 pair, compared with one process and stacked micro-batches of up to 2 pairs"
    assert said in done.output[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss, ranks, found",
    [("honest", 1, False), ("honest", 2, False), ("secret_mean", 2, True), ("secret_sort", 1, True)],
)
def test_undeclared_coupling_is_found(loss, ranks, found, files, tiny_hf, tmp_path):
    done = command(files, tiny_hf("llama", num_hidden_layers=2), tmp_path / "run", loss, ranks=ranks)
    assert done.codes[0] == int(found), done.said
    assert ("DIFFERENT" in done.output[0]) == found


@pytest.mark.slow
def test_loss_scaled_by_the_number_of_ranks_is_found(files, tiny_hf, tmp_path):
    done = command(files, tiny_hf("llama", num_hidden_layers=2), tmp_path / "run", "scaled_by_ranks", ranks=2)
    assert done.codes[0] == 1 and "DIFFERENT from step 1" in verdicts(done)[LOSS], done.said


REFERENCES = """
from dpo_engine.scoring.reference import {reference}, score
from dpo_engine.training import references

original = references.open_reference


def planted(engine, policy, **options):
    found = original(engine, policy, **options)
    {plant}
    return found


references.open_reference = planted
from dpo_engine.training import short_run
short_run.open_reference = planted
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, reference, plant",
    [
        ("resident", "ResidentReference", "found.chunks = list(policy)"),
        ("offloaded", "OffloadedReference", "found.weights.exchange = lambda: None"),
    ],
)
def test_reference_that_reads_the_policy_is_found(mode, reference, plant, files, tiny_hf, tmp_path):
    """Both compared runs have the bug. Only numbers that were computed before the policy's weights changed show it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "planted_reference.py").write_text(REFERENCES.format(reference=reference, plant=plant))
    config = config_of(files, tiny_hf("llama"), tmp_path, reference={"mode": mode})
    done = parity(config, folder, "plugins=[planted_reference]")
    assert done.returncode == 1, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if "DIFFERENT" in line][-1].startswith(f"  {REFERENCE}")


def numbers(steps=2):
    """Return made-up results of a short run."""
    row = {"index": 0, "loss": 0.4, "chosen_logps": -10.0, "rejected_logps": -0.5, "ref_chosen_logps": -9.0}
    metrics = {"loss": 0.5, "grad_norm": 4.0, "rewards/margins": 0.1, "rewards/accuracies": 0.5}

    def rows():
        return [dict(row), dict(row)]

    made = [{"pairs": rows(), "metrics": dict(metrics)} for _ in range(steps)]
    return {"dtype": "float32", "before": rows(), "after": rows(), "steps": made}


def test_differences_are_relative_and_maximal():
    one, many = numbers(), numbers()
    assert {cell.found for row in differences(one, many).values() for cell in row} == {0.0}
    many["steps"][1]["pairs"][0]["chosen_logps"] = -10.1
    many["steps"][0]["metrics"] |= {"grad_norm": 5.0, "rewards/margins": 0.11}
    many["after"][1] |= {"rejected_logps": -0.6, "ref_chosen_logps": -9.9}
    found = differences(one, many)
    assert [cell.found for cell in found[LOGPS]] == [0, pytest.approx(0.1 / 10)]
    assert [cell.found for cell in found[NORM]] == [pytest.approx(0.25), 0]
    assert found[METRICS][0] == ("rewards/margins", pytest.approx(0.01), 1e-5)
    assert found[AFTER][0][:2] == ("rejected_logps", pytest.approx(0.1))
    assert found[REFERENCE][0][:2] == ("ref_chosen_logps", pytest.approx(0.1))
    many["steps"][1]["pairs"][1]["loss"] = 0.41
    assert differences(one, many)[LOSS][1][:2] == ("loss of a pair", pytest.approx(0.01))
    assert [cell.found for cell in found[LOSS]] == [0, 0]
    lines = {line[:26].strip(): line for line in table(found)}
    assert lines[LOGPS].split()[1:] == "0.0e+00 1.0e-02 1e-05, then 1e-04 DIFFERENT from step 2: chosen_logps".split()
    assert lines[REFERENCE].endswith("1.0e-01   1e-05              DIFFERENT: ref_chosen_logps")


def test_reference_is_compared_with_its_numbers_from_before_the_steps():
    one, many = numbers(), numbers()
    for result in one, many:
        result["after"] = [row | {"ref_chosen_logps": -8.0} for row in result["after"]]
    assert differences(one, many)[REFERENCE][0].found == pytest.approx(1 / 9)


def test_metric_that_only_one_side_has_is_a_difference():
    one, many = numbers(), numbers()
    many["steps"][0]["metrics"]["source/a/loss"] = 0.0
    assert differences(one, many)[METRICS][0][:2] == ("source/a/loss", math.inf)


def test_accuracies_are_compared_except_in_bf16():
    one, many = numbers(), numbers()
    many["steps"][0]["metrics"]["rewards/accuracies"] = 0.75
    assert differences(one, many)[METRICS][0].found == 0.25
    assert differences({**one, "dtype": "bfloat16"}, {**many, "dtype": "bfloat16"})[METRICS][0].found == 0


@pytest.mark.parametrize("place", [0, 1])
def test_nan_counts_as_a_difference(place):
    one, many = numbers(), numbers()
    many["steps"][1]["pairs"][place]["rejected_logps"] = float("nan")
    assert not differences(one, many)[LOGPS][1].equal


def test_changed_policy_is_the_same_in_every_layout(files, tiny_hf, tmp_path):
    from dpo_engine.training.short_run import measure

    model = tiny_hf("llama", num_hidden_layers=2)
    one, many = (
        run_ranks(measure, ranks, config=config_of(files, model, tmp_path, parallel={"tp": ranks}))[0]
        for ranks in (1, 2)
    )
    assert all(cell.equal for row in differences(one, many).values() for cell in row)


def test_policy_and_reference_differ_until_the_last_step(files, tiny_hf, tmp_path):
    """Policy and reference must differ. If they were equal, equal numbers in two layouts would prove little.

    Warmup must not apply, because its first learning rate is 0.
    """
    from dpo_engine.training.short_run import measure

    config = config_of(files, tiny_hf("llama", num_hidden_layers=2), tmp_path, optim={"warmup_steps": 3, "lr": 1e-6})
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bf16"})})
    found = run_ranks(measure, 1, config=config)[0]
    assert [len(step["pairs"]) for step in found["steps"]] == [8, 8, 6] and len(found["before"]) == 22
    unchanged = {row["index"]: row for row in found["before"]}
    assert all(row["chosen_logps"] == row["ref_chosen_logps"] for row in found["before"])
    for row in found["steps"][0]["pairs"]:
        assert row["ref_chosen_logps"] == pytest.approx(unchanged[row["index"]]["chosen_logps"], rel=1e-2)
        assert 1e-2 < abs(row["chosen_logps"] - row["ref_chosen_logps"]) < 10, row
    assert all(step["metrics"]["learning_rate"] > 0 for step in found["steps"])
    # In bf16, the optimizer has fp32 main weights. When the policy is changed, these weights must change, too.
    # Otherwise, the first step would undo the change.
    after = {row["index"]: row["chosen_logps"] for row in found["after"]}
    changed = {row["index"]: row["chosen_logps"] for step in found["steps"] for row in step["pairs"]}
    moved = sum(abs(changed[index] - row["chosen_logps"]) for index, row in unchanged.items())
    assert sum(abs(after[index] - value) for index, value in changed.items()) < 0.2 * moved


@pytest.mark.slow
def test_mixture_matches_one_process(files, tiny_hf, tmp_path):  # noqa: F811
    layout = {"tp": 2, "ep": 2}
    model = checkpoint(tiny_hf, "deepseek_v3")
    config = config_of(files, model, tmp_path, parallel=layout, batch={"layout": "tree"}, loss={"balance": 0.1})
    done = parity(config, tmp_path / "run", "--fp64")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tp 2, pp 1, vpp 1, cp 1, ep 2, etp 1 on 2 ranks, tree micro-batches" in done.stdout
    assert done.stdout.count("equal") == 6 and "DIFFERENT" not in done.stdout
