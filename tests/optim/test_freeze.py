"""Tests of frozen weights against torch's autograd with ``requires_grad=False``, and of the messages about them."""

import re

import pytest
import torch
import torch.nn.functional as F

from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.weights.freeze import freeze_problems, frozen_lines
from support.hf_oracle import sequence_logp
from support.pairs import RandomPairs, global_batches
from support.ranks import run_ranks
from support.trajectory import VOCAB, load_weights, run_config, train_steps

SIZES = [4, 3]
LR, DECAY, BETA, CLIP, EPS = 3e-4, 0.5, 0.1, 0.05, 1e-6

EMBEDDING = r"model\.embed_tokens\.weight"
LOWER = r"model\.layers\.[01]\..*"
MATRICES = r"model\.layers\.\d+\.self_attn\.[qkv]_proj\.weight"
NORMS = r".*norm\.weight"
HEAD = r"lm_head\.weight"


class Norm64(torch.nn.Module):
    """RMS norm in fp64. The one in transformers computes in fp32."""

    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, hidden):
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def in_fp64(directory):
    """Load a model with transformers and make every part of it compute in fp64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="sdpa")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, Norm64(child.weight, child.variance_epsilon))
    return model


def independent_run(directory, patterns, optimizer="adamw"):
    """Train in one process in fp64 with transformers. Return the gradient norm of each step, and the final weights."""
    model, reference = in_fp64(directory), in_fp64(directory)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(re.fullmatch(pattern, name) for pattern in patterns))
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    if optimizer == "sgd":
        updates = torch.optim.SGD(groups, lr=LR, momentum=0.8)
    else:
        updates = torch.optim.AdamW(groups, lr=LR, eps=EPS)
    pairs, norms = RandomPairs(sum(SIZES), VOCAB), []
    for indices in global_batches(SIZES):
        loss = 0.0
        for pair in (pairs[i] for i in indices):
            chosen, rejected = (sequence_logp(model, pair.prompt, r) for r in (pair.chosen, pair.rejected))
            with torch.no_grad():
                before = [sequence_logp(reference, pair.prompt, r) for r in (pair.chosen, pair.rejected)]
            margin = BETA * ((chosen - before[0]) - (rejected - before[1]))
            loss = loss - pair.weight * F.logsigmoid(margin) / sum(pairs[i].weight for i in indices)
        updates.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, CLIP).item())
        updates.step()
    return norms, {name: value.detach() for name, value in model.named_parameters()}


@pytest.fixture(scope="module")
def expected(tiny_hf):
    known = {}

    def run(patterns, tied, **options):
        key = (patterns, tied, *options.values())
        if key not in known:
            known[key] = independent_run(tiny_hf("llama", tie_word_embeddings=tied), patterns, **options)
        return known[key]

    return run


CASES = [
    ("embedding, recompute", 1, {}, (EMBEDDING, NORMS), False, "full"),
    ("first stage", 2, {"pp": 2}, (EMBEDDING, LOWER), False, "none"),
    ("tied embedding, tp2 pp2", 4, {"tp": 2, "pp": 2}, (EMBEDDING, MATRICES), True, "none"),
    ("last stage", 2, {"pp": 2}, (r"model\.layers\.[23]\..*", r"model\.norm\.weight", HEAD), False, "none"),
    ("first stage, vpp2", 2, {"pp": 2, "vpp": 2}, (EMBEDDING, r"model\.layers\.[02]\..*"), False, "full"),
    ("matrices, cp2 dp2", 4, {"cp": 2}, (MATRICES, HEAD), False, "selective"),
    ("all but the head, tp2", 2, {"tp": 2}, (r"model\..*",), False, "none"),
    ("norms, tp2 without sp", 2, {"tp": 2, "sequence_parallel": False}, (NORMS,), False, "none"),
]
FAST = ("embedding, recompute", "first stage")


@pytest.mark.parametrize(
    "ranks, layout, patterns, tied, recompute",
    [pytest.param(*case, id=name, marks=() if name in FAST else pytest.mark.slow) for name, *case in CASES],
)
def test_training_matches_autograd(ranks, layout, patterns, tied, recompute, expected, tiny_hf, tmp_path):
    model = tiny_hf("llama", tie_word_embeddings=tied)
    norms, weights = expected(patterns, tied)
    config = run_config(
        model,
        tmp_path,
        model={"path": str(model), "recompute": recompute},
        parallel={**layout, "distributed_optimizer": False},
        optim={"lr": LR, "weight_decay": DECAY, "clip_grad": CLIP, "eps": EPS, "freeze": list(patterns)},
    )
    results = run_ranks(train_steps, ranks, config=config, sizes=SIZES, export=str(tmp_path / "hf"), fp64=True)
    assert [step["grad_norm"] for step in results[0]["steps"]] == pytest.approx(norms, rel=1e-10)
    assert norms[0] > CLIP, "the test must clip"
    compare(load_weights(tmp_path / "hf"), weights, load_weights(model), patterns, 1e-10)


def compare(got, expected, start, patterns, rel):
    """Check that frozen weights are bitwise those at the start, and that the others moved as expected."""
    for name, value in start.items():
        if any(re.fullmatch(pattern, name) for pattern in patterns):
            assert torch.equal(got[name].to(value.dtype), value), f"{name} is frozen, but has changed"
        else:
            moved = (expected[name] - value).norm()
            assert moved > 0, f"{name} was not changed by training"
            assert (got[name] - expected[name]).norm() / moved < rel * 1e4, name
            assert (got[name] - expected[name]).norm() / expected[name].norm() < rel, name


def test_messages(tiny_hf):
    arch = read_architecture(str(tiny_hf("llama")))
    first = "model.layers.0.self_attn.q_proj.weight"
    kept = "model.layers.0.self_attn.k_proj.weight and model.layers.0.self_attn.v_proj.weight"
    cases = {
        ("model.embed_tokens",): [
            "optim.freeze[0]=model.embed_tokens: matches no weight of the model; a pattern must match a whole name, "
            "such as model.embed_tokens.weight"
        ],
        ("lm_haed.weight",): [
            "optim.freeze[0]=lm_haed.weight: matches no weight of the model; did you mean lm_head.weight?"
        ],
        (EMBEDDING, "x+"): [
            "optim.freeze[1]=x+: matches no weight of the model; an example of a name is model.embed_tokens.weight"
        ],
        ("[",): [
            "optim.freeze[0]=[: is not a regular expression (unterminated character set at position 0); correct it"
        ],
        (".*",): ["optim.freeze: freezes every weight of the model; leave some weights to train"],
        (r".*\.q_proj\.weight",): [
            f"optim.freeze: freezes {first}, but not {kept}, which are stored in the same parameter (linear_qkv); "
            "freeze all of them, or none (and 3 more such parameters)"
        ],
        (MATRICES, EMBEDDING): [],
        (): [],
    }
    for patterns, problems in cases.items():
        assert freeze_problems(patterns, arch) == problems
    tied = read_architecture(str(tiny_hf("llama", tie_word_embeddings=True)))
    assert freeze_problems([HEAD], tied) == [
        f"optim.freeze[0]={HEAD}: matches no weight of the model; the embeddings are tied, so use "
        "model.embed_tokens.weight"
    ]


def test_count(tiny_hf):
    weights = load_weights(tiny_hf("llama"))
    size = sum(value.numel() for value in weights.values())
    arch = read_architecture(str(tiny_hf("llama")))
    assert frozen_lines([EMBEDDING], arch) == [f"frozen: {515 * 64:,} of {size:,} parameters"]
    assert frozen_lines([], arch) == []


def test_engine_refuses_what_check_would(tiny_hf, tmp_path):
    config = run_config(tiny_hf("llama"), tmp_path, optim={"freeze": ["nothing"]})
    (message,) = run_ranks(refusal, 1, config=config)
    assert message.startswith("optim.freeze[0]=nothing: matches no weight of the model; ")


def refusal(config):
    from dpo_engine.training.engine import Engine

    try:
        Engine.open(config)
    except ConfigError as error:
        return str(error)
