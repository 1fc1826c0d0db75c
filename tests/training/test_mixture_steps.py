"""Tests that training steps with experts match transformers and autograd in fp64, and tests of frozen routers."""

import pytest
import torch
import torch.nn.functional as F

from dpo_engine.testing import check_steps
from dpo_engine.testing.hf_training import sequence_logp
from dpo_engine.testing.pairs import RandomPairs, global_batches
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import VOCAB, load_weights, run_config, train_steps
from dpo_engine.testing.wide import wide, wide_model
from support.family_cases import MIXTURES, checkpoint

SIZES = [4, 4, 3]
LR, DECAY, CLIP, EPS = 3e-4, 0.01, 1.0, 1e-6
TREE = {"layout": "tree", "tokens_per_micro_batch": 80}
LAYOUTS = {
    "dp2 ep2": (2, {"ep": 2}, TREE),
    "tp2 pp2 ep2": (4, {"tp": 2, "pp": 2, "ep": 2}, {}),
}
DEFAULT = ("qwen3_moe, some layers", "dp2 ep2"), ("glm4_moe", "dp2 ep2")


@pytest.mark.parametrize(
    "case, layout",
    [
        pytest.param(case, layout, marks=() if (case, layout) in DEFAULT else pytest.mark.slow)
        for number, case in enumerate(MIXTURES)
        for layout in LAYOUTS
        if (case, layout) in DEFAULT or layout == [*LAYOUTS][number % 2]
    ],
)
def test_steps_match_transformers_and_autograd(case, layout, tiny_models):
    ranks, parallel, batch = LAYOUTS[layout]
    check_steps(tiny_models, case, parallel, ranks, batch)


BALANCE, Z = 0.5, 0.1


def router_losses(gates, hidden, prompt, config):
    """Return a response's balance loss and z loss, computed from router inputs. Each loss is a mean over the layers."""
    found = []
    for gate, states in zip(gates, hidden, strict=True):
        states = states.reshape(-1, states.shape[-1])[prompt - 1 : -1]
        logits = F.linear(states, gate.weight, getattr(gate, "bias", None))
        biased = hasattr(gate, "e_score_correction_bias")
        scores = logits.sigmoid() if biased else logits.softmax(-1)
        rank = scores + gate.e_score_correction_bias if biased else scores
        chosen = rank.topk(config.num_experts_per_tok, -1).indices
        number, experts = scores.shape
        shares = torch.bincount(chosen.flatten(), minlength=experts).double() / chosen.numel()
        means = (scores / scores.sum(-1, keepdim=True)).sum(0) / number
        found.append(torch.stack([experts * (shares * means).sum(), logits.logsumexp(-1).square().mean()]))
    return torch.stack(found).mean(0)


def train_with_router_losses(directory, sizes):
    """Train with transformers. Return the loss, the gradient norm and the router losses of each step."""
    policy, reference = (wide_model(directory, 32) for _ in range(2))
    gates = [module for name, module in policy.named_modules() if name.endswith((".gate", ".router"))]
    hidden = []
    for gate in gates:
        gate.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    named = [(p, p.dim() > 1 and not name.endswith("bias")) for name, p in policy.named_parameters()]
    matrices, others = ([p for p, is_matrix in named if is_matrix == matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer, pairs, steps = torch.optim.AdamW(groups, lr=LR, eps=EPS), RandomPairs(sum(sizes), VOCAB), []
    with wide():
        for indices in global_batches(sizes):
            batch = [pairs[i] for i in indices]
            total, loss, extra = sum(pair.weight for pair in batch), 0.0, 0.0
            for pair in batch:
                ratios = []
                for response in (pair.chosen, pair.rejected):
                    hidden.clear()
                    logp = sequence_logp(policy, pair.prompt, response)
                    extra = extra + pair.weight / (2 * total) * router_losses(
                        gates, hidden, len(pair.prompt), policy.config
                    )
                    with torch.no_grad():
                        before = sequence_logp(reference, pair.prompt, response)
                    ratios.append(logp - before)
                loss = loss - pair.weight * F.logsigmoid(0.1 * (ratios[0] - ratios[1])) / total
            optimizer.zero_grad()
            (loss + BALANCE * extra[0] + Z * extra[1]).backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
            optimizer.step()
            steps.append([number.item() for number in (loss, norm, *extra)])
    return steps


@pytest.mark.parametrize(
    "case, layout, recompute",
    [
        ("qwen3_moe, some layers", "dp2 ep2", "none"),
        pytest.param("glm4_moe", "dp2 ep2", "full", marks=pytest.mark.slow),
        pytest.param("mixtral", "tp2 pp2 ep2", "selective", marks=pytest.mark.slow),
        pytest.param("qwen2_moe", "tp2 pp2 ep2", "none", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "dp2 ep2", "full", marks=pytest.mark.slow),
    ],
)
def test_losses_of_routers_match_transformers_and_autograd(case, layout, recompute, tiny_hf, tmp_path):
    model = checkpoint(tiny_hf, case)
    expected, (world, parallel, batch) = train_with_router_losses(model, SIZES), LAYOUTS[layout]
    config = run_config(
        model,
        tmp_path,
        model={"path": str(model), "recompute": recompute},
        parallel={"distributed_optimizer": False, **parallel},
        batch=batch,
        loss={"balance": BALANCE, "router_z": Z},
        optim={"lr": LR, "clip_grad": CLIP, "weight_decay": DECAY, "eps": EPS},
    )
    result = run_ranks(train_steps, world, config=config, sizes=SIZES, fp64=True)[0]
    for step, want in zip(result["steps"], expected, strict=True):
        got = [step[name] for name in ("loss", "grad_norm", "router/balance", "router/z")]
        assert got == pytest.approx(want, rel=1e-9)
        assert 1 <= step["router/load"] <= 8


@pytest.mark.parametrize(
    "case, names",
    [("qwen2_moe", ["gate.weight"]), pytest.param("gpt_oss", ["router.weight", "router.bias"], marks=pytest.mark.slow)],
)
def test_frozen_routers_do_not_change(case, names, tiny_hf, tmp_path):
    model = checkpoint(tiny_hf, case)
    config = run_config(model, tmp_path, parallel={"ep": 2}, train={"freeze_router": True})
    run_ranks(train_steps, 2, config=config, sizes=[4], export=str(tmp_path))
    got, start = load_weights(tmp_path), load_weights(model)
    frozen = {name for name, value in start.items() if torch.equal(got[name], value)}
    assert frozen == {f"model.layers.{layer}.mlp.{name}" for layer in range(4) for name in names}
