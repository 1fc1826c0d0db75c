"""Attention from packages besides torch: Transformer Engine, and FlashAttention 3 and 4.

**Transformer Engine** is the kernel backend ``te`` for rows of trees (prompts, each followed by its responses). The
queries of a row are divided into runs. Each run is computed as a causal row, and the lengths of these causal rows
differ (:mod:`dpo_kernels.varlen`). In Transformer Engine, the format of causal rows of different lengths is called
``thd``. The module DotProductAttention computes these rows with cuDNN. If a package of flash attention is installed,
the module may prefer that package on some GPUs. For cuDNN, Transformer Engine rounds the numbers of rows and tokens up,
so a few execution plans suffice for all micro-batches of a training run.

**FlashAttention 3 or 4** replaces FlashAttention 2 inside torch: in stacked rows, and in rows of trees with the backend
``varlen``.

The heads, dtypes and GPUs that a package supports depend on its version. A requested package is therefore tried once,
with a small tree and the heads of one tensor-parallel rank, before the engine loads weights.
"""

from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.attention import causal
from dpo_engine.platform.device import Platform
from dpo_kernels import BACKENDS, Tree, register_backend
from dpo_kernels.varlen import WIDEST_HEAD, Copies, attention_in_runs
from dpo_kernels.varlen import tree_attention as tree_attention_in_varlen

TE = "te"


def offer_te(
    spec: str, arch: Architecture, platform: Platform, dtype: torch.dtype, needs: Collection[str], *, tp: int
) -> None:
    """Register the kernel backend ``te`` after it has computed a small tree.

    spec   layer implementation: ``native`` or ``te``
    needs  options of ``tree_attention`` that the model's layers use
    tp     number of ranks of tensor parallelism

    Raises :class:`~dpo_engine.errors.ConfigError` if the layers are not Transformer Engine's, or if Transformer Engine
    cannot compute the small tree, for example because it has no fused attention for the dtype, the heads, the window or
    the GPU.
    """
    if spec != "te":
        raise ConfigError(
            f"model.attention={TE}: requires Transformer Engine's layers, but this run uses {spec} layers; set "
            "model.spec=te, or model.attention=auto"
        )
    who = f"model.attention={TE}: Transformer Engine"
    _try(who, tree_attention, arch, platform, dtype, [name for name in needs if name == "window"], tp)
    if TE not in BACKENDS:
        register_backend(TE, TransformerEngine)


def activate_flash_attention(
    version: int,
    arch: Architecture,
    platform: Platform,
    dtype: torch.dtype,
    needs: Collection[str],
    *,
    tp: int,
    varlen: bool,
) -> None:
    """Make torch use FlashAttention 3 or 4 in this process, and check that it can compute small rows.

    On some GPUs, torch prefers cuDNN's attention, unless kernels must be deterministic. cuDNN's attention is therefore
    turned off.

    needs   options of ``tree_attention`` that the model's layers use
    tp      number of ranks of tensor parallelism
    varlen  whether the backend ``varlen`` computes rows of trees

    Raises :class:`~dpo_engine.errors.ConfigError` if there is no GPU, if this version of torch does not support the
    package, if the package is not installed, or if the package does not support the dtype, the heads or the GPU. With
    ``varlen``, the error is also raised if the package does not support the windows or sinks in ``needs``.
    """
    line = f"model.flash_attention={version}: "
    if not platform.gpu:
        raise ConfigError(f"{line}requires a GPU, but this machine has none; set the key to 2")
    if dtype is not torch.bfloat16:
        raise ConfigError(f"{line}requires weights in bf16, but they are in {dtype}; set the key to 2")
    if arch.head_dim > WIDEST_HEAD:
        raise ConfigError(
            f"{line}flash attention supports heads of at most {WIDEST_HEAD} dimensions; here, the head size is "
            f"{arch.head_dim}; set the key to 2"
        )
    from torch.nn import attention

    if f"FA{version}" not in getattr(attention, "list_flash_attention_impls", list)():
        raise ConfigError(
            f"{line}torch {torch.__version__} does not support this version of FlashAttention; set the key to 2"
        )
    try:
        attention.activate_flash_attention_impl(f"FA{version}")
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"{line}the package of FlashAttention {version} cannot be loaded: {error}; install the package, or set the "
            "key to 2"
        ) from error
    torch.backends.cuda.enable_cudnn_sdp(False)
    who = f"{line}FlashAttention {version}"
    _try(who, _causal_row, arch, platform, dtype, (), tp)
    if varlen:
        _try(who, tree_attention_in_varlen, arch, platform, dtype, needs, tp)


