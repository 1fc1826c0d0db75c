"""The platform of a rank: its device, communication backend, default dtype and optional libraries."""

import importlib.metadata
import importlib.util
import logging
import os
import warnings
from dataclasses import dataclass

import torch

from dpo_engine.platform.host_operations import mkl_is_slow

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Platform:
    """The device and backend of a run. ``gpu`` is false on the host platform (CPU, Megatron-Core over gloo)."""

    device: torch.device
    backend: str
    gpu: bool

    def dtype(self, asked: str) -> torch.dtype:
        """Return the parameter dtype for ``model.dtype``; ``auto`` is bf16 on a GPU and fp32 on the host."""
        return DTYPES[("bf16" if self.gpu else "fp32") if asked == "auto" else asked]

    def synchronize(self) -> None:
        """Wait until the GPU has finished all queued work; does nothing on the host."""
        if self.gpu:
            torch.cuda.synchronize()


def local_rank() -> int:
    """Return this process's index on its node, from torchrun (``LOCAL_RANK``) or srun (``SLURM_LOCALID``), else 0."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def gpu_present() -> bool:
    """Whether this process can use a CUDA device; if not, the host platform is used."""
    return torch.cuda.is_available()


def open_platform(*, deterministic: bool) -> Platform:
    """Choose this rank's device and prepare Megatron-Core for it.

    deterministic   use torch's deterministic kernels (same layout and seed: bitwise the same losses)

    On a GPU nothing is patched. On the host this calls :func:`dpo_engine.platform.host.install`, its only caller.
    """
    # Megatron logs deprecations and defaults on every rank. Its errors are exceptions, so nothing important is lost.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Deterministic mode would otherwise fill every new buffer, a debugging aid that costs a pass over memory.
        torch.utils.deterministic.fill_uninitialized_memory = False
    if gpu_present():
        index = local_rank() % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return Platform(torch.device("cuda", index), "nccl", gpu=True)
    from dpo_engine.platform import host

    with warnings.catch_warnings():  # Megatron warns about each missing GPU library; describe_stack logs them
        warnings.simplefilter("ignore")
        host.install()
    return Platform(host.CPU, "gloo", gpu=False)


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed; it works only on a GPU."""
    return importlib.util.find_spec("transformer_engine") is not None


def apex_state() -> str:
    """Return ``"nvidia"``, ``"absent"``, or ``"foreign"`` for PyPI's unrelated package named apex."""
    if importlib.util.find_spec("apex") is None:
        return "absent"
    try:
        nvidia = importlib.util.find_spec("apex.optimizers") is not None
    except Exception as failure:  # PyPI's apex runs setup code on import and may raise anything
        return f"foreign ({type(failure).__name__} on import)"
    return "nvidia" if nvidia else "foreign"


def describe_stack(platform: Platform) -> list[str]:
    """Return log lines with library versions and the Adam, matrix product and gradient fusion kernels in use."""
    te, apex = has_transformer_engine() and platform.gpu, apex_state()
    adam = "Transformer Engine" if te else "Apex" if apex == "nvidia" and platform.gpu else "torch"
    fusion = ("on (Apex)" if platform.gpu else "on (host)") if gradient_fusion(platform) else "off"
    products = "" if platform.gpu else f"; matrix products: {'oneDNN' if mkl_is_slow() else 'torch'}"
    lines = [
        f"platform: {platform.device.type} over {platform.backend}; torch {torch.__version__}, "
        f"megatron-core {importlib.metadata.version('megatron-core')}{products}",
        f"Transformer Engine: {'present' if te else 'absent'}; Apex: {apex}; "
        f"Adam: {adam}; weight-gradient accumulation fusion: {fusion}",
    ]
    if apex.startswith("foreign"):
        lines.append(
            "the installed package `apex` is not NVIDIA's and is not used (NVIDIA's comes with the base image)"
        )
    return lines


def gradient_fusion(platform: Platform) -> bool:
    """Whether linear layers can accumulate weight gradients into ``main_grad``, by Apex's extension or the host's."""
    return not platform.gpu or importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


DENSE_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12}


def peak_flops(device: torch.device) -> float | None:
    """Return this GPU's dense bf16 FLOP/s from its data sheet, or ``None`` if the GPU is not listed here."""
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in DENSE_BF16_FLOPS.items() if model in name), None)
