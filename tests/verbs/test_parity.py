"""Tests of `dpo-engine parity`: equivalent layouts pass, and a planted difference is reported and fails."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_engine.verbs.parity import TOLERANCE, differences
from support.small_run import config_of

WRONG = '''
import os
from dpo_kernels import eager
from dpo_kernels.dispatch import register_backend, use_backend


class Wrong:
    """Correct on one rank, but wrong on two: every vocabulary shard but the first gets a wrong sum."""

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
    config = config_of(files, tiny_hf("llama"), tmp_path, parallel={"tp": 2}, batch={"layout": "tree"})
    done = parity(config, tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tp 2, pp 1, vpp 1, cp 1 on 2 ranks, tree batches, compared with one process, stacked batches" in done.stdout
    assert done.stdout.count("equal") == 4 and "DIFFERENT" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, parallel",
    [(None, {"tp": 2, "cp": 2}), (2, {})],
    ids=["alone", "torchrun"],
)
def test_fp64_parity_finds_no_difference(files, tiny_hf, tmp_path, ranks, parallel):  # noqa: F811
    config = config_of(files, tiny_hf("llama"), tmp_path, parallel=parallel, batch={"layout": "tree"})
    done = parity(config, tmp_path / "run", "--fp64", ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 pairs in float64, native layers and plain AdamW: " in done.stdout and done.stdout.count("equal") == 4
    found = [float(line.split("(allowed")[0].split()[-1]) for line in done.stdout.splitlines() if "(allowed" in line]
    assert max(found) < 1e-10


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
    from dpo_engine.verbs.parity import measure
    from support.ranks import run_ranks

    def in_bf16(config):
        return config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bf16"})})

    config = in_bf16(config_of(files, tiny_hf("llama"), tmp_path))
    scored = run_ranks(measure, 1, config=config)[0]["pairs"]
    rows = [json.loads(line) for line in Path(files["train"]).read_text().splitlines()]
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(rows[int(p["index"])] | {c: p[c] for c in columns}) + "\n" for p in scored))
    data = {"train": str(own), "validation": None}
    given = config_of(files, tiny_hf("llama"), tmp_path, data=data, reference={"mode": "dataset"})
    found = run_ranks(measure, 1, config=in_bf16(given), fp64=True)[0]
    assert found["dtype"] == "float64" and len(found["pairs"]) == 8


def test_kernels_without_fp64_are_refused(files, tiny_hf, tmp_path, monkeypatch):  # noqa: F811
    from dpo_engine.errors import ConfigError
    from dpo_engine.training import engine

    monkeypatch.setattr(engine, "kernels_in_use", lambda: "triton (attention, head)")
    with pytest.raises(
        ConfigError, match="kernels=triton: compute sums in fp32, but --fp64 needs fp64; use eager and s"
    ):
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


def test_differences_are_relative_and_maximal():
    before, after = ({"index": 0, "chosen_logps": -10.0, "rejected_logps": -0.5} for _ in range(2))
    one = {"pairs": [before], "loss": 0.5, "grad_norm": 4.0, "pairs_after": [after]}
    many = copy.deepcopy(one)
    assert set(differences(one, many).values()) == {0.0}
    many["pairs"][0]["chosen_logps"] = -10.1
    many["pairs_after"][0]["rejected_logps"] = -0.6
    many["grad_norm"] = 5.0
    found = differences(one, many)
    assert found["logps"] == pytest.approx(0.1 / 10) and found["logps after a step"] == pytest.approx(0.1)
    assert found["loss"] == 0 and found["grad_norm"] == pytest.approx(0.25)
    assert set(found) == set(TOLERANCE["float32"]) == set(TOLERANCE["bfloat16"])


@pytest.mark.parametrize("place", [0, 1])
def test_nan_counts_as_a_difference(place):
    rows = [{"index": i, "chosen_logps": -10.0, "rejected_logps": -0.5} for i in range(2)]
    one = {"pairs": rows, "loss": 0.5, "grad_norm": 4.0, "pairs_after": rows}
    many = copy.deepcopy(one)
    many["pairs"][place]["rejected_logps"] = float("nan")
    assert not differences(one, many)["logps"] <= TOLERANCE["float32"]["logps"]


def test_compared_step_changes_the_policy(files, tiny_hf, tmp_path):  # noqa: F811
    """The compared step must change the policy even with warmup, which starts at a learning rate of zero.

    If the step did not change the policy, equal log-probabilities after the step would prove nothing.
    """
    from dpo_engine.verbs.parity import measure
    from support.ranks import run_ranks

    numbers = run_ranks(measure, 1, config=config_of(files, tiny_hf("llama"), tmp_path, optim={"warmup_steps": 3}))[0]
    assert len(numbers["pairs"]) == 8
    for before, after in zip(numbers["pairs"], numbers["pairs_after"], strict=True):
        assert after["ref_chosen_logps"] == before["ref_chosen_logps"]
        assert abs(after["chosen_logps"] - before["chosen_logps"]) > 1e-3
