"""Tests of routers, of the parameters of experts, and of layers that are exported but not trained."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.experts import choose
from dpo_engine.model.mixture import Experts
from dpo_engine.model.policy import mark_experts
from dpo_engine.model.weights.table import plain_name
from dpo_engine.testing.comparison import assert_same_bits
from dpo_engine.testing.ranks import run_ranks
from support.family_cases import MIXTURES, checkpoint
from support.sharded import round_trip


@pytest.mark.parametrize("case", MIXTURES)
def test_experts_are_chosen_as_in_transformers(case, tiny_hf):
    """For random tokens, compare the routing weights of all experts with those that transformers computes."""
    from transformers import AutoModelForCausalLM

    directory = checkpoint(tiny_hf, case)
    arch = read_architecture(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager")
    block = model.model.layers[arch.experts.layers[0]].mlp
    seen = []
    block.experts.register_forward_pre_hook(lambda module, args: seen.extend(args[1:]))
    tokens = 3 * torch.randn(1, 500, arch.hidden_size, generator=torch.Generator().manual_seed(1))
    gate = block.router if arch.experts.router_bias else block.gate
    with torch.no_grad():
        block(tokens)
        logits = F.linear(tokens[0], gate.weight, getattr(gate, "bias", None))
    bias = getattr(gate, "e_score_correction_bias", None)
    weights, chosen, scores = choose(logits, arch.experts, bias)
    numbers, expected = seen
    assert scores.shape == (500, arch.experts.count) and chosen.shape == (500, arch.experts.chosen)
    mine, theirs = (
        torch.zeros_like(scores).scatter(1, places, values)
        for places, values in ((chosen, weights), (numbers, expected.float()))
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_groups_are_judged_by_their_best_experts():
    """There are four groups of two experts. The group with the best expert does not have the largest sum of scores."""
    logits = torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.0, 0.0, 0.0, 0.0]]).logit(eps=1e-6)
    facts = {"layers": (0,), "count": 8, "chosen": 1, "ffn_hidden_size": 4, "score": "sigmoid", "normalized": False}
    for best, expected in ((1, 0), (2, 2)):
        experts = Experts(**facts, groups=4, chosen_groups=1, group_best=best)
        assert choose(logits, experts, None)[1].tolist() == [[expected]]


def test_the_bias_changes_the_choice_but_not_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    experts = Experts(
        (0,), count=3, chosen=1, ffn_hidden_size=4, score="sigmoid", normalized=False, scale=2.0, bias=True
    )
    weights, chosen, scores = choose(logits, experts, torch.tensor([0.0, 0.0, 5.0]))
    assert chosen.tolist() == [[2]] and weights.item() == 2 * scores[0, 2].item() == 1.0


def test_names_of_transformer_engines_experts():
    """In Transformer Engine, one module computes a linear layer for all experts of a rank.

    The module has one weight per expert.
    """
    for name in ("mlp.experts.linear_fc1.weight3", "mlp.experts.local_experts.3.linear_fc1.weight"):
        assert plain_name(f"decoder.layers.2.{name}", 8) == (
            "decoder.layers.2.mlp.experts.local_experts.{e}.linear_fc1.weight",
            11,
        )
    assert plain_name("decoder.layers.2.mlp.shared_experts.linear_fc1.weight", 8)[1] is None


def test_experts_are_counted_on_all_ranks():
    """The gradient norm must count the experts of every tp rank.

    Megatron-Core 0.16 wrongly marks the weights of Transformer Engine's experts as replicated on all tp ranks. Megatron
    would therefore count only the experts on the first tp rank.
    """
    names = ("decoder.layers.0.mlp.experts.linear_fc1.weight0", "decoder.layers.0.mlp.shared_experts.linear_fc1.weight")
    named = {name: torch.nn.Parameter(torch.zeros(2, 2)) for name in names}
    for parameter in named.values():
        parameter.allreduce, parameter.tensor_model_parallel = True, False
    mark_experts(SimpleNamespace(named_parameters=named.items))
    experts, shared = named.values()
    assert (experts.allreduce, experts.tensor_model_parallel) == (False, True)
    assert (shared.allreduce, shared.tensor_model_parallel) == (True, False)


def test_layers_for_multi_token_prediction_are_kept(tiny_hf, tmp_path):
    """Checkpoints of DeepSeek-V3 and GLM-4.5 have an extra layer at the end, which transformers does not load."""
    source, export = tmp_path / "source", tmp_path / "export"
    shutil.copytree(checkpoint(tiny_hf, "deepseek_v3"), source)
    extra = {
        "model.layers.4.eh_proj.weight": torch.randn(64, 128).bfloat16(),
        "model.layers.4.mlp.experts.0.up_proj.weight": torch.randn(48, 64),
    }
    save_file(load_file(source / "model.safetensors") | extra, source / "model.safetensors")
    assert run_ranks(round_trip, 2, directory=source, layout={"ep": 2}, export=export) == [None, None]
    assert_same_bits(export, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    (lines, _) = run_ranks(round_trip, 2, directory=source, layout={"ep": 2})
    assert lines[0] == (
        f"model.path={source}: tensor model.layers.4.eh_proj.weight in model.safetensors is not used by a deepseek_v3 "
        "model with this config.json; correct config.json, or remove the tensor"
    )
