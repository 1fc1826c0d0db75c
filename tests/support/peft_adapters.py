"""Make PEFT adapters as inputs of tests, and load them with PEFT in fp64 to compute expected values."""

import torch
from safetensors.torch import load_file

from dpo_engine.testing.hf_training import in_fp64

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(model, directory, *, up=0.1, **settings):
    """Save a PEFT adapter with random weights for the checkpoint ``model``, and return its directory.

    up   standard deviation of the weights in the B matrices. The magnitudes of a DoRA adapter are multiplied by random
         factors from 1 to ``1 + 2 * up``
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(PROJECTIONS), **settings}
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=up)
            elif "magnitude" in name:
                parameter.mul_(1 + 2 * up * torch.rand_like(parameter))
    adapted.save_pretrained(directory)
    return directory


def load_adapted(model, adapter, *, trainable=False):
    """Load a checkpoint and its adapter with PEFT, in fp64."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(in_fp64(model), adapter, is_trainable=trainable, autocast_adapter_dtype=False)
    return adapted.double()


def adapter_tensors(directory):
    """Return the tensors of a PEFT adapter by name."""
    return load_file(f"{directory}/adapter_model.safetensors")


def saved_name(name):
    """Return the name that PEFT gives a parameter when it saves an adapter."""
    return name.replace(".default", "").replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
