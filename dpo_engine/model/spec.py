"""Layer specs, which tell Megatron the modules of each layer.

The forward pass of a layer is ours. A ``native`` layer consists of Megatron's own linear layers with our norm and
attention, and for some models with our experts. A ``te`` layer consists of Transformer Engine's modules. Our attention
replaces Transformer Engine's in the tree layout, and in models with windows, soft caps or sinks. Layers with experts
have our router, whether they are ``native`` or ``te``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import Architecture
from dpo_engine.model.attention import CoreAttention
from dpo_engine.model.cuda_graphs import graph_problems
from dpo_engine.model.experts import Router
from dpo_engine.model.fp8 import device_problem, fp8_line, fp8_model_problems
from dpo_engine.model.head_norms import head_norms_of
from dpo_engine.model.latent import LatentAttention
from dpo_engine.model.layer import Attention, LastLayer, Layer
from dpo_engine.model.local_experts import LocalExperts
from dpo_engine.model.norms import norm_of
from dpo_engine.model.tp_overlap import multicast_problem, overlap_line, overlap_model_problems
from dpo_engine.model.weights.freeze import freezes_some_experts
from dpo_engine.platform.device import Platform, has_transformer_engine
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.wording import show

NORMS = {"native": "torch", "te": "Transformer Engine"}


def choose_layers(
    config: Config, arch: Architecture, dims: ParallelDims, platform: Platform, dtype: torch.dtype
) -> str:
    """Resolve ``model.spec``, and check that the layers can use FP8, ``tp_comm_overlap`` and CUDA graphs, if requested.

    Returns  ``native`` or ``te``, like :func:`choose_spec`

    Raises :class:`ConfigError` if the layers, FP8, the overlap or graphs are requested but cannot be used.
    """
    if config.model.cuda_graphs and not platform.gpu:
        raise ConfigError("model.cuda_graphs=true: requires a GPU, but this machine has none; remove model.cuda_graphs")
    if problems := graph_problems(config, arch):
        raise ConfigError(problems)
    spec, asked = choose_spec(config.model.spec, arch, platform, dtype, config.optim.freeze), config.megatron
    names = [*(["fp8"] if asked.fp8_recipe else []), *(["tp_comm_overlap"] if asked.tp_comm_overlap else [])]
    if not names:
        return spec
    line = f"megatron.transformer.{names[0]}={show(asked.transformer[names[0]])}"
    if spec != "te":
        why = lack_of_transformer_engine(arch, platform, dtype, config.optim.freeze)
        raise ConfigError(f"{line}: requires Transformer Engine's layers, but {why}; remove {names[0]}")
    if dtype is not torch.bfloat16:
        raise ConfigError(f"{line}: requires weights in bf16, but they are in {dtype}; remove {names[0]}")
    problems = fp8_model_problems(config, arch, dims) + overlap_model_problems(config, arch, dims)
    if problems := problems or [*filter(None, [device_problem(config), multicast_problem(config)])]:
        raise ConfigError(problems)
    return spec


def describe_layers(config: Config, arch: Architecture, spec: str, dtype: str) -> str:
    """Describe the implementation and the precision of the layers for the log."""
    graphs = ", CUDA graphs before and after attention" if config.model.cuda_graphs else ""
    return f"layer spec {spec} ({NORMS[spec]} norms), {dtype}{fp8_line(config, arch)}{overlap_line(config)}{graphs}"


def choose_spec(
    asked: str, arch: Architecture, platform: Platform, dtype: torch.dtype, frozen: Sequence[str] = ()
) -> str:
    """Resolve ``model.spec``. ``auto`` means ``te`` if Transformer Engine can be used, else ``native``.

    frozen   patterns of frozen weights (``optim.freeze``)

    Raises :class:`ConfigError` if ``te`` is requested but cannot be used.
    """
    lack = lack_of_transformer_engine(arch, platform, dtype, frozen)
    if asked == "te" and lack:
        raise ConfigError(f"model.spec='te': {lack}; set 'native' or 'auto'")
    return asked if asked != "auto" else "native" if lack else "te"


def lack_of_transformer_engine(
    arch: Architecture, platform: Platform, dtype: torch.dtype, frozen: Sequence[str] = ()
) -> str | None:
    """Return the reason why Transformer Engine's layers cannot be used, or None; arguments as for `choose_spec`."""
    return (
        "this machine has no GPU"
        if not platform.gpu
        else "Transformer Engine is not installed"
        if not has_transformer_engine()
        else "Transformer Engine does not support fp64"
        if dtype is torch.float64
        else f"Transformer Engine's experts have neither the biases nor the activation of {arch.model_type} models"
        if arch.experts and arch.experts.special
        else f"Transformer Engine's layers do not support {arch.model_type} models"
        if not arch.suits_transformer_engine
        else "Transformer Engine trains all or none of a layer's experts, but optim.freeze freezes only some of them"
        if freezes_some_experts(frozen, arch)
        else None
    )


def layer_spec(
    arch: Architecture, kind: str, *, trees: bool, adapted: bool = False, experts: bool = False
) -> ModuleSpec:
    """Return the spec of one layer.

    Native layers always use our core attention. Transformer Engine layers use our core attention in two cases: if
    ``trees`` is set, and in models with windows, soft caps or sinks.

    trees    whether the model will run rows of trees (the tree layout). A tree is a prompt with its responses
    adapted  whether linears will have adapters. Adapters need the output of the norm, which Transformer Engine's fused
             modules do not return
    experts  whether the layer has experts
    """
    mixture: dict[str, Any] = {}
    if experts:
        mixture = {"num_experts": arch.experts.count, "moe_grouped_gemm": kind == "te"}
    if kind == "te":
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=arch.qk_norm, **mixture)
        spec.module, spec.submodules.self_attention.module = Layer, Attention
        if trees or not arch.plain_attention:
            spec.submodules.self_attention.submodules.core_attention = CoreAttention
        if adapted:
            from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

            spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = TENorm
            spec.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
            if not experts:  # with experts, the norm is never fused, because the router reads its output
                _mlp(spec).linear_fc1 = TEColumnParallelLinear
        if experts:
            _mlp(spec).router = Router
        return spec
    spec = get_gpt_layer_local_spec(qk_layernorm=arch.qk_norms, **mixture)
    if experts:
        _mlp(spec).router = Router
        if arch.experts.special:
            _mlp(spec).experts = LocalExperts
    spec.module, spec.submodules.self_attention.module = Layer, Attention
    spec.submodules.input_layernorm = norm_of(arch) if arch.pre_norms else IdentityOp
    spec.submodules.pre_mlp_layernorm = norm_of(arch) if arch.mlp_norm else IdentityOp
    if arch.latent:
        spec.submodules.self_attention = ModuleSpec(LatentAttention)
        return spec
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = CoreAttention
    attention.q_layernorm, attention.k_layernorm = head_norms_of(arch)
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
    """Return the spec of the layers and the final norm in one model chunk, in GPTModel's format.

    trees    whether the model will run rows of trees (the tree layout)
    adapted  whether linears will have adapters
    last     whether the chunk contains the model's last layer
    """
    if kind == "te":
        from megatron.core.extensions.transformer_engine import TENorm as final_norm
    else:
        final_norm = norm_of(arch)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    first, mixed = get_transformer_layer_offset(config, vp_stage, pp_rank), arch.layers("experts")
    layers = [
        layer_spec(arch, kind, trees=trees, adapted=adapted, experts=layer in mixed)
        for layer in range(first, first + count)
    ]
    if trees and last:
        layers[-1].module = LastLayer
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)
