"""Model families, one small file each. A family knows how to read its ``config.json`` and how its weights are named.

A family is a class that is registered under its ``model_type`` and has two members:

``architecture(config)``   converts an :class:`~dpo_engine.model.architecture.HFConfig` to an ``Architecture``
``rules``                  the weight table, concatenated from the blocks in :mod:`dpo_engine.model.families.blocks`
"""

from dpo_engine.model.architecture import FAMILIES as FAMILIES
from dpo_engine.model.families import llama as llama
from dpo_engine.model.families import mistral as mistral
from dpo_engine.model.families import qwen2 as qwen2
from dpo_engine.model.families import qwen3 as qwen3
