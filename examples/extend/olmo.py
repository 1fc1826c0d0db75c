"""A plugin with a model family that has a norm of its own: OLMo 1, whose layer norms have no weights."""

import torch.nn.functional as F
from torch import nn

from dpo_engine import FAMILIES, NORMS
from dpo_engine.model.architecture import Architecture, HFConfig
from dpo_engine.model.families.blocks import ATTENTION, MLP, ROOT, biases, dense


@NORMS.register("layer without weights")
class PlainLayerNorm(nn.Module):
    """Layer norm without weights: subtract the mean over the last axis, and divide by the standard deviation."""

    def __init__(self, config, hidden_size, eps=1e-5, **megatron):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)


@FAMILIES.register("olmo")
class Olmo:
    """Llama's layers with layer norms that have no weights, so the checkpoint has no tensors for them."""

    rules = tuple(rule for rule in ROOT if "layernorm" not in rule.parameter) + ATTENTION + MLP

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Return the architecture described by a ``config.json`` of this family."""
        config.only("clip_qkv", None, "the engine does not clip queries, keys and values")
        config.values.setdefault("rms_norm_eps", 1e-5)
        return dense(config, norm="layer without weights", **biases(config))
