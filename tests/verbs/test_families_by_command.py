"""Tests of model families with the command line: `parity` finds no difference, and `train` ends with an export."""

import json

import pytest

from support.family_cases import checkpoint
from support.jobs import run_job
from support.small_run import config_of

LAYOUTS = {
    "gemma2": {"tp": 2},
    "olmo3": {"cp": 2},
    "gpt_neox": {"pp": 2, "layers": [1, 3]},
    "phi3, longrope": {"tp": 2},
    "qwen3_moe, some layers": {"ep": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS)
def test_parity_and_three_steps(case, files, tiny_hf, tmp_path):
    config = config_of(
        files,
        checkpoint(tiny_hf, case),
        tmp_path / "run",
        parallel=LAYOUTS[case],
        train={"max_steps": 3},
        checkpoint={"save_interval": 2},
    )
    (tmp_path / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    compared = run_job(["parity", str(tmp_path / "run.yaml")], 2, tmp_path / "parity")
    assert compared.codes == [0, 0], compared.said
    assert compared.output[0].count("equal") == 6 and "DIFFERENT" not in compared.output[0]

    trained = run_job(["train", str(tmp_path / "run.yaml")], 2, tmp_path / "train")
    assert trained.codes == [0, 0], trained.said
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 3 and (tmp_path / "run/hf/config.json").is_file()
