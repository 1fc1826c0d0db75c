"""FP8 matrix products in the linear layers of Transformer Engine: the settings, and what they require.

Problem. A GPU multiplies FP8 numbers twice as fast as bf16 numbers. But FP8 has a mantissa of only 3 bits (e4m3) or 2
bits (e5m2), and a small range. Each tensor is therefore scaled before it is rounded. A *recipe* is a method to compute
the scales. DPO compares two models that are nearly equal. A recipe must not give equal models different scales, and no
scale may depend on what a run did before.

What runs in FP8. The linear layers of attention, of the MLP and of the experts compute their products in FP8. Inputs
and output gradients are rounded to FP8 just before their product. Weights are rounded once for several micro-batches
(see below). Megatron's transformer block turns FP8 on for each layer separately. FP8 does not change the embedding, the
norms, attention itself, the router, the adapters or the output layer. Weights, and the activations between linear
layers, remain in bf16. FP8 therefore does not change how weights are loaded, saved and exported. Transformer Engine
keeps FP8 copies of the weights for all micro-batches of one call of a schedule. Megatron's schedules renew the copies
at the first micro-batch of every call, because the weights can have changed since the previous call.

Recipes. ``tensorwise`` has one scale for each tensor. The scale of activations comes from the largest value of all
tokens of a micro-batch, so a token's numbers depend on the other tokens. ``blockwise`` has a scale for every 128
numbers of a token, and ``mxfp8`` has a scale for every 32 numbers. With these two recipes, a token's numbers in a
forward pass do not depend on other sequences. All three recipes compute scales from the tensor itself. Products are
summed in fp32. There is one exception: in forward passes with ``tensorwise``, Transformer Engine by default sums with
fewer bits, because this is faster. The engine refuses ``delayed``, whose scales come from the largest values of earlier
passes. Policy and reference would have separate histories of these values, and thus different scales, or one history
would mix the values of both. Every evaluation would change training. A resumed run would start without the values.

Row lengths. In FP8 products, the number of tokens must be a multiple of 16 or 32, so rows are padded to such a multiple
(:attr:`~dpo_engine.config.parallel_section.MegatronConfig.token_multiple`). Padding is never scored, and no other token
sees it. With ``tensorwise``, however, padding can change a scale. Megatron pads the tokens of each expert.

Not covered. FP8 weights, FP8 attention, FP8 output layers, and FP4. The numerical results are also not covered: no test
computes in FP8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_engine.config.parallel_section import TOKEN_MULTIPLES
from dpo_engine.config.run import Config
from dpo_engine.model.architecture import Architecture
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.wording import join

FIELDS = (
    "fp8",
    "fp8_recipe",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
)
"""Fields for FP8 in Megatron's ``TransformerConfig`` that can be set. Without ``fp8``, the others have no effect."""

RECIPES = join(list(TOKEN_MULTIPLES), "or")
PER_TOKEN = ("blockwise", "mxfp8")
"""Recipes with which the numbers of a token do not depend on other sequences in a forward pass."""

NOT_DELAYED = (
    "delayed scaling is not supported: its scales come from earlier passes, would differ between policy and "
    "reference, and would not be in checkpoints"
)


def fp8_problems(config: Config) -> Iterator[str]:
    """Yield the reasons why a run with this configuration cannot compute in FP8, whatever the model and the GPU."""
    asked, recipe = config.megatron.transformer, config.megatron.fp8_recipe
    if not asked.get("fp8"):
        return
    line = f"transformer.fp8={asked['fp8']}"
    if asked.get("fp8_recipe") is None:
        yield (
            f"{line}: requires fp8_recipe, because Megatron's default is delayed scaling, and {NOT_DELAYED}; use "
            f"{RECIPES}"
        )
        return
    if recipe not in TOKEN_MULTIPLES:
        why = NOT_DELAYED if recipe == "delayed" else "it runs code that the engine does not know"
        yield f"transformer.fp8_recipe={recipe}: {why}; use {RECIPES}"
        return
    yield from layer_problems(line, config)
    if config.reference_mode == "dataset":
        yield (
            f"{line}: the log-probabilities in the records were not computed with these FP8 settings, so policy and "
            "reference would differ before training; set reference.mode=resident, or remove fp8"
        )
    if config.reference_mode == "stored" and recipe not in PER_TOKEN:
        yield (
            f"transformer.fp8_recipe={recipe}: its scales depend on the micro-batch, and stored log-probabilities were "
            f"computed in other micro-batches; use {join(PER_TOKEN, 'or')}, or set reference.mode=resident"
        )
    if asked.get("distribute_saved_activations"):
        yield "transformer.distribute_saved_activations=true: has never been tested with fp8; remove the field"
    for name in FIELDS[3:]:
        if asked.get(name, 0) < 0:
            yield f"transformer.{name}={asked[name]}: must be at least 0; correct it"


def layer_problems(line: str, config: Config) -> Iterator[str]:
    """Yield conflicts between a configuration and an option that needs Transformer Engine's layers and bf16 weights.

    line   the option and its value; each conflict begins with this text
    """
    if config.model.spec == "native":
        yield (
            f"{line}: requires Transformer Engine's layers, but model.spec is native; set model.spec=te, or remove "
            "this option"
        )
    if config.model.dtype == "fp32":
        yield f"{line}: requires weights in bf16, but model.dtype is fp32; set model.dtype=bf16, or remove this option"


