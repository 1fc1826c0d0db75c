"""Phi-3, Phi-3.5 and Phi-4 dense models."""

from dataclasses import replace

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import FUSED_ATTENTION, FUSED_MLP, NORMS, ROOT, dense
from dpo_engine.model.families.rope import LENGTH


@FAMILIES.register("phi3")
class Phi3:
    """Llama's layers, with one matrix for queries, keys and values, and one matrix for the gate and up projections."""

    rules = ROOT + NORMS + FUSED_ATTENTION + FUSED_MLP

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read a Phi-3 ``config.json``.

        ``su`` and ``yarn`` are older names of the scaling ``longrope``. With this scaling, a single row that is longer
        than the original length would change the frequencies of all rows of its batch. ``max_positions`` is therefore
        at most the original length.
        """
        config.values[LENGTH] = config.get(LENGTH, 4096)
        scaling = config.get("rope_scaling") or config.get("rope_parameters")
        if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) in ("su", "yarn"):
            scaling["rope_type"] = "longrope"
        window = None if config.get("sliding_window") is None else config.count("sliding_window")
        arch = dense(config, eps=("rms_norm_eps", 1e-5), sliding_window=window)
        if arch.rope_scaling and arch.rope_scaling["rope_type"] == "longrope":
            arch = replace(arch, max_positions=min(arch.max_positions, int(arch.rope_scaling[LENGTH])))
        return arch
