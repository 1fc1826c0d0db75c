"""Tests of frozen weights: training must match autograd with ``requires_grad=False``. Wrong patterns are reported."""

import re

import pytest
import torch

from dpo_engine.errors import ConfigError
from dpo_engine.model.architecture import read_architecture
from dpo_engine.model.weights.freeze import freeze_problems, frozen_lines
from dpo_engine.testing.hf_training import train_with_transformers
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import load_weights, run_config, train_steps
from support.small_run import config_of, run

SIZES = [4, 3]
LR, DECAY, CLIP, EPS = 3e-4, 0.5, 0.05, 1e-6

EMBEDDING = r"model\.embed_tokens\.weight"
LOWER = r"model\.layers\.[01]\..*"
MATRICES = r"model\.layers\.\d+\.self_attn\.[qkv]_proj\.weight"
BELOW_MLP = r"model\.layers\.0\.(self_attn\..*|.*layernorm\.weight)"
NORMS = r".*norm\.weight"
HEAD = r"lm_head\.weight"


@pytest.fixture(scope="module")
def expected(tiny_hf):
    known = {}

    def train(patterns, tied):
        if (patterns, tied) not in known:
            known[patterns, tied] = train_with_transformers(
                tiny_hf("llama", tie_word_embeddings=tied),
                SIZES,
                patterns=patterns,
                decay=DECAY,
                clip=CLIP,
                lr=LR,
                eps=EPS,
            )
        return known[patterns, tied]

    return train


CASES = [
    ("embedding, recompute", 1, {}, (EMBEDDING, NORMS), False, "full"),
    ("all below an MLP, recompute", 1, {}, (EMBEDDING, BELOW_MLP), False, "selective"),
    ("first stage", 2, {"pp": 2}, (EMBEDDING, LOWER), False, "none"),
    ("tied embedding, tp2 pp2", 4, {"tp": 2, "pp": 2}, (EMBEDDING, MATRICES), True, "none"),
    ("last stage", 2, {"pp": 2}, (r"model\.layers\.[23]\..*", r"model\.norm\.weight", HEAD), False, "none"),
    ("first stage, vpp2", 2, {"pp": 2, "vpp": 2}, (EMBEDDING, r"model\.layers\.[02]\..*"), False, "full"),
    ("matrices, cp2 dp2", 4, {"cp": 2}, (MATRICES, HEAD), False, "selective"),
    ("all but the head, tp2", 2, {"tp": 2}, (r"model\..*",), False, "none"),
    ("norms, tp2 without sp", 2, {"tp": 2, "sequence_parallel": False}, (NORMS,), False, "none"),
]
FAST = ("embedding, recompute", "first stage", "all below an MLP, recompute")


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
    assert norms[0] > CLIP, "the gradients must be clipped in this test"
    compare(load_weights(tmp_path / "hf"), weights, load_weights(model), patterns, 1e-10)


def compare(got, expected, start, patterns, rel):
    """Check that frozen weights are bitwise unchanged, and that all other weights changed as expected."""
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
            f"optim.freeze: freezes {first}, but not {kept}, which are stored in the same parameter (linear_qkv, "
            "the first of 4 partly frozen parameters); freeze all weights of a parameter, or none of them"
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
    optim = {"freeze": ["nothing"], "schedule": "cosin", "optimizer": "sgd", "eps": 1e-8}
    (problems,) = run_ranks(refusal, 1, config=run_config(tiny_hf("llama"), tmp_path, optim=optim))
    assert [problem.partition(": ")[0] for problem in problems] == [
        *("optim.schedule=cosin", "parallel.distributed_optimizer=true", "optim.freeze[0]=nothing"),
    ]


def refusal(config):
    from dpo_engine.training.engine import Engine

    try:
        Engine.open(config)
    except ConfigError as error:
        return error.problems


def train_to(steps, files, model, output, ranks, *, dtype="auto", freeze=(EMBEDDING, LOWER), **sections):
    config = config_of(
        files,
        model,
        output,
        data={"validation": None},
        optim={"schedule": "constant", "weight_decay": 0.1, "freeze": list(freeze), **sections.pop("optim", {})},
        train={"max_steps": steps},
        **sections,
    )
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    return run_ranks(run, ranks, config=config)[0]