def model_problems(line: str, arch: Architecture) -> list[str]:
    """Return a list with a problem if Transformer Engine's layers do not support a model.

    line   as for :func:`layer_problems`
    """
    if arch.suits_transformer_engine:
        return []
    return [
        f"{line}: requires Transformer Engine's layers, which do not support {arch.model_type} models; remove this "
        "option"
    ]


def fp8_model_problems(config: Config, arch: Architecture, dims: ParallelDims) -> list[str]:
    """List the reasons why a model cannot compute in FP8 with these parallel sizes."""
    if (multiple := TOKEN_MULTIPLES.get(config.megatron.fp8_recipe)) is None:
        return []
    asked = config.megatron.transformer
    line = f"megatron.transformer.fp8={asked['fp8']}"
    problems = model_problems(line, arch)
    for what, size in linear_sizes(arch, dims).items():
        if size % multiple:
            problems.append(
                f"{line}: the {what} on each rank, {size}, must be a multiple of {multiple}; "
                + ("remove fp8" if what == "hidden size" else "lower parallel.tp or parallel.etp, or remove fp8")
            )
    if asked.get("first_last_layers_bf16"):
        most = arch.num_layers // dims.pp  # Megatron's limit
        problems += [
            f"megatron.transformer.{name}={asked[name]}: must be at most {most}, the number of layers of a pipeline "
            "stage; lower it"
            for name in FIELDS[3:]
            if asked.get(name, 1) > most
        ]
        if not fp8_layers(config, arch):
            problems.append(
                f"megatron.transformer.first_last_layers_bf16=true: none of the {arch.num_layers} layers would compute "
                f"in fp8; lower {FIELDS[3]} or {FIELDS[4]}"
            )
    return problems


def linear_sizes(arch: Architecture, dims: ParallelDims) -> dict[str, int]:
    """Map descriptions of the inputs and outputs of linear layers to their widths on each rank."""
    sizes = {
        "hidden size": arch.hidden_size,
        "width of queries, keys and values": arch.qkv_size // dims.tp,
        "width of the attention output": arch.value_size // dims.tp,
    }
    if not arch.experts or arch.layers("dense"):
        sizes["width of the MLP"] = arch.ffn_hidden_size // dims.tp
    if arch.experts:
        sizes["width of an expert"] = arch.experts.ffn_hidden_size // dims.etp
        if arch.experts.shared_size:
            sizes["width of the shared expert"] = arch.experts.shared_size // dims.tp
    return sizes


def fp8_layers(config: Config, arch: Architecture) -> range:
    """Return the layers that compute in FP8."""
    if config.megatron.fp8_recipe is None:
        return range(0)
    asked = config.megatron.transformer
    if not asked.get("first_last_layers_bf16"):
        return range(arch.num_layers)
    start, end = (asked.get(name, 1) for name in FIELDS[3:])
    return range(start, arch.num_layers - end)


def fp8_line(config: Config, arch: Architecture) -> str:
    """Return a description of the FP8 products for the log; without FP8, return an empty text."""
    if (recipe := config.megatron.fp8_recipe) is None:
        return ""
    layers = fp8_layers(config, arch)
    some = "" if len(layers) == arch.num_layers else f" of decoder layers {layers.start} to {layers.stop - 1}"
    return f", linear layers{some} in fp8 {config.megatron.transformer['fp8']} {recipe}"


def spec_name(config: Config, spec: str) -> str:
    """Return the name by which stored log-probabilities identify the layers: the layer spec and the settings of FP8."""
    if (recipe := config.megatron.fp8_recipe) is None:
        return spec
    asked: dict[str, Any] = config.megatron.transformer
    kept = [str(asked.get(name, 1)) for name in FIELDS[3:]] if asked.get("first_last_layers_bf16") else []
    return "-".join([spec, asked["fp8"], recipe, *kept])


def without_fp8(config: Config) -> Config:
    """Return the configuration without FP8."""
    return config.model_copy(update={"megatron": config.megatron.without(*FIELDS)})


def device_problem(config: Config) -> str | None:
    """Return the reason why this GPU or this version of Transformer Engine cannot use the run's recipe, or None."""
    if (recipe := config.megatron.fp8_recipe) is None:
        return None
    import torch
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    kind = {"blockwise": "fp8_block_scaling", "mxfp8": "mxfp8"}.get(recipe, "fp8")
    known = getattr(FP8GlobalStateManager, f"is_{kind}_available", None)
    usable, why = known() if known else (False, "this version of Transformer Engine does not have this recipe")
    generation, minor = torch.cuda.get_device_capability()
    if usable and recipe == "blockwise" and generation >= 10:
        usable, why = False, "Transformer Engine would convert blockwise scales to mxfp8 scales in every matrix product"
    if usable:
        return None
    others = [
        name for name in ({9: "blockwise", 10: "mxfp8"}.get(generation), "tensorwise") if name not in (None, recipe)
    ]
    others = (
        join(others)
        if others and (generation, minor) >= (8, 9)
        else "a GPU and a version of Transformer Engine that support this recipe"
    )
    return (
        f"megatron.transformer.fp8_recipe={recipe}: cannot be used here: {why.rstrip('.')}; use {others}, or remove fp8"
    )
