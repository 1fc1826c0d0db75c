"""Arcee Foundation Models (AFM)."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import ATTENTION, NORMS, ROOT, activation, biases, dense, plain_mlp


@FAMILIES.register("arcee")
class Arcee:
    """Llama's layers, but the MLP has a squared ReLU and no gate."""

    rules = ROOT + NORMS + ATTENTION + plain_mlp("mlp.up_proj", "mlp.down_proj")

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read an Arcee ``config.json``."""
        kind = activation(config, default="relu2")
        return dense(config, eps=("rms_norm_eps", 1e-5), activation=kind, gated=False, **biases(config, mlp=False))
