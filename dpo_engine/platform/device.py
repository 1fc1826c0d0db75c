"""Determine the device, communication backend, default dtype and optional libraries of a rank."""

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dpo_engine.platform.host_operations import mkl_is_slow
from dpo_engine.platform.launcher import local_rank
from dpo_engine.platform.torchrun import describe_limit

GPU_SETTINGS = {
    # Megatron relies on a single hardware queue, so that communication starts in the order in which it was enqueued.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Sequence lengths vary from step to step. With segments of fixed size, about 14% of the reserved memory would be
    # unused.
    "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
    # By default, NCCL registers the buffers of each collective that a CUDA graph captures. This is unsafe with
    # expandable segments.
    "NCCL_GRAPH_REGISTER": "0",
}
"""Environment variables that CUDA, torch and NCCL read when they first use the GPU. Values set by the user are kept."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Platform:
    """The device and backend of a rank. ``gpu`` is false on the host platform, which uses the CPU and gloo."""

    device: torch.device
    backend: str
    gpu: bool

    def dtype(self, asked: str) -> torch.dtype:
        """Return the parameter dtype for ``model.dtype=asked``; ``auto`` means bf16 on a GPU and fp32 on the CPU."""
        return DTYPES[("bf16" if self.gpu else "fp32") if asked == "auto" else asked]

    def synchronize(self) -> None:
        """Wait until the GPU has finished all queued work; without a GPU, do nothing."""
        if self.gpu:
            torch.cuda.synchronize()


def gpu_present() -> bool:
    """Whether this process can use a CUDA device. If not, it uses the host platform."""
    return torch.cuda.is_available()


def open_platform(*, deterministic: bool, own_stream: bool = False) -> Platform:
    """Choose this rank's device and prepare Megatron-Core for it.

    deterministic   whether to use torch's deterministic kernels; with them, two runs with the same layout and seed have
                    bitwise identical losses
    own_stream      whether this thread uses a CUDA stream of its own from now on. CUDA graphs require this, because
                    work on the default stream cannot be recorded. The stream must be set before DDP is
                    created: autograd runs the backward pass of an operation on the stream of its forward pass, and
                    adds up a parameter's gradient on the stream on which DDP first saw the parameter

    On a GPU, nothing is patched. Without a GPU, this function calls :func:`dpo_engine.platform.host.install`, which no
    other function of the engine calls.
    """
    # Megatron logs deprecations and defaults on every rank. It reports errors as exceptions, so nothing important is
    # lost.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Strict: an operation without a deterministic kernel raises an error, and attention chooses a deterministic
        # kernel. With warn_only, torch would choose cuDNN's attention, which is not deterministic.
        torch.use_deterministic_algorithms(True)
        # By default, deterministic mode also fills every new buffer. This costs an extra write of the whole buffer, and
        # helps only with debugging.
        torch.utils.deterministic.fill_uninitialized_memory = False
    if gpu_present():
        for name, value in GPU_SETTINGS.items():
            os.environ.setdefault(name, value)
        if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
            # A step has a few small compiled kernels. Starting a pool of processes on each rank would take longer than
            # compiling these kernels, and a run must not wait for such processes when it ends.
            importlib.import_module("torch._inductor.config").compile_threads = 1
        index = local_rank() % torch.cuda.device_count()
        torch.cuda.set_device(index)
        if own_stream:
            torch.cuda.set_stream(torch.cuda.Stream())
        return Platform(torch.device("cuda", index), "nccl", gpu=True)
    from dpo_engine.platform import host

    with warnings.catch_warnings():  # Megatron warns about each missing GPU library; describe_stack reports them anyway
        warnings.simplefilter("ignore")
        host.install()
    return Platform(host.CPU, "gloo", gpu=False)


def gpu_memory() -> int:
    """Return the total memory of this process's GPU in bytes."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def device_memory(platform: Platform, world: dist.ProcessGroup) -> int | None:
    """Return the total memory in bytes of the smallest GPU of all ranks; None without GPUs.

    *Collectives*: on a GPU, one MIN over ``world``.
    """
    if not platform.gpu:
        return None
    smallest = torch.tensor(gpu_memory(), dtype=torch.int64, device=platform.device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=world)
    return int(smallest)


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed; it works only on a GPU."""
    return importlib.util.find_spec("transformer_engine") is not None


def apex_state() -> str:
    """Return which package named apex is installed: ``nvidia``, ``absent``, or ``foreign`` (unrelated, from PyPI).

    If importing the package fails, the result is ``foreign`` with the type of the exception.
    """
    if importlib.util.find_spec("apex") is None:
        return "absent"
    try:
        nvidia = importlib.util.find_spec("apex.optimizers") is not None
    except Exception as failure:  # PyPI's apex runs setup code on import and may raise anything
        return f"foreign ({type(failure).__name__} on import)"
    return "nvidia" if nvidia else "foreign"


def describe_stack(platform: Platform) -> list[str]:
    """Return log lines with library versions and with the implementations of Adam and gradient fusion.

    Gradient fusion means that linear layers add weight gradients directly to ``main_grad``. Without a GPU, the lines
    also name the implementation of matrix products. Further lines report a package ``apex`` that is not NVIDIA's, and a
    short time limit of torchrun.
    """
    te, apex = has_transformer_engine() and platform.gpu, apex_state()
    adam = "Transformer Engine" if te else "Apex" if apex == "nvidia" and platform.gpu else "torch"
    fusion = ("on (Apex)" if platform.gpu else "on (host)") if gradient_fusion(platform) else "off"
    products = "" if platform.gpu else f"; matrix products: {'oneDNN' if mkl_is_slow() else 'torch'}"
    lines = [
        f"platform: {platform.device.type} over {platform.backend}; torch {torch.__version__}, "
        f"megatron-core {importlib.metadata.version('megatron-core')}{products}",
        f"Transformer Engine: {'present' if te else 'unused' if has_transformer_engine() else 'absent'}; Apex: {apex}; "
        f"Adam: {adam}; weight-gradient accumulation fusion: {fusion}",
    ]
    if apex.startswith("foreign"):
        lines.append(
            "the installed package `apex` is not NVIDIA's Apex and is not used (the base image contains NVIDIA's Apex)"
        )
    return lines + describe_limit()


def gradient_fusion(platform: Platform) -> bool:
    """Whether linear layers can add weight gradients directly to ``main_grad``.

    On a GPU this requires Apex's extension; on the CPU, the host platform provides a replacement.
    """
    return not platform.gpu or importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


DENSE_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12}


def peak_flops(platform: Platform, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of dense bf16 matrix products on this GPU, according to its data sheet.

    Return ``None`` without a GPU, for a GPU that is not in :data:`DENSE_BF16_FLOPS`, and for dtypes other than bf16.
    """
    if not platform.gpu or dtype is not torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(platform.device)
    return next((peak for model, peak in DENSE_BF16_FLOPS.items() if model in name), None)
