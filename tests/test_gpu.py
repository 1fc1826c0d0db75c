"""Tests on a CUDA device.

The engine patches no function of torch. Training with each layer spec matches training on the CPU. A resumed run is
bitwise equal to an uninterrupted run. Overlapped communication and CUDA graphs change no result. Each profiler works.
"""

import json
import subprocess
import sys

import pytest
import torch

from dpo_engine.platform.device import has_transformer_engine
from dpo_engine.verbs.parity import parity
from support.small_run import config_of, log_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a CUDA device"),
]

UNPATCHED = """
import torch
before = torch.zeros, torch.Tensor.to, torch.cuda.current_device
from dpo_engine.platform.device import open_platform
platform = open_platform(deterministic=True)
assert platform.gpu and platform.backend == "nccl"
assert (torch.zeros, torch.Tensor.to, torch.cuda.current_device) == before
"""


def train(config, folder, **environment):
    """Train in one process with the command line. Return the metrics of the steps.

    The keyword arguments are added to the environment. ``CUDA_VISIBLE_DEVICES=""`` selects the CPU.
    """
    import os

    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "dpo_engine", "train", str(folder / "run.yaml")]
    subprocess.run(command, check=True, env={**os.environ, **environment})
    return [line for line in log_of(folder) if "loss" in line]


@pytest.mark.parametrize("graphs", [False, True], ids=["launches", "graphs"])
def test_run_resumes_bitwise_from_an_async_save(graphs, files, tiny_hf, tmp_path):  # noqa: F811
    """A thread writes the checkpoint from pinned memory while later steps change the weights.

    With CUDA graphs, the first step after a resume runs without a replay. The uninterrupted run replays graphs in the
    same step. Both must give the same bits.
    """
    model, whole = tiny_hf("llama"), tmp_path / "whole"
    sections = {
        "model": {"path": str(model), "tokenizer": files["tokenizer"], "cuda_graphs": graphs},
        "batch": {"layout": "tree"},
        "optim": {"schedule": "constant"},
        "checkpoint": {"save_interval": 1, "export": False},
    }
    expected = train(config_of(files, model, whole, **sections), whole)
    for stop in (3, 6):
        parts = tmp_path / "parts"
        got = train(config_of(files, model, parts, **sections, train={"max_steps": stop}), parts)
    assert [(line["loss"], line["grad_norm"]) for line in got] == [
        (line["loss"], line["grad_norm"]) for line in expected
    ]


def test_nothing_is_patched():
    subprocess.run([sys.executable, "-c", UNPATCHED], check=True)


@pytest.mark.parametrize("spec", ["native", "te"])
@pytest.mark.parametrize("dtype, rel", [("fp32", 1e-3), ("bf16", 3e-2)])
def test_gpu_run_matches_the_cpu(spec, dtype, rel, files, tiny_hf, tmp_path):  # noqa: F811
    """In fp32 without TF32, only the order of sums differs from the CPU. bf16 results have 8 significant bits."""
    if spec == "te" and not has_transformer_engine():
        pytest.skip("Transformer Engine is not installed")
    start = tiny_hf("llama")

    def config(name, **model):
        return config_of(
            files, start, tmp_path / name, model={"path": str(start), "tokenizer": files["tokenizer"], **model}
        )

    expected = train(config("host", dtype="fp32"), tmp_path / "host", CUDA_VISIBLE_DEVICES="")
    got = train(config("gpu", dtype=dtype, spec=spec), tmp_path / "gpu")
    for line, want in zip(got, expected, strict=True):
        for name in ("loss", "logps/chosen", "logps/rejected"):
            assert line[name] == pytest.approx(want[name], rel=rel, abs=rel), (line["step"], name)
        assert line["peak_memory_bytes"] > 0
    assert json.loads((tmp_path / "gpu" / "hf" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="requires two CUDA devices")
@pytest.mark.skipif(not has_transformer_engine(), reason="requires Transformer Engine")
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_overlapped_communication_matches_a_single_process(recompute, files, tiny_hf, tmp_path):  # noqa: F811
    sections = {
        "model": {"path": str(tiny_hf("llama")), "tokenizer": files["tokenizer"], "spec": "te", "recompute": recompute},
        "parallel": {"tp": 2},
        "batch": {"layout": "tree"},
        "megatron": {"transformer": {"tp_comm_overlap": True}},
    }
    report = []
    assert parity(config_of(files, tiny_hf("llama"), tmp_path / "run", **sections), report.append), report


@pytest.mark.parametrize("adapter", [None, {"rank": 4}], ids=["weights", "adapter"])
def test_cuda_graphs_match_a_single_process(adapter, files, tiny_hf, tmp_path):  # noqa: F811
    """Parity compares three steps, of which two use graphs."""
    sections = {
        "model": {"path": str(tiny_hf("llama")), "tokenizer": files["tokenizer"], "cuda_graphs": True},
        "batch": {"layout": "tree"},
        **({"adapter": adapter} if adapter else {}),
    }
    report = []
    assert parity(config_of(files, tiny_hf("llama"), tmp_path / "run", **sections), report.append), report


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="requires two CUDA devices")
@pytest.mark.parametrize("parallel", [{"tp": 2}, {"pp": 2}], ids=str)
def test_cuda_graphs_on_two_gpus(parallel, files, tiny_hf, tmp_path):  # noqa: F811
    sections = {
        "model": {"path": str(tiny_hf("llama")), "tokenizer": files["tokenizer"], "cuda_graphs": True},
        "parallel": parallel,
        "batch": {"layout": "tree"},
    }
    report = []
    assert parity(config_of(files, tiny_hf("llama"), tmp_path / "run", **sections), report.append), report


@pytest.mark.parametrize("tool, files_written", [("torch", 1), ("memory", 1), ("nsys", 0)])
def test_each_profiler_runs_on_a_gpu(tool, files_written, files, tiny_hf, tmp_path):  # noqa: F811
    logging = {"profile": {"steps": [2, 2], "tool": tool}}
    config = config_of(files, tiny_hf("llama"), tmp_path / "run", train={"max_steps": 3}, logging=logging)
    assert len(train(config, tmp_path / "run")) == 3
    written = sorted((tmp_path / "run").glob("profile/*"))
    assert len(written) == files_written and all(path.stat().st_size > 1000 for path in written)
    if tool == "torch":
        events = json.loads(written[0].read_text())["traceEvents"]
        assert {"kernel", "user_annotation"} <= {event.get("cat") for event in events}
