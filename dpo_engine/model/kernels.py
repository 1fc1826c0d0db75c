"""Choose the kernel backends of a run."""

import inspect
from collections.abc import Collection

import torch

from dpo_engine.config.sections import ModelConfig
from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.attention_packages import TE, activate_flash_attention, offer_te
from dpo_engine.platform.device import Platform
from dpo_kernels import backend, backend_name, set_default, triton_can_run, use_backend
from dpo_kernels.varlen import WIDEST_HEAD


def choose_kernels(
    asked: dict[str, str],
    arch: Architecture,
    platform: Platform,
    dtype: torch.dtype,
    needs: Collection[str] = (),
    *,
    tp: int = 1,
    cp: int = 1,
    spec: str = "native",
    flash: int = 2,
) -> None:
    """Set the backend for each group of operations in this process.

    asked  ``model.attention`` and ``model.head``, by group. With ``auto``, a plugin or the environment variable
           ``DPO_KERNELS`` can choose the backend. If neither does, the group runs on its default (see below)
    needs  options of ``tree_attention`` that the model's layers use, from
           :func:`~dpo_engine.model.attention.attention_options`
    tp     number of ranks of tensor parallelism
    cp     number of ranks of context parallelism
    spec   layer implementation: ``native`` or ``te``. Only ``te`` can use Transformer Engine's attention
    flash  version of flash attention, ``model.flash_attention``

    The default of the group ``head`` is ``eager``. On a GPU, the default of the group ``layer`` (head splitting, rotary
    embedding, gated activation, norms) is ``triton`` if the package triton can run there and the dtype is not fp64. In
    all other cases, the default of ``layer`` is ``eager``. The default of the group ``attention`` is the first of these
    backends whose condition holds:

    triton  The default of ``layer`` is ``triton``, and the model has soft caps or ``cp`` is above 1. Flash attention
            does not support soft caps. A row of trees contains several prompts, each followed by its responses. With
            context parallelism, a rank's queries are separate blocks of such a row. For each block, ``varlen`` would
            make a copy of all keys that the block's queries see
    varlen  Flash attention supports the device, the dtype and the head size, and the model has no soft caps
    sdpa    No condition

    Raises :class:`~dpo_engine.errors.ConfigError` for a backend that is unknown or cannot be used on this machine. The
    same error is raised for a backend that does not support the dtype, the head size or an option that the model needs,
    and for a version of flash attention that cannot be used.
    """
    supported = platform.gpu and dtype is torch.bfloat16 and arch.head_dim <= WIDEST_HEAD
    fused = platform.gpu and dtype is not torch.float64 and triton_can_run()
    if fused and ("softcap" in needs or cp > 1):
        set_default("triton", "attention")
    else:
        set_default("varlen" if supported and "softcap" not in needs else "sdpa", "attention")
    set_default("triton" if fused else "eager", "layer")
    if asked["attention"] == TE:
        offer_te(spec, arch, platform, dtype, needs, tp=tp)
    if asked["attention"] == "varlen" and platform.gpu and not supported:
        raise ConfigError(
            f"model.attention=varlen: flash attention needs model.dtype=bf16 and heads of at most {WIDEST_HEAD} "
            f"dimensions; here, the dtype is {str(dtype).removeprefix('torch.')} and the head size is {arch.head_dim}; "
            "set model.attention=auto"
        )
    for group, name in asked.items():
        try:
            if name != "auto":
                use_backend(name, group)
            backend_name(group)
        except ValueError as error:
            raise ConfigError(f"model.{group}={name}: {error}") from error
    if "softcap" in needs and backend_name("attention") == "varlen":
        raise ConfigError(
            "model.attention=varlen: flash attention does not support a soft cap on attention scores, but "
            f"{arch.model_type} models have one; set model.attention=auto"
        )
    known = inspect.signature(backend("attention").tree_attention).parameters
    if lacking := [option for option in needs if option not in known]:
        raise ConfigError(
            f"model.attention={backend_name('attention')}: the backend's tree_attention has no argument named "
            f"{' or '.join(lacking)}, which the layers of this {arch.model_type} model need; use another backend"
        )
    if flash != 2:
        varlen = backend_name("attention") == "varlen"
        activate_flash_attention(flash, arch, platform, dtype, needs, tp=tp, varlen=varlen)


def require_effect(model: ModelConfig, arch: Architecture, spec: str, layout: str) -> None:
    """Check that a run uses the requested kernels, now that its layout is known.

    Raises :class:`~dpo_engine.errors.ConfigError` if ``model.attention`` is ``te`` but has no effect in this run, or if
    ``model.flash_attention`` is not 2 but has no effect in this run.
    """
    trees, rows = layout == "tree", f"{layout} rows of {arch.model_type} models"
    ours = trees or spec == "native" or not arch.plain_attention  # Transformer Engine computes all other rows itself
    if model.attention == TE and not ours:
        raise ConfigError(
            f"model.attention={TE}: has no effect in {rows}, because te layers compute these rows with Transformer "
            "Engine's attention anyway; remove the key"
        )
    name = backend_name("attention")
    if model.flash_attention != 2 and not (name in ("varlen", "sdpa") if trees else ours):
        kernels = f"model.attention={name}" if trees else "model.spec=te"
        raise ConfigError(
            f"model.flash_attention={model.flash_attention}: has no effect with {kernels} in {rows}; remove the key "
            "model.flash_attention"
        )


def trees_are_slow(platform: Platform) -> bool:
    """Whether attention in rows of trees is slow on this device with the backend in use.

    On a GPU, ``sdpa`` computes this attention in hundreds of small calls, and ``eager`` stores all attention scores.
    """
    return platform.gpu and backend_name("attention") in ("sdpa", "eager")