def _causal_row(query: Tensor, key: Tensor, value: Tensor, tree: Tree) -> Tensor:
    """Compute attention over the tree's tokens as if they were one causal row."""
    return causal(*(tensor[:, None] for tensor in (query, key, value)), scale=None)[:, 0]


def _try(
    who: str,
    attention: Callable[..., Tensor],
    arch: Architecture,
    platform: Platform,
    dtype: torch.dtype,
    needs: Collection[str],
    tp: int,
) -> None:
    """Compute the attention of a small tree and its gradients; raise ``ConfigError`` if that fails.

    needs  options that the model's layers use; only ``window`` and ``sinks`` are tried. With ``window``, attention is
           computed twice: without a window, and with one
    """
    pair = Tree.of([2, 1, 1], [-1, 0, 0])
    heads, kv_heads = arch.num_attention_heads // tp, max(arch.num_kv_heads // tp, 1)
    inputs = [
        torch.zeros(pair.n, count, arch.head_dim, dtype=dtype, device=platform.device, requires_grad=True)
        for count in (heads, kv_heads, kv_heads)
    ]
    options = {"sinks": inputs[0].new_zeros(heads, requires_grad=True)} if "sinks" in needs else {}
    try:
        for window in ({}, {"window": 2}) if "window" in needs else ({},):
            attention(*inputs, pair, **options, **window).sum().backward()
    except Exception as error:  # packages raise errors of any class
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"{who} cannot compute this model's attention: {reason}; set the key to another value"
        ) from error


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Tree,
    scale: float | None = None,
    *,
    window: int | None = None,
) -> Tensor:
    """Like :func:`dpo_kernels.eager.tree_attention`, but with Transformer Engine, and without soft caps and sinks."""
    return attention_in_runs(_te_causal_rows, query, key, value, tree, scale, window)


class TransformerEngine:
    """The functions of the kernel backend ``te``."""

    tree_attention = staticmethod(tree_attention)


def _te_causal_rows(
    query: Tensor, key: Tensor, value: Tensor, copies: Copies, scale: float, window: int | None
) -> Tensor:
    out = _te_module(query.shape[1], key.shape[1], query.shape[2], scale, window)(
        query,
        key,
        value,
        cu_seqlens_q=copies.query_ends,
        cu_seqlens_kv=copies.key_ends,
        max_seqlen_q=copies.queries,
        max_seqlen_kv=copies.seen,
    )
    return out.view(query.shape)


@lru_cache(maxsize=64)
def _te_module(heads: int, kv_heads: int, head_dim: int, scale: float, window: int | None) -> Any:
    """Return Transformer Engine's attention for causal rows. The last query of a row sees the row's last key."""
    from transformer_engine.pytorch import DotProductAttention

    attention = DotProductAttention(
        heads,
        head_dim,
        num_gqa_groups=kv_heads,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
        window_size=(-1 if window is None else window - 1, 0),
        softmax_scale=scale,
    )
    attention.unfused_attention = _Refused()  # unfused kernels would store all scores
    return attention


class _Refused(nn.Module):
    def forward(self, *args: Any, **options: Any) -> Tensor:
        raise RuntimeError("there is no fused kernel for it")
