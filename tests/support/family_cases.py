"""The settings of a tiny model for each family and variant."""

import copy
from pathlib import Path
from typing import Any

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
GROWING = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [2.0, 3.0, 4.0],
    "partial_rotary_factor": 0.75,
    "rope_theta": 10000.0,
}
ALPHA = {"rope_type": "dynamic", "alpha": 4.0, "factor": 1.0, "rope_theta": 10000.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
TWO_BASES = {
    "sliding_window_pattern": 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": PLAIN,
    },
}
WINDOW = {"sliding_window": 8}  # in tokens; the tests use longer rows of tokens
SOME = {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
TIED = {"tie_word_embeddings": True}
NO_KV = {"num_key_value_heads": None}
FACTORS = {"attention_multiplier": 0.2, "embedding_multiplier": 6.0, "residual_multiplier": 0.22, "logits_scaling": 4.0}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "vocab_size": 515,
    "max_position_embeddings": 256,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
}
IMAGES = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "boi_token_index": 510,
    "eoi_token_index": 511,
    "image_token_index": 512,
    "tie_word_embeddings": True,
}
SHORT_NAMES = {"n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 256, "n_inner": 96, **TIED}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 8,
    **EXPERTS,
}
MSCALE = {"rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.6}}
OSS = {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 48, **WINDOW}
GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with mlp bias": ("llama", {"mlp_bias": True}),
    "llama, dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}),
    "qwen3, yarn": ("qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "mistral": ("mistral", WINDOW),
    "qwen2": ("qwen2", SOME),
    "qwen3": ("qwen3", {"head_dim": 16, **SOME}),
    "arcee": ("arcee", {"attention_bias": True}),
    "cohere": ("cohere", {"logit_scale": 0.25, **TIED}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, **WINDOW, **TIED}),
    "ernie4_5": ("ernie4_5", {"head_dim": 16, "use_bias": True, **TIED}),
    "exaone4": ("exaone4", {"sliding_window_pattern": 2, **WINDOW}),
    "gemma": ("gemma", {"head_dim": 16, **TIED}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, **CAPS, **WINDOW, **TIED}),
    "gemma3_text": (
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "final_logit_softcapping": 5.0, **TWO_BASES, **WINDOW, **TIED},
    ),
    "gemma3": ("gemma3", {**IMAGES, "text_config": {**TEXT, **TWO_BASES, **WINDOW}}),
    "glm4": ("glm4", {"head_dim": 16}),
    "gpt2": ("gpt2", SHORT_NAMES),
    "gpt_neox": ("gpt_neox", {**NO_KV, "hidden_act": "gelu"}),
    "gpt_neox, serial": ("gpt_neox", {**NO_KV, "hidden_act": "gelu_new", "use_parallel_residual": False}),
    "granite": ("granite", {**FACTORS, **TIED}),
    "helium": ("helium", {"head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 16}),
    "hunyuan_v1_dense, alpha": ("hunyuan_v1_dense", {"head_dim": 16, "rope_parameters": ALPHA}),
    "nemotron": ("nemotron", {}),
    "olmo2": ("olmo2", {}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "olmo3": ("olmo3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}, **WINDOW}),
    "ministral": ("ministral", {"head_dim": 16, **WINDOW}),
    "ministral3": ("ministral3", {"head_dim": 16, "rope_parameters": GROWING, **WINDOW}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.75, **WINDOW}),
    "seed_oss": ("seed_oss", {"head_dim": 16, "attention_out_bias": False, "residual_dropout": 0.0}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, **TIED}),
    "smollm3, windows": ("smollm3", {"no_rope_layer_interval": 2, "use_sliding_window": True, **WINDOW, **TIED}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {**WINDOW, **TIED}),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 16, "num_experts": 8, "norm_topk_prob": True, "use_sliding_window": True, **WINDOW, **EXPERTS},
    ),
    "qwen3_moe, some layers": (
        "qwen3_moe",
        {"head_dim": 16, "num_experts": 8, "mlp_only_layers": [2], "decoder_sparse_step": 2, **EXPERTS},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "intermediate_size": 48, **WINDOW}),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 48}),
    "qwen2_moe": ("qwen2_moe", {"num_experts": 8, "shared_expert_intermediate_size": 80, **EXPERTS}),
    "qwen2_moe, windows": (
        "qwen2_moe",
        {"num_experts": 8, "shared_expert_intermediate_size": 80, "use_sliding_window": True, **WINDOW, **EXPERTS},
    ),
    "glm4_moe": (
        "glm4_moe",
        {"head_dim": 16, "n_routed_experts": 8, "routed_scaling_factor": 2.5, "use_qk_norm": True, **EXPERTS},
    ),
    "glm4_moe, groups": (
        "glm4_moe",
        {"head_dim": 16, "n_routed_experts": 8, "attention_bias": True, "norm_topk_prob": False, **EXPERTS, **GROUPS},
    ),
    "deepseek_v2": ("deepseek_v2", {**LATENT, "q_lora_rank": None, "norm_topk_prob": True}),
    "deepseek_v2, groups": (
        "deepseek_v2",
        {**LATENT, **GROUPS, "q_lora_rank": 48, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0},
    ),
    "deepseek_v3": ("deepseek_v3", {**LATENT, **GROUPS, "q_lora_rank": 48}),
    "deepseek_v3, yarn": (
        "deepseek_v3",
        {**LATENT, **MSCALE, "q_lora_rank": None, "rope_interleave": False, "n_group": 1, "topk_group": 1},
    ),
    "gpt_oss": ("gpt_oss", {**OSS, "swiglu_limit": 0.5, "swiglu_alpha": 1.2}),
}
"""For each case, the ``model_type``, and the fields of ``config.json`` that differ from ``tiny_hf``'s defaults."""

MIXTURES = [case for case in CASES if any(name in case for name in ("moe", "mixtral", "deepseek", "gpt_oss"))]
"""The cases with experts."""


def checkpoint(tiny_hf, case: str) -> Path:
    """Return the directory of a case's model, which the fixture ``tiny_hf`` makes."""
    family, options = CASES[case]
    return tiny_hf(family, pad_token_id=0, **copy.deepcopy(options))  # transformers would change nested values in place
