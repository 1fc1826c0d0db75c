"""Architectures of published models. The null GPU needs only a model's config.json, not its weights."""

import json
from pathlib import Path

LLAMA_3 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "num_key_value_heads": 8,
}
QWEN_3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "eos_token_id": 151645,
    "num_key_value_heads": 8,
}
OLMO_2 = {
    "model_type": "olmo2",
    "architectures": ["Olmo2ForCausalLM"],
    "vocab_size": 100352,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000,
    "eos_token_id": 100257,
    "num_key_value_heads": 16,
}
GEMMA_3 = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "sliding_window": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "eos_token_id": 1,
    "num_key_value_heads": 1,
}
COHERE = {
    "model_type": "cohere",
    "architectures": ["CohereForCausalLM"],
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "eos_token_id": 255001,
    "num_key_value_heads": 64,
}
MINISTRAL = {
    "model_type": "ministral",
    "architectures": ["MinistralForCausalLM"],
    "vocab_size": 131072,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000000.0,
    "sliding_window": 32768,
    "layer_types": 9 * ["full_attention", *3 * ["sliding_attention"]],
    "eos_token_id": 2,
    "num_key_value_heads": 8,
}
QWEN_3_MOE = {
    **QWEN_3,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
QWEN_2_MOE = {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "vocab_size": 151936,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "eos_token_id": 151643,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}
COMMON = {"hidden_act": "silu", "torch_dtype": "bfloat16", "attention_bias": False, "tie_word_embeddings": False}


def _shape(family: dict, hidden: int, ffn: int, layers: int, heads: int, width: int, tied: bool = False) -> dict:
    return {
        **COMMON,
        **family,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": width,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "llama3_1b": _shape(LLAMA_3, 2048, 8192, 16, 32, 64, tied=True),
    "llama3_8b": _shape(LLAMA_3, 4096, 14336, 32, 32, 128),
    "llama3_70b": _shape(LLAMA_3, 8192, 28672, 80, 64, 128),
    "olmo2_1b": _shape(OLMO_2, 2048, 8192, 16, 16, 128),
    "gemma3_1b": _shape(GEMMA_3, 1152, 6912, 26, 4, 256, tied=True),
    "ministral_8b": _shape(MINISTRAL, 4096, 12288, 36, 32, 128),
    "cohere_35b": _shape(COHERE, 8192, 22528, 40, 64, 128, tied=True),
    "qwen3_4b": _shape(QWEN_3, 2560, 9728, 36, 32, 128, tied=True),
    "qwen3_30b_a3b": _shape(QWEN_3_MOE, 2048, 6144, 48, 32, 128),
    "qwen2_moe_14b": _shape(QWEN_2_MOE, 2048, 5632, 24, 16, 128),
}


def write_shape(name: str, folder: Path, layers: int | None = None) -> Path:
    """Write the config.json of a model to a new directory in ``folder``, and return the directory.

    layers  number of layers; None: the published model's number
    """
    shape = dict(SHAPES[name])
    if layers:
        shape["num_hidden_layers"] = layers
    directory = folder / name
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(shape))
    return directory
