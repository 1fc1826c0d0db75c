"""The sections `parallel` and `megatron` of a run's configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dpo_engine.config.section import Count, Section, Text


class ParallelConfig(Section):
    tp: Count = 1
    """tensor-parallel size: number of ranks over which the weight matrices and the vocabulary are split"""
    pp: Count = 1
    """pipeline-parallel size: number of stages into which the layers are split"""
    vpp: Annotated[int, Field(ge=2)] | None = None
    """number of model chunks per pipeline stage in the interleaved schedule; null: one chunk per stage, without
    interleaving"""
    layers: Annotated[tuple[Count, ...], Field(strict=False)] | Literal["auto"] | None = None
    """list of pp x vpp numbers: the number of layers in each model chunk, in the order of the model; auto: numbers that
    balance the work, including the work of the output layer; null: equal numbers"""
    cp: Count = 1
    """context-parallel size: number of ranks over which each sequence is split"""
    ep: Count = 1
    """expert-parallel size: number of ranks over which the experts of a mixture-of-experts model are distributed"""
    etp: Count | None = None
    """number of ranks over which the matrices of each expert are split; null: parallel.tp if parallel.ep is 1,
    otherwise 1"""
    sequence_parallel: bool | Literal["auto"] = "auto"
    """whether the activations outside the tensor-parallel regions are also split, along the sequence; auto: true if
    tp > 1"""
    distributed_optimizer: bool = True
    """whether to shard the optimizer states over the data-parallel ranks"""
    overlap: bool = False
    """whether to reduce gradients during the backward pass and gather updated weights during the next forward pass"""
    timeout_s: Count = 600
    """maximum duration of a collective operation, and maximum time without progress in a step, in seconds; the run ends
    if either is exceeded. Work on files, such as tokenizing, saving or exporting, is not limited"""


TOKEN_MULTIPLES = {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""For each FP8 recipe, the number that must divide the number of tokens of a matrix product.

The gradient of a weight is a sum over tokens. In FP8 matrix products, the number of terms of a sum must be a multiple
of 16. mxfp8 has one scale for each 32 terms. Megatron and Transformer Engine pad the tokens of experts to the same
multiples."""

MXFP8_BLOCK = 128
"""With ``tp_comm_overlap``, each rank's number of tokens in an mxfp8 product must be a multiple of this number, because
Transformer Engine exchanges the scales of whole blocks of 128 tokens."""


class MegatronConfig(Section):
    """Fields of Megatron-Core's own configuration for which the engine has no keys."""

    transformer: dict[Text, Any] = {}
    """fields of TransformerConfig"""
    ddp: dict[Text, Any] = {}
    """fields of DistributedDataParallelConfig"""
    optimizer: dict[Text, Any] = {}
    """fields of OptimizerConfig; none of them can be set: setting one is an error that names the key to use instead, or
    the reason why there is no such key"""

    @property
    def fp8_recipe(self) -> str | None:
        """Name of the recipe by which linear layers compute in FP8; None if they do not."""
        recipe = self.transformer.get("fp8_recipe")
        return recipe if self.transformer.get("fp8") and isinstance(recipe, str) else None

    @property
    def token_multiple(self) -> int:
        """The number that must divide the number of tokens in each rank's part of a row; 1 without FP8."""
        if self.tp_comm_overlap and self.fp8_recipe == "mxfp8":
            return MXFP8_BLOCK
        return TOKEN_MULTIPLES.get(self.fp8_recipe, 1)

    def without(self, *fields: str) -> MegatronConfig:
        """Return the section without these fields of ``transformer``."""
        kept = {name: value for name, value in self.transformer.items() if name not in fields}
        return self.model_copy(update={"transformer": kept})

    @property
    def tp_comm_overlap(self) -> bool:
        """Whether linear layers overlap their tensor-parallel communication with their matrix products."""
        return self.transformer.get("tp_comm_overlap") is True
