"""Tests of model families that are not part of the engine, with the public checks of `dpo_engine.testing`."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_engine import ACTIVATIONS, FAMILIES, NORMS
from dpo_engine.config.run import import_plugins
from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.parameter_counts import parameters
from dpo_engine.testing import TinyModels, check_defaults, check_export, check_layouts, check_logits, check_steps
from dpo_engine.testing.ranks import run_ranks

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "extend"
NAMES = ["olmo", "jais2", "cwm"]
CASES = {
    "olmo": ("olmo", {}),
    "jais2": ("jais2", {"num_key_value_heads": 2}),
    "jais2, relu": ("jais2", {"hidden_act": "relu", "attention_bias": False}),
    "cwm": ("cwm", {"sliding_window": 8}),
    "cwm, no windows": ("cwm", {"layer_types": ["full_attention"] * 4, "mlp_bias": True}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return TinyModels(tmp_path_factory.mktemp("models"), CASES)


@pytest.fixture
def plugins(monkeypatch):
    """Import the examples as plugins, and remove them after the test."""
    registries = (FAMILIES, NORMS, ACTIVATIONS)
    before = [dict(registry) for registry in registries]
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert import_plugins(NAMES) == []
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)
    for name in NAMES:
        del sys.modules[name]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "layout",
    [{"tp": 2}, pytest.param({"pp": 2, "vpp": 2}, marks=pytest.mark.slow)],
    ids=["tp2", "pp2 vpp2"],
)
def test_logits_match_transformers_and_export_is_bitwise(layout, case, plugins, models):
    check_logits(models, case, layout)
    check_export(models, case, layout)


@pytest.mark.parametrize("case", CASES)
def test_absent_fields_have_the_defaults_of_transformers(case, plugins, models):
    check_defaults(models, case)


@pytest.mark.parametrize(
    "case, layout",
    [
        ("olmo", {"tp": 2}),
        pytest.param("jais2, relu", {"cp": 2}, marks=pytest.mark.slow),
        pytest.param("cwm", {"cp": 2}, marks=pytest.mark.slow),
    ],
)
def test_trees_match_padded_rows_on_one_rank(case, layout, plugins, models):
    check_layouts(models, case, layout)


@pytest.mark.parametrize("case", ["cwm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("olmo", "jais2"))])
def test_steps_match_transformers_and_autograd(case, plugins, models):
    check_steps(models, case)


def test_parameters_and_refusals(plugins, tiny_hf, tmp_path):
    from transformers import AutoModelForCausalLM

    directory = tiny_hf("olmo", pad_token_id=0)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert parameters(read_architecture(directory)) == sum(one.numel() for one in model.parameters())
    model.config.clip_qkv = 8.0
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="clip_qkv=8.0: the engine does not clip queries, keys and values"):
        read_architecture(tmp_path)
    model.config.clip_qkv, model.config.hidden_act = None, "relu"
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="hidden_act='relu': the MLP of this family uses SiLU"):
        read_architecture(tmp_path)


def test_a_family_is_one_short_file_that_needs_no_megatron():
    assert all(len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 45 for name in NAMES)
    imported = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import {', '.join(NAMES)}"
    assert importlib.util.find_spec("megatron")
    subprocess.run([sys.executable, "-c", f"{imported}; assert 'megatron' not in sys.modules"], check=True)


@pytest.fixture
def package(tmp_path):
    """Create a folder with a model family and with the test file from docs/extending.md. Return the folder."""
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8").partition("### Test the family")[2]
    text = re.search(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[1]
    assert len(text.splitlines()) <= 15
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "tests").mkdir()
    shutil.copy(EXAMPLES / "cwm.py", tmp_path / "my_lab")
    (tmp_path / "tests/test_families.py").write_text(text)
    return tmp_path


def run_pytest(package, *options):
    path = os.pathsep.join([str(package), str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(package), *options]
    environment = {**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""}
    return subprocess.run([*command, "tests"], cwd=package, env=environment, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_test_file_on_the_page(package):
    report = run_pytest(package)
    assert "10 passed" in report, report
    family = package / "my_lab/cwm.py"
    wrong = family.read_text().replace("kinds[layer % 4]", "kinds[(layer + 1) % 4]")
    family.write_text(wrong.replace('count("sliding_window", 8192) if', 'count("sliding_window", 8192) + 1 if'))
    report = run_pytest(package, "-k", "cwm- and (defaults or logits or export)")
    assert "2 failed, 1 passed" in report, report
    assert "AssertionError: cwm: without layer_types, the engine and transformers differ: ['sliding_layers=" in report
    assert "AssertionError: cwm: logits differ from those of transformers by " in report


def test_ranks_are_not_forked_if_a_gpu_is_present(monkeypatch):
    monkeypatch.setattr("dpo_engine.platform.device.gpu_present", lambda: True)
    with pytest.raises(RuntimeError, match="can use a GPU.*; set CUDA_VISIBLE_DEVICES to an empty string before"):
        run_ranks(dict, 1)
