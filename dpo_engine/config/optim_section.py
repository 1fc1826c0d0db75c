"""The section `optim` of a run's configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dpo_engine.config.section import Count, Fraction, Natural, Section, Text


class OptimConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-6
    """peak learning rate"""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """minimum learning rate after warmup"""
    schedule: Text = "cosine"
    """learning-rate schedule after warmup: constant, cosine, linear, wsd, inverse_sqrt, or a registered schedule"""
    schedule_options: dict[str, Any] = {}
    """options of a registered schedule"""
    warmup_steps: Natural | None = None
    """number of steps of linear warmup from zero; null: warmup_ratio sets the length of the warmup; if both are null,
    there is no warmup"""
    warmup_ratio: Fraction | None = None
    """length of the linear warmup as a fraction of all steps; the number of warmup steps is rounded up; null:
    warmup_steps sets the length"""
    decay_steps: Count | None = None
    """wsd schedule only: number of steps in the final decay; null: a tenth of all steps"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """decoupled weight decay, applied to weight matrices only"""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    """Adam's beta1 and beta2"""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's epsilon"""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """maximum global gradient norm; 0: no clipping"""
    optimizer: Text = "adamw"
    """name of a registered optimizer, such as adamw or sgd; all except adamw require
    parallel.distributed_optimizer=false"""
    optimizer_options: dict[str, Any] = {}
    """options of a registered optimizer other than adamw, such as the momentum of sgd"""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """data type in which the gradients of all micro-batches are summed and reduced over ranks; bf16 halves the memory
    for gradients, but loses precision, and requires model.dtype=bf16"""
    states: Literal["device", "host"] = "device"
    """where to keep the fp32 main weights and Adam's moments: in device memory (device) or in host memory (host); host
    runs AdamW on the CPU, and saves 12 bytes of device memory for each parameter that a rank updates, but makes steps
    longer. Results are the same up to rounding"""
    freeze: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """regular expressions; a weight is not trained if its whole name in the Hugging Face checkpoint matches at least
    one of the expressions"""
