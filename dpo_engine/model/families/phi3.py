"""Phi-3, Phi-3.5 and Phi-4 dense models."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import FUSED_ATTENTION, FUSED_MLP, NORMS, ROOT, dense


@FAMILIES.register("phi3")
class Phi3:
    """Llama's layers, stored with one matrix for queries, keys and values, and one for gate and up projection."""

    rules = ROOT + NORMS + FUSED_ATTENTION + FUSED_MLP

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Phi-3 ``config.json``."""
        window = None if config.get("sliding_window") is None else config.count("sliding_window")
        return dense(config, eps=("rms_norm_eps", 1e-5), sliding_window=window)
