"""Tests of the platform: patches for the CPU, device properties, parallel dimensions, and operations on the CPU.

Other tests in this file cover process groups, errors that occur on only one rank, and the store that ranks share.
"""

import datetime
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed as dist

from dpo_engine.errors import ConfigError, DataError
from dpo_engine.platform import device, host, host_operations
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.platform.parallel import close_groups, open_groups
from dpo_engine.testing.ranks import run_ranks

CHECK_IMPORT = """
import torch
before = {name: getattr(torch, name) for name in ("zeros", "empty", "tensor")}
to, current = torch.Tensor.to, torch.cuda.current_device
import dpo_engine.platform.host, dpo_engine.platform.device, dpo_engine.platform.parallel
assert all(getattr(torch, name) is value for name, value in before.items())
assert torch.Tensor.to is to and torch.cuda.current_device is current
import sys
assert not any(name.split(".")[0] == "megatron" for name in sys.modules), "megatron was imported"
"""


def test_importing_patches_nothing():
    subprocess.run([sys.executable, "-c", CHECK_IMPORT], check=True)


def test_every_replaced_name_exists():
    for row in host.replacements():
        owner, name = host.resolve(row.target)
        assert row.missing_ok or hasattr(owner, name), row.target
        assert row.reason


def test_installed_host_maps_cuda_to_the_cpu():
    host.install()
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    assert torch.ones(1).to("cuda:3").device.type == "cpu"
    assert torch.ones(1).cuda().type() == "torch.cuda.FloatTensor"
    with torch.device("meta"):
        assert torch.empty(3).device.type == "meta", "torch.device contexts must still apply to patched functions"
    installed = torch.zeros
    host.install()
    assert torch.zeros is installed, "a second call must not wrap the functions again"
    with pytest.raises(RuntimeError, match="pinned memory"):
        torch.empty(1, pin_memory=True)


def open_twice():
    """Open the groups of 4 ranks with tp 2, close them, and open them again.

    Returns a dictionary and a sum. The dictionary says, for pairs of groups, whether both groups are the same object.
    The sum is computed in the group `tp` that was opened last. It adds the rank numbers of this group.
    """
    dims = ParallelDims(tp=2, world=4)
    platform = device.open_platform(deterministic=True)
    groups = open_groups(dims, platform, seed=1, timeout_s=60)
    same = {
        "dp and dp_cp": groups.dp is groups.dp_cp,
        "tp and dp": groups.tp is groups.dp,
    }
    close_groups()
    store = dist.FileStore(os.environ["SECOND_STORE"], 4)
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=4)
    again = open_groups(dims, platform, seed=1, timeout_s=60)
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total, group=again.tp)
    return same | {"first and second": groups.tp is again.tp}, total.item()


def test_groups_of_the_same_ranks_are_one_group(tmp_path, monkeypatch):
    monkeypatch.setenv("SECOND_STORE", str(tmp_path / "store"))
    same = {"dp and dp_cp": True, "tp and dp": False, "first and second": False}
    assert run_ranks(open_twice, 4) == [(same, 1.0), (same, 1.0), (same, 5.0), (same, 5.0)]


def test_missing_target_is_an_error(monkeypatch):
    gone = host.Replacement("torch.no_such_name", None, "a reason")
    monkeypatch.setattr(host, "replacements", lambda: [gone])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(AttributeError, match="torch.no_such_name: missing in the installed version"):
        host.install()


def test_dtype_follows_the_platform():
    cpu = device.Platform(torch.device("cpu"), "gloo", gpu=False)
    gpu = device.Platform(torch.device("cuda", 0), "nccl", gpu=True)
    assert cpu.dtype("auto") is torch.float32 and gpu.dtype("auto") is torch.bfloat16
    assert cpu.dtype("bf16") is torch.bfloat16 and gpu.dtype("fp32") is torch.float32


@pytest.mark.parametrize(
    "files, state",
    [({}, "absent"), ({"optimizers/__init__.py": ""}, "nvidia"), ({"__init__.py": "raise RuntimeError"}, "foreign")],
)
def test_apex_is_recognized(tmp_path, monkeypatch, files, state):
    for name, text in files.items():
        path = tmp_path / "apex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if files and "__init__.py" not in files:
        (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)
    assert device.apex_state().split()[0] == state


class Arch:
    model_type, num_layers, num_attention_heads, num_kv_heads = "llama", 6, 12, 4
    hidden_size, ffn_hidden_size, vocab_size = 48, 96, 515
    whole_qk_norm, experts = False, None


def test_parallel_sizes_multiply_to_the_world_size():
    assert ParallelDims(tp=2, pp=2, cp=2, world=24).dp == 3
    with pytest.raises(ConfigError, match=r"tp=2 x pp=3 x cp=1 = 6 must divide the number of ranks, 8"):
        ParallelDims(tp=2, pp=3, world=8)


