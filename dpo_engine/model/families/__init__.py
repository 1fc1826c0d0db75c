"""Model families, one small file each: how to read the family's ``config.json`` and the names of its weights.

A family is a class registered under its ``model_type``, with two members:

``architecture(config)``   converts an :class:`~dpo_engine.model.architecture.HFConfig` to an ``Architecture``
``rules``                  the weight table, a sum of the blocks in :mod:`dpo_engine.model.families.blocks`
"""

from dpo_engine.model.architecture import FAMILIES as FAMILIES
from dpo_engine.model.families import llama as llama
from dpo_engine.model.families import mistral as mistral
from dpo_engine.model.families import qwen2 as qwen2
from dpo_engine.model.families import qwen3 as qwen3