RUNS = {
    "pp2 dp2, distributed, overlap, bf16": (4, {"parallel": {"pp": 2, "overlap": True}, "dtype": "bf16"}),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "tp2, plain, bf16": (2, {"parallel": {"tp": 2, "distributed_optimizer": False}, "dtype": "bf16"}),
    "head, dp2, overlap": (2, {"parallel": {"overlap": True}, "freeze": (HEAD, NORMS), "batch": {"layout": "tree"}}),
    "pp2 vpp2 dp2, overlap": (4, {"parallel": {"pp": 2, "vpp": 2, "overlap": True}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_whole_run(name, files, tiny_hf, tmp_path):
    """Train, save, resume in the same layout, and export.

    Frozen weights must not change, and the resumed run must be bitwise equal to the uninterrupted run.
    """
    ranks, sections = RUNS[name]
    model, patterns = tiny_hf("llama"), sections.get("freeze", (EMBEDDING, LOWER))
    whole = train_to(4, files, model, tmp_path / "whole", ranks, **sections)
    for steps in (2, 4):
        resumed = train_to(steps, files, model, tmp_path / "parts", ranks, **sections)
    assert isinstance(whole, dict) and isinstance(resumed, dict), (whole, resumed)
    assert resumed["train"]["loss"] == whole["train"]["loss"]
    start, once, twice = (
        load_weights(place) for place in (model, tmp_path / "whole" / "hf", tmp_path / "parts" / "hf")
    )
    assert start.keys() == once.keys()
    for tensor, value in once.items():
        frozen = any(re.fullmatch(pattern, tensor) for pattern in patterns)
        assert torch.equal(value, start[tensor].to(torch.bfloat16 if "bf16" in name else value.dtype)) == frozen, tensor
        assert torch.equal(value, twice[tensor]), tensor
    kinds = stored_kinds(tmp_path / "whole")
    assert kinds["embedding.word_embeddings.weight"] == ({"main"} if EMBEDDING in patterns else MOMENTS)
    assert kinds["output_layer.weight"] == ({"main"} if HEAD in patterns else MOMENTS)


MOMENTS = {"main", "exp_avg", "exp_avg_sq"}


def stored_kinds(output):
    """Return, for each parameter, the kinds of tensors in the newest checkpoint, such as main weights and moments."""
    from safetensors import safe_open

    found = {}
    newest = max((output / "checkpoints").glob("step_*"))
    for path in newest.glob("*.safetensors"):
        for key in safe_open(path, "pt").keys():
            kind, parameter, *_ = key.split("|")
            found.setdefault(parameter, set()).add(kind)
    return found


@pytest.mark.slow
def test_resume_in_another_layout_or_with_other_settings(files, tiny_hf, tmp_path):
    """A run with frozen weights resumes in another layout, but not with other patterns or with another optimizer."""
    model, output = tiny_hf("llama"), tmp_path / "run"
    first = train_to(2, files, model, output, 2, parallel={"pp": 2})
    assert first["step"] == 2
    second = train_to(4, files, model, output, 2, parallel={"tp": 2})
    assert second["step"] == 4, second
    kind, message = train_to(6, files, model, output, 1, freeze=(EMBEDDING,))
    assert kind == "CheckpointError"
    assert message.endswith(
        f"step_00000004: optim.freeze was [{EMBEDDING}, {LOWER}] and is now [{EMBEDDING}]; the saved optimizer state "
        "does not fit; restore the old value, or set another train.output_dir"
    )
    plain = {"parallel": {"distributed_optimizer": False}, "optim": {"optimizer": "sgd"}}
    kind, message = train_to(6, files, model, output, 1, **plain)
    assert kind == "CheckpointError" and "optim.optimizer was adamw and is now sgd; the saved optimizer" in message
    weights = load_weights(output / "hf")
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(weights[name], load_weights(model)[name])