def test_norm_over_all_key_heads_needs_whole_heads_on_each_rank(monkeypatch):
    monkeypatch.setattr(Arch, "num_kv_heads", 2)
    assert ParallelDims(tp=4, world=4).problems(Arch) == []
    monkeypatch.setattr(Arch, "whole_qk_norm", True)
    assert ParallelDims(tp=4, world=4).problems(Arch) == [
        "parallel.tp=4: must divide model.num_kv_heads=2, because the norm of keys covers all key heads; use 1 or 2"
    ]
    assert ParallelDims(tp=2, world=2).problems(Arch) == []


def test_all_impossible_splits_are_reported_at_once():
    problems = ParallelDims(tp=5, pp=4, world=20).problems(Arch)
    assert problems[0] == "parallel.tp=5: must divide model.num_attention_heads=12; use 1, 2, 3, 4, 6 or 12"
    assert any(p.startswith("parallel.pp=4: must divide model.num_layers=6; use 1, 2, 3 or 6") for p in problems)
    assert ParallelDims(tp=2, pp=3, vpp=2, world=6).problems(Arch) == []
    assert "parallel.vpp=2: requires parallel.pp >= 2, but it is 1; remove parallel.vpp" in (
        ParallelDims(vpp=2, world=1).problems(Arch)
    )
    assert "parallel.ep=2: model type llama has no experts; use 1" in ParallelDims(ep=2, world=2).problems(Arch)


@pytest.mark.parametrize("tp, cp, sp, expected", [(1, 1, False, 1), (4, 1, True, 4), (2, 2, True, 8), (2, 4, False, 8)])
def test_sequence_multiple(tp, cp, sp, expected):
    assert ParallelDims(tp=tp, cp=cp, world=tp * cp).sequence_multiple(sp) == expected


def test_padded_vocabulary():
    assert ParallelDims().padded_vocab(515) == 520
    assert ParallelDims(tp=4, world=4).padded_vocab(515) == 544


def fails_on_rank_one():
    from torch import distributed as dist

    from dpo_engine.platform.parallel import together

    def work():
        if dist.get_rank() == 1:
            raise DataError("pairs.jsonl:3: not JSON")
        return dist.get_rank()

    try:
        together(dist.group.WORLD, work)
    except DataError as error:
        return str(error)


def test_ranks_exit_together():
    from dpo_engine.testing.ranks import run_ranks

    assert run_ranks(fails_on_rank_one, 3) == ["pairs.jsonl:3: not JSON"] * 3


def smallest_memory():
    from torch import distributed as dist

    device.gpu_memory = lambda: (80, 40, 60)[dist.get_rank()] * 2**30
    return [device.device_memory(device.Platform(host.CPU, "gloo", gpu), dist.group.WORLD) for gpu in (True, False)]


def test_device_memory_is_that_of_the_smallest_gpu():
    from dpo_engine.testing.ranks import run_ranks

    assert run_ranks(smallest_memory, 3) == [[40 * 2**30, None]] * 3


def crashes_on_rank_one():
    from torch import distributed as dist

    from dpo_engine.errors import EngineError
    from dpo_engine.platform.parallel import together

    def work():
        if dist.get_rank() == 1:
            raise ZeroDivisionError("a bug")

    try:
        together(dist.group.WORLD, work)
    except (EngineError, ZeroDivisionError) as error:
        return type(error).__name__, str(error)


def test_exception_on_one_rank_does_not_hang_the_others():
    from dpo_engine.testing.ranks import run_ranks

    others, own = run_ranks(crashes_on_rank_one, 2)
    assert own == ("ZeroDivisionError", "a bug")
    assert others == ("PeerError", "rank 1 died: ZeroDivisionError: a bug")


@pytest.mark.parametrize("m, k, n", [(257, 64, 131), (1024, 256, 96), (40, 40, 40), (0, 8, 9), (8, 0, 9)])
def test_matrix_products_of_any_memory_layout(m, k, n):
    def strided(rows, columns):
        whole = torch.randn(rows, columns)
        yield whole
        yield torch.randn(columns, rows).T
        yield torch.randn(2 * rows, columns)[::2]
        yield torch.randn(rows, 2 * columns)[:, :columns]
        yield torch.randn(rows, 2 * columns)[:, ::2]
        yield torch.randn(rows, 1).expand(rows, columns)

    for left in strided(m, k):
        for right in strided(k, n):
            expected = left.contiguous().double().numpy() @ right.contiguous().double().numpy()
            got = host_operations.product(left, right)
            assert got.shape == (m, n)
            torch.testing.assert_close(got.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-4)


def test_matrix_products_of_other_dtypes():
    left, right = torch.randn(300, 100), torch.randn(100, 300)
    expected = left.double() @ right.double()
    torch.testing.assert_close(host_operations.product(left.double(), right.double()), expected, rtol=1e-12, atol=1e-12)
    got = host_operations.product(left.bfloat16(), right.bfloat16())
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=5e-2, atol=5e-1)


