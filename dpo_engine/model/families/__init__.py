"""Model families: how each one's ``config.json`` reads and what its weights are called, one small file per family.

A family is a class registered under its ``model_type``, with

``architecture(config)``   an :class:`~dpo_engine.model.architecture.HFConfig` read into an ``Architecture``
``rules``                  its weight table, a sum of the blocks in :mod:`dpo_engine.model.families.blocks`
"""

from dpo_engine.model.architecture import FAMILIES as FAMILIES
from dpo_engine.model.families import llama as llama
from dpo_engine.model.families import mistral as mistral
from dpo_engine.model.families import qwen2 as qwen2
from dpo_engine.model.families import qwen3 as qwen3
