"""Gemma 3 models that also read images (4B to 27B); only their text part is trained."""

from dpo_engine.model.architecture import FAMILIES, Architecture, HFConfig
from dpo_engine.model.families.blocks import within
from dpo_engine.model.families.gemma3_text import Gemma3

DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131072,
}
"""Values of fields that published files omit in ``text_config``."""


@FAMILIES.register("gemma3")
class MultimodalGemma3:
    """The text part of a model that also reads images; the other weights are exported as they are."""

    rules = within("language_model.", Gemma3.rules)
    carried = ("vision_tower.", "multi_modal_projector.")

    @staticmethod
    def architecture(config: HFConfig) -> Architecture:
        """Read the ``text_config`` of a Gemma 3 ``config.json``."""
        text = config.get("text_config", {})
        if not isinstance(text, dict):
            config.problem("text_config: must be an object; correct config.json")
            text = {}
        given = {name: value for name, value in text.items() if value is not None}
        outer = {"tie_word_embeddings": config.get("tie_word_embeddings", True), "model_type": "gemma3"}
        inner = HFConfig({**DEFAULTS, **given, **outer}, f"{config.where}: text_config")
        arch = Gemma3.architecture(inner)
        config.problems += inner.problems
        return arch
