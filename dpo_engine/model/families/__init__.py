"""Model families, one small file each. A family defines how its ``config.json`` is read and how its weights are named.

A family is a class that is registered under its ``model_type`` and has two members:

``architecture(config)``   converts an :class:`~dpo_engine.model.architecture.HFConfig` to an ``Architecture``
``rules``                  the weight table, concatenated from blocks (see :mod:`dpo_engine.model.families.blocks`)

If the engine trains only a part of each model of the family, the class has a third member:

``carried``                prefixes of the names of tensors that are not loaded, but are copied from the checkpoint to
                           exports

The class of a mixture-of-experts family can have two more members:

``fused``                  a ``Fused`` for each tensor that contains all experts of a layer
``packed``                 the ``quant_method`` of the quantized experts that the engine can read
"""

from dpo_engine.model.architecture import FAMILIES as FAMILIES
from dpo_engine.model.families import arcee as arcee
from dpo_engine.model.families import cohere as cohere
from dpo_engine.model.families import cohere2 as cohere2
from dpo_engine.model.families import deepseek_v2 as deepseek_v2
from dpo_engine.model.families import deepseek_v3 as deepseek_v3
from dpo_engine.model.families import ernie4_5 as ernie4_5
from dpo_engine.model.families import exaone4 as exaone4
from dpo_engine.model.families import gemma as gemma
from dpo_engine.model.families import gemma2 as gemma2
from dpo_engine.model.families import gemma3 as gemma3
from dpo_engine.model.families import gemma3_text as gemma3_text
from dpo_engine.model.families import glm4 as glm4
from dpo_engine.model.families import glm4_moe as glm4_moe
from dpo_engine.model.families import gpt2 as gpt2
from dpo_engine.model.families import gpt_neox as gpt_neox
from dpo_engine.model.families import gpt_oss as gpt_oss
from dpo_engine.model.families import granite as granite
from dpo_engine.model.families import helium as helium
from dpo_engine.model.families import hunyuan_v1_dense as hunyuan_v1_dense
from dpo_engine.model.families import llama as llama
from dpo_engine.model.families import ministral3 as ministral3
from dpo_engine.model.families import mistral as mistral
from dpo_engine.model.families import mixtral as mixtral
from dpo_engine.model.families import nemotron as nemotron
from dpo_engine.model.families import olmo2 as olmo2
from dpo_engine.model.families import olmo3 as olmo3
from dpo_engine.model.families import olmoe as olmoe
from dpo_engine.model.families import phi3 as phi3
from dpo_engine.model.families import qwen2 as qwen2
from dpo_engine.model.families import qwen2_moe as qwen2_moe
from dpo_engine.model.families import qwen3 as qwen3
from dpo_engine.model.families import qwen3_moe as qwen3_moe
from dpo_engine.model.families import seed_oss as seed_oss
from dpo_engine.model.families import smollm3 as smollm3
from dpo_engine.model.families import stablelm as stablelm
from dpo_engine.model.families import starcoder2 as starcoder2
