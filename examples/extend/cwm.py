"""A plugin with a model family that uses only the engine's blocks: CWM, a Llama with sliding windows in most layers."""

from dpo_engine import FAMILIES
from dpo_engine.model.architecture import Architecture, HFConfig
from dpo_engine.model.families.blocks import DENSE, dense, sliding

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The rotary fields for a ``config.json`` that has none. transformers uses the same defaults."""


@FAMILIES.register("cwm")
class Cwm:
    """CWM has Llama's weight names. If ``config.json`` has no ``layer_types``, layers 0, 4, 8, ... have no window."""

    rules = DENSE

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Return the architecture described by a ``config.json`` of this family."""
        if config.get("rope_scaling") is None:
            config.values["rope_parameters"] = config.get("rope_parameters", ROPE)
        if config.get("layer_types") is None:
            kinds = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]
            config.values["layer_types"] = [kinds[layer % 4] for layer in range(config.count("num_hidden_layers"))]
        windows = sliding(config) if config.values.get("sliding_window", 8192) else ()
        return dense(
            config,
            head_dim=128,
            num_kv_heads=8,
            eps=("rms_norm_eps", 1e-5),
            theta=1e6,
            sliding_window=config.count("sliding_window", 8192) if windows else None,
            sliding_layers=windows or None,
            mlp_bias=config.flag("mlp_bias", False),
        )
