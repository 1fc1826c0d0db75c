"""The section `adapter` of a run's configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dpo_engine.config.paths import Place
from dpo_engine.config.section import Count, Natural, Section, Text

Alpha = Annotated[float, Field(gt=0)]


class AdapterConfig(Section):
    kind: Literal["lora", "dora"] = "lora"
    """lora adds a product of two low-rank matrices to each target matrix; dora also trains the norm of each row"""
    rank: Count = 16
    """rank of the adapters"""
    alpha: Alpha = 32.0
    """numerator of the adapters' scale: the low-rank product is multiplied by alpha / rank or, with adapter.rslora, by
    alpha / sqrt(rank)"""
    rslora: bool = False
    """whether to multiply the low-rank product by alpha / sqrt(rank) instead of alpha / rank"""
    targets: Annotated[tuple[Text, ...], Field(min_length=1, strict=False)] | Text = "all-linear"
    """projections to adapt: a list of names or name endings, such as [q_proj, v_proj]; a regular expression that must
    match a whole name, such as model.layers.0.self_attn.q_proj; or all-linear, for all projections of all layers"""
    layers: Annotated[tuple[Natural, ...], Field(min_length=1, strict=False)] | None = None
    """indices of the layers to adapt, counted from 0; null: all layers"""
    rank_pattern: dict[Text, Count] = {}
    """mapping from regular expressions to ranks, such as {q_proj: 64}; the first expression that matches a projection's
    name, or the end of the name, sets its rank"""
    alpha_pattern: dict[Text, Alpha] = {}
    """mapping from regular expressions to values of alpha, such as {q_proj: 128}; the first expression that matches a
    projection's name, or the end of the name, sets its alpha"""
    path: Place | None = None
    """directory or Hub id of a PEFT adapter that training starts from; the adapter sets all other keys of this
    section"""
