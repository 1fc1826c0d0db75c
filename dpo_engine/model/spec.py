"""Layer specs, which tell Megatron what modules a layer consists of.

A layer consists of Megatron's own modules with our norm and attention, or of Transformer Engine's modules, which also
have our attention if the model computes rows of trees.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor, nn

from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.attention import CoreAttention
from dpo_engine.model.last_layer import LastLayer
from dpo_engine.platform.device import Platform, has_transformer_engine
from dpo_engine.platform.host_operations import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with Megatron's constructor arguments.

    Megatron's own torch norm does not support sequence parallelism, in which each rank normalizes only its share of the
    tokens. The gradient of the weight must then be summed over the tensor-parallel group. Megatron does this for
    parameters with the attribute ``sequence_parallel``.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **megatron: Any):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., h]. The result has the same shape and dtype."""
        if x.device.type == "cpu":
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def choose_spec(asked: str, platform: Platform, dtype: torch.dtype) -> str:
    """Resolve ``model.spec`` to ``native`` or ``te``; ``auto`` means ``te`` if Transformer Engine can be used.

    Raises :class:`ConfigError` if ``te`` is requested but cannot be used.
    """
    lack = (
        "this machine has no GPU"
        if not platform.gpu
        else "Transformer Engine is not installed"
        if not has_transformer_engine()
        else "Transformer Engine does not support fp64"
        if dtype is torch.float64
        else None
    )
    if asked == "te" and lack:
        raise ConfigError(f"model.spec='te': {lack}; set 'native' or 'auto'")
    return asked if asked != "auto" else "native" if lack else "te"


def layer_spec(arch: Architecture, kind: str, *, trees: bool, adapted: bool = False) -> ModuleSpec:
    """Return the spec of one layer. Rows of trees need our core attention with both kinds, ``native`` and ``te``.

    adapted  whether linears will have adapters. They need the output of the norm, which Transformer Engine's fused
             norms and linears keep to themselves
    """
    if kind == "te":
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=arch.qk_norm)
        if trees:
            spec.submodules.self_attention.submodules.core_attention = CoreAttention
        if adapted:
            from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

            spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = TENorm
            spec.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
            _mlp(spec).linear_fc1 = TEColumnParallelLinear
        return spec
    spec = get_gpt_layer_local_spec(qk_layernorm=arch.qk_norm)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = CoreAttention
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def _mlp(spec: ModuleSpec) -> Any:
    """Return the submodules of a layer's MLP, whose spec is a partial function in newer versions of Megatron-Core."""
    mlp = spec.submodules.mlp
    return mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]


def stage_spec(
    arch: Architecture,
    kind: str,
    config: Any,
    *,
    vp_stage: int | None,
    pp_rank: int,
    trees: bool = False,
    adapted: bool = False,
    last: bool = False,
) -> Any:
    """Return the spec of the layers and the final norm in one model chunk, as GPTModel takes it.

    trees    whether the model will run rows of trees
    adapted  whether linears will have adapters
    last     whether the chunk contains the model's last layer
    """
    if kind == "te":
        from megatron.core.extensions.transformer_engine import TENorm as final_norm
    else:
        final_norm = RMSNorm
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    layers = [layer_spec(arch, kind, trees=trees, adapted=adapted) for _ in range(count)]
    if trees and last:
        layers[-1].module = LastLayer
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)
