"""Tests of training with adapters in fp64.

In many layouts, gradient norms and trained adapters match those of PEFT, transformers and torch's autograd.
"""

from functools import partial

import pytest

from dpo_engine.testing.hf_training import train_with_transformers
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import run_config, train_steps
from support.peft_adapters import adapter_tensors, load_adapted, make_adapter, saved_name

SIZES = [4, 3, 4]
LR, DECAY, CLIP, EPS = 3e-3, 0.1, 0.1, 1e-6
TREE = {"layout": "tree", "tokens_per_micro_batch": 80}

KINDS = {
    "lora": {},
    "dora": {"use_dora": True, "rank_pattern": {"down_proj": 2}},
    "rslora q v up, patterns": {
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 7, r"layers\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {"q_proj": 16},
    },
    "dora neox": {"use_dora": True, "target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
    "up": {"target_modules": ["up_proj"]},
    "dora fused": {"use_dora": True, "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    "dora q down, upper layers": {
        "use_dora": True,
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [2, 3],
    },
}


@pytest.fixture(scope="module")
def trained(tiny_hf, tmp_path_factory):
    """Return a function that trains with PEFT. The function trains only once for each combination of arguments.

    The function returns the directories of the model and the initial adapter, the gradient norms, and the final
    tensors of the adapter.
    """
    known = {}

    def train(kind, kv_heads=4, family="llama"):
        if (kind, kv_heads, family) not in known:
            model = tiny_hf(family, num_key_value_heads=kv_heads, pad_token_id=0)
            adapter = make_adapter(model, tmp_path_factory.mktemp("adapter"), **KINDS[kind])
            norms, tensors = train_with_transformers(
                model,
                SIZES,
                load=partial(load_adapted, adapter=adapter, trainable=True),
                decay=DECAY,
                clip=CLIP,
                lr=LR,
                eps=EPS,
            )
            final = {saved_name(name): value for name, value in tensors.items() if "lora_" in name}
            known[kind, kv_heads, family] = model, adapter, norms, final
        return known[kind, kv_heads, family]

    return train


CELLS = [
    (2, {"tp": 2}, "dora", 4, "tree", "none"),
    (4, {"tp": 2, "pp": 2, "sequence_parallel": False}, "rslora q v up, patterns", 4, "stacked", "full"),
    (2, {"tp": 2}, "dora", 1, "stacked", "none"),
    (4, {"tp": 4}, "dora", 2, "stacked", "none"),
    (1, {}, "lora", 4, "stacked", "full"),
    (1, {}, "up", 4, "stacked", "selective"),
    (1, {}, "dora", 4, "tree", "selective"),
    (2, {"tp": 2, "sequence_parallel": False}, "dora", 4, "tree", "none"),
    (4, {"tp": 2, "pp": 2}, "rslora q v up, patterns", 4, "stacked", "selective"),
    (2, {"pp": 2}, "dora q down, upper layers", 4, "tree", "full"),
    (2, {"pp": 2, "vpp": 2}, "dora q down, upper layers", 4, "stacked", "none"),
    (4, {"pp": 4}, "dora q down, upper layers", 4, "tree", "none"),
    (2, {"cp": 2}, "dora", 4, "tree", "none"),
    (2, {}, "lora", 4, "tree", "none"),
    (3, {}, "lora", 4, "stacked", "none"),
    (4, {"tp": 2, "cp": 2}, "dora", 4, "tree", "none"),
    (4, {"tp": 4}, "rslora q v up, patterns", 2, "tree", "full"),
    (4, {"tp": 4, "sequence_parallel": False}, "dora", 2, "tree", "none"),
    (4, {"tp": 4}, "dora q down, upper layers", 1, "tree", "none"),
    (8, {"tp": 2, "pp": 2, "cp": 2}, "dora", 4, "tree", "none"),
    (2, {"tp": 2}, "dora", 4, "tree", "none", "qwen2"),
    (2, {"tp": 2, "sequence_parallel": False}, "lora", 4, "stacked", "none", "qwen3"),
    (4, {"tp": 4}, "dora fused", 2, "tree", "none", "phi3"),
    (2, {"tp": 2}, "dora neox", 8, "tree", "none", "gpt_neox"),
]
FAST = 2


@pytest.mark.parametrize(
    "ranks, layout, kind, kv_heads, rows, recompute, family",
    [
        pytest.param(*cell[:6], *(cell[6:] or ["llama"]), marks=pytest.mark.slow if at >= FAST else ())
        for at, cell in enumerate(CELLS)
    ],
)
def test_training_matches_peft(ranks, layout, kind, kv_heads, rows, recompute, family, trained, tmp_path):
    model, adapter, norms, expected = trained(kind, kv_heads, family)
    config = run_config(
        model,
        tmp_path,
        model={"path": str(model), "recompute": recompute},
        adapter={"path": str(adapter)},
        parallel={**layout, "distributed_optimizer": False},
        optim={"lr": LR, "weight_decay": DECAY, "clip_grad": CLIP, "eps": EPS},
        batch=TREE if rows == "tree" else {},
    )
    results = run_ranks(train_steps, ranks, config=config, sizes=SIZES, export=str(tmp_path / "hf"), fp64=True)
    for result in results:
        assert [step["grad_norm"] for step in result["steps"]] == pytest.approx(norms, rel=1e-9)
    assert norms[0] > CLIP, "the gradients must be clipped in this test"
    found, start = adapter_tensors(tmp_path / "hf_adapter"), adapter_tensors(adapter)
    assert found.keys() == expected.keys() == start.keys()
    for name, value in expected.items():
        moved = (value - start[name]).norm()
        assert moved > 0, f"{name} was not changed by training"
        assert (found[name] - value).norm() / moved < 1e-7, name