PROFILE_PRODUCTS = """
import torch
from torch.profiler import ProfilerActivity, profile
from dpo_engine.platform.device import open_platform
from dpo_engine.platform.host_operations import mkl_is_slow
open_platform(deterministic=True)
weight = torch.randn(256, 256, requires_grad=True)
with profile(activities=[ProfilerActivity.CPU]) as seen:
    (torch.randn(2, 128, 256) @ weight).square().sum().backward()
names = [event.name for event in seen.events()]
print(mkl_is_slow(), names.count("mkldnn::_linear_pointwise"))
"""


@pytest.mark.slow
def test_onednn_multiplies_only_where_mkl_is_slow():
    command = [sys.executable, "-W", "ignore", "-c", PROFILE_PRODUCTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout in ("True 2\n", "False 0\n"), done.stderr


@pytest.mark.parametrize("maker, expected", [("GenuineIntel", False), ("AuthenticAMD", True)])
def test_onednn_is_chosen_on_amd_processors(maker, expected, monkeypatch):
    monkeypatch.setattr(host_operations.Path, "read_text", lambda *_, **__: f"vendor_id\t: {maker}\n")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert host_operations.mkl_is_slow() is expected
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not host_operations.mkl_is_slow()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_accumulates_in_fp32(dtype):
    inputs, grad = torch.randn(7, 3, dtype=dtype), torch.randn(7, 5, dtype=dtype)
    before = torch.randn(5, 3)
    main_grad = before.clone()
    host_operations.WeightGradients.wgrad_gemm_accum_fp32(inputs, grad, main_grad)
    expected = before + sum(torch.outer(g, i) for g, i in zip(grad.float(), inputs.float(), strict=True))
    torch.testing.assert_close(main_grad, expected, rtol=1e-5 if dtype is torch.float32 else 2e-2, atol=5e-2)


def test_peaks_follow_from_the_hardware():
    """Peak dense bf16 FLOP/s = number of multiprocessors x FLOP per multiprocessor and clock cycle x boost clock.

    The value of the B200 follows from the published sparse FP8 peak of 8 GPUs.
    """
    from dpo_engine.platform.device import DENSE_BF16_FLOPS

    peaks = {"A100": 108 * 2048 * 1.41e9, "H100": 132 * 4096 * 1.83e9, "H200": 132 * 4096 * 1.83e9}
    peaks["B200"] = 72e15 / 8 / 2 / 2  # FP8 has twice the FLOP/s of bf16, and structured sparsity doubles them again
    assert pytest.approx(peaks, rel=0.01) == DENSE_BF16_FLOPS


@pytest.mark.parametrize("hosted, prefix", [("True", "dpo_engine/start_3"), ("False", "dpo_engine/start_0")])
def test_only_a_store_of_torchrun_outlives_a_restart(hosted, prefix, monkeypatch):
    from torch import distributed as dist

    from dpo_engine.platform.parallel import meet

    shared = dist.HashStore()
    monkeypatch.setattr(dist, "TCPStore", lambda *place, **options: shared)
    for name, value in {"TORCHELASTIC_USE_AGENT_STORE": hosted, "TORCHELASTIC_RESTART_COUNT": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    meet(1, datetime.timedelta(seconds=1)).set("key", "value")
    assert shared.check([f"{prefix}/key"])


@pytest.mark.parametrize("kv_heads, fits", [(1, True), (2, True), (4, True), (8, True), (3, False), (6, False)])
def test_tensor_parallel_ranks_may_share_key_value_heads(kv_heads, fits):
    sizes = {"num_attention_heads": 24, "ffn_hidden_size": 96, "hidden_size": 96, "num_layers": 2}
    arch = types.SimpleNamespace(**sizes, num_kv_heads=kv_heads, whole_qk_norm=False, model_type="llama", experts=None)
    assert (ParallelDims(tp=4, world=4).problems(arch) == []) == fits


COMPILING = """
import os, torch
from dpo_engine.platform import device
device.gpu_present = lambda: True
torch.cuda.device_count, torch.cuda.set_device = lambda: 1, lambda index: None
assert device.open_platform(deterministic=False).gpu
from torch._inductor import config
print(config.compile_threads, os.environ["CUDA_DEVICE_MAX_CONNECTIONS"])
"""


@pytest.mark.parametrize(
    "asked, threads",
    [({}, "1"), pytest.param({"TORCHINDUCTOR_COMPILE_THREADS": "3"}, "3", marks=pytest.mark.slow)],
)
def test_a_rank_on_a_gpu_starts_no_processes_to_compile_by_default(asked, threads):
    environment = {name: value for name, value in os.environ.items() if "INDUCTOR" not in name} | asked
    found = subprocess.run([sys.executable, "-c", COMPILING], env=environment, capture_output=True, text=True)
    assert found.stdout.split() == [threads, "1"], found.stderr
