"""Tests that compare the engine's counts of operations with torch's counter and the benchmarks' formulas.

The tests also compare the predicted shapes of padded rows with those of the micro-batches, and check when `mfu` is
reported.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_engine.batching.micro_batches import padded_rows, stacked_batches
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.testing.pairs import RandomPairs
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import VOCAB, run_config
from support.family_cases import CASES
from support.small_run import config_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "cp2": (2, {"cp": 2}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
}


def flops_module():
    spec = importlib.util.spec_from_file_location("flops", BENCHMARKS / "flops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counted(config):
    """Return torch's count for this rank, and the engine's three counts for all ranks.

    Each count is for one forward pass. Torch's count is the number of operations; with cp, it is 0. The engine's counts
    are the number of tokens, the number of operations in the run's layout, and the number of operations that the
    stacked layout would need.
    """
    import torch.distributed as dist

    from dpo_engine.scoring.reference import score
    from dpo_engine.training.engine import Engine
    from dpo_engine.training.work import forward_work, padded_flops

    engine = Engine.open(config)
    pairs, indices = RandomPairs(6, VOCAB), np.arange(6)
    chunks = engine.load_model(config.model.path)
    batches = engine.batches(pairs, indices)
    with flops_module().executed_flops() as counter, torch.no_grad():
        if engine.groups.cp.size() == 1:  # the counter cannot handle the attention mask with cp
            score(chunks, batches, vocab_size=engine.arch.vocab_size, groups=engine.groups)
    work = forward_work(engine.arch, batches)
    dist.all_reduce(work, group=engine.groups.dp_cp)
    dims, sequence = engine.groups.dims, engine.sequence_parallel
    padded = padded_flops(engine.arch, pairs, indices, config, dims, sequence)
    tokens, products, attention = work.tolist()
    return counter.get_total_flops(), tokens, products + attention, padded


@pytest.mark.parametrize("name, family", [*((name, "llama") for name in LAYOUTS), ("one", "starcoder2")])
def test_operations_are_those_that_torch_executes(name, family, tiny_hf, tmp_path):
    """The cases include StarCoder2, because its MLPs have no gate."""
    ranks, parallel = LAYOUTS[name]
    config = run_config(tiny_hf(family), tmp_path, parallel=parallel, train={"micro_batch_size": 2})
    results = run_ranks(counted, ranks, config=config)
    if name != "cp2":
        assert results[0][2] == pytest.approx(sum(result[0] for result in results), rel=1e-3)
    assert results[0][3] == pytest.approx(results[0][2], rel=1e-12), "the stacked layout has no gain over itself"


def test_trees_count_what_is_computed(tiny_hf, tmp_path):
    config = run_config(tiny_hf("llama"), tmp_path, batch={"layout": "tree"}, train={"micro_batch_size": 2})
    (result,) = run_ranks(counted, 1, config=config)
    flops = flops_module()
    shape = flops.Shape.read(tiny_hf("llama"))
    expected = sum(
        flops.tree_flops(shape, len(pair.prompt), [len(pair.chosen), len(pair.rejected)])
        for pair in RandomPairs(6, VOCAB).pairs
    )
    assert result[2] == pytest.approx(expected, rel=0.02)
    assert result[3] / result[2] > 1.2


@pytest.mark.parametrize("layout", ["stacked", "tree"])
def test_count_includes_only_keys_inside_the_window(layout, tiny_hf):
    """The variable `expected` is the number of keys that a token sees in a layer, summed over all layers and tokens.

    In the tree layout, the sum for the last layer includes only those tokens that predict a scored token.
    """
    from dpo_engine.batching.batches import collate
    from dpo_engine.batching.trees import needed_columns, plant
    from dpo_engine.model.architecture import read_architecture
    from dpo_engine.training.work import forward_work

    full = read_architecture(tiny_hf("qwen2", max_window_layers=2, use_sliding_window=False))
    arch = read_architecture(tiny_hf("qwen2", max_window_layers=2, use_sliding_window=True, sliding_window=5))
    assert arch.windows == [None] * 2 + [5] * (arch.num_layers - 2) and arch.num_layers > 2
    pairs = [RandomPairs(3, VOCAB)[i] for i in range(3)]
    if layout == "tree":
        batch = plant(pairs, range(3), pad_id=0)
        batch.columns = needed_columns(batch, 1)
        sequences = [
            [*range(len(p.prompt)), *(len(p.prompt) + i for r in p[1:3] for i in range(len(r)))] for p in pairs
        ]
        tokens = [position for sequence in sequences for position in sequence]
        last = batch.positions[batch.columns].tolist()
    else:
        batch = collate(pairs, range(3), pad_id=0)
        tokens = last = [*range(batch.tokens.shape[1])] * 6
    seen = {window: sum(min(at + 1, window) for at in tokens) for window in (5, 10**9)}
    expected = 2 * seen[10**9] + (arch.num_layers - 3) * seen[5] + sum(min(at + 1, 5) for at in last)
    counted, unlimited = forward_work(arch, [batch]), forward_work(full, [batch])
    assert counted[2].item() == 4 * arch.query_size * expected
    assert torch.equal(counted[:2], unlimited[:2]) and counted[2] < unlimited[2]


STEPS = {
    "stacked": ("stacked", 1, {}, "resident", "sigmoid"),
    "stacked tp2, stored": ("stacked", 2, {"tp": 2}, "stored", "sigmoid"),
    "stacked pp2": ("stacked", 2, {"pp": 2}, "resident", "sigmoid"),
    "stacked dp2, coupled": ("stacked", 2, {}, "resident", "aot"),
    "tree, stored": ("tree", 1, {}, "stored", "sigmoid"),
    "tree tp2": ("tree", 2, {"tp": 2}, "resident", "sigmoid"),
    "tree pp2, no reference": ("tree", 2, {"pp": 2}, "none", "simpo"),
    # The embedding is frozen. With two stages, its output nevertheless requires a gradient, because the output of the
    # first stage must require one. The backward pass therefore computes the input gradient of every product. The
    # test adapts only projections that are not fused: a fused linear would put the matrices B of its adapters into one
    # block matrix with zeros, and torch would count the products with these zeros.
    "stacked pp2, adapter": ("stacked", 2, {"pp": 2}, "shared", "sigmoid"),
}


def step_operations(config):
    """Run one training step. Return torch's counts of this rank's products and attention, and the engine's count.

    The engine's count is for all ranks, and is computed from ``mfu``. Torch's count of attention has two parts: the
    forward passes and the backward passes.
    """
    from dpo_engine.training import work
    from dpo_engine.training.engine import Engine, batch_facts
    from dpo_engine.training.references import open_reference
    from dpo_engine.training.step import train_step

    engine = Engine.open(config)
    pairs, indices = RandomPairs(6, VOCAB), np.arange(6)
    trained = engine.load_policy(total_steps=1)
    reference = open_reference(engine, trained.chunks, pairs=[pairs])
    batches = engine.batches(pairs, indices)
    sizes = {"vocab_size": engine.arch.vocab_size, "groups": engine.groups}
    with flops_module().executed_flops() as counter:
        train_step(trained, reference, batches, engine.objective, known=batch_facts(pairs, indices), **sizes)
    counts = {str(name): count for name, count in counter.flop_counts["Global"].items()}
    forward = sum(count for name, count in counts.items() if "attention" in name and "backward" not in name)
    backward = sum(count for name, count in counts.items() if "attention" in name and "backward" in name)
    work.peak_flops = lambda platform, dtype: 1.0
    mfu = (
        work.speed(engine, reference, work.count_work(engine, pairs, indices, batches), 1.0)["mfu"]
        * engine.groups.dims.world
    )
    return sum(counts.values()) - forward - backward, forward, backward, mfu


def tree_attention(shape):
    """Return the number of operations of attention in one forward pass over trees.

    Each pair is one tree: a prompt, followed by two responses that do not see each other.

    The last layer computes attention only for queries of tokens that predict a token of a response. These tokens are
    the prompt's last token, and all tokens of each response except its last token.
    """
    area = last = 0
    for pair in RandomPairs(6, VOCAB).pairs:
        prompt, responses = len(pair.prompt), [len(pair.chosen), len(pair.rejected)]
        area += prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in responses)
        last += prompt + sum((n - 1) * prompt + n * (n - 1) / 2 for n in responses)
    return 4 * shape.heads * shape.head_dim * ((shape.layers - 1) * area + last)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "tree, stored" else pytest.mark.slow) for name in STEPS]
)
def test_mfu_counts_what_a_whole_step_executes(name, tiny_hf, tmp_path):
    """Compare the engine's count with torch's count, apart from known differences.

    For stacked rows, the engine counts attention's backward pass as the work of 2 forward passes. Torch's kernel does
    the work of 2.5 forward passes.

    For trees, attention has a mask, and torch counts every (query, key) pair of a row. The test therefore takes the
    operations of attention from a formula. It takes the operations of all other products from torch's count.

    The engine does not count the small matrix products that compute metrics. For this tiny model, they are 0.25 % of
    the operations.
    """
    layout, ranks, parallel, mode, loss = STEPS[name]
    reference = {"mode": mode, **({"store": str(tmp_path / "store")} if mode == "stored" else {})}
    sections = {"batch": {"layout": layout}, "parallel": parallel, "reference": reference, "loss": {"name": loss}}
    if mode == "shared":
        sections["adapter"] = {"targets": ["o_proj", "down_proj"], "rank": 4}
    config = run_config(tiny_hf("llama"), tmp_path, train={"micro_batch_size": 2}, **sections)
    results = run_ranks(step_operations, ranks, config=config)
    products, forward, backward = (sum(result[i] for result in results) for i in range(3))
    flops = flops_module()
    if layout == "stacked":
        expected = products + forward + backward * 2 / flops.FLASH_BACKWARD
    else:
        passes = 3 + (mode == "resident")
        attention = tree_attention(flops.Shape.read(tiny_hf("llama")))
        expected = products + passes * attention
    assert results[0][3] == pytest.approx(expected, rel=4e-3)


@pytest.mark.parametrize(
    "parallel", [{}, {"tp": 2}, {"cp": 2}, {"pp": 2, "vpp": 2}, {"tp": 2, "pp": 2}], ids=lambda given: str(given)
)
@pytest.mark.parametrize("size, tokens", [(1, "auto"), (3, "auto"), (None, 130), (None, 500)])
@pytest.mark.parametrize("world", [4, 12])
def test_padded_rows_are_those_of_all_ranks(world, size, tokens, parallel):
    batch = {"layout": "stacked", "tokens_per_micro_batch": tokens}
    config = run_config("m", "o", train={"micro_batch_size": size}, parallel=parallel, batch=batch)
    dims = ParallelDims(world=world, **parallel)
    pairs, indices = RandomPairs(19, VOCAB), np.random.default_rng(0).permutation(19)[:17]
    expected = [
        tuple(batch.tokens.shape)
        for rank in range(dims.dp)
        for batch in stacked_batches(pairs, indices, config, dims, rank, dims.tp > 1)
    ]
    got = padded_rows(pairs, indices, config, dims, dims.tp > 1)
    assert sorted(map(tuple, got.tolist())) == sorted(expected)


def reported(config):
    """Train as if the peak FLOP/s of the device were known, and return the metrics of the last step."""
    from dpo_engine.training import work
    from support.small_run import run

    work.peak_flops = lambda platform, dtype: 1e12
    return run(config)["train"]


@pytest.mark.parametrize(
    "family, frozen",
    [
        pytest.param("llama", {}, id="all weights", marks=pytest.mark.slow),
        pytest.param("llama", {"optim": {"freeze": [r"lm_head\.weight"]}}, id="frozen"),
        pytest.param("qwen3_moe", {"train": {"freeze_router": True}}, id="frozen router", marks=pytest.mark.slow),
    ],
)
def test_mfu_is_reported_only_if_all_weights_are_trained(family, frozen, files, tiny_hf, tmp_path):
    config = config_of(
        files,
        tiny_hf(family, num_hidden_layers=2),
        tmp_path,
        data={"validation": None},
        optim=frozen.get("optim", {}),
        train={"max_steps": 1, **frozen.get("train", {})},
        checkpoint={"export": False},
    )
    (metrics,) = run_ranks(reported, 1, config=config)
    assert ("mfu" in metrics) == (not frozen) and metrics["tokens_per_s"] > 0


def counted_products(config):
    """Return torch's count of this rank's products with weight matrices, and the engine's count for all ranks.

    Each count is for one forward pass. Products in attention are left out: they are batched (``bmm``) or in a kernel.
    """
    import torch.distributed as dist

    from dpo_engine.scoring.reference import score
    from dpo_engine.training.engine import Engine
    from dpo_engine.training.work import forward_work

    engine = Engine.open(config)
    batches = engine.batches(RandomPairs(6, VOCAB), np.arange(6))
    chunks = engine.load_model(config.model.path)
    with flops_module().executed_flops() as counter, torch.no_grad():
        score(chunks, batches, vocab_size=engine.arch.vocab_size, groups=engine.groups)
    counts = {str(name): count for name, count in counter.flop_counts["Global"].items()}
    work = forward_work(engine.arch, batches)
    dist.all_reduce(work, group=engine.groups.dp_cp)
    return sum(count for name, count in counts.items() if "mm" in name and "bmm" not in name), work[1].item()


@pytest.mark.parametrize(
    "family, ranks, parallel, layout",
    [
        ("llama", 2, {"cp": 2}, "tree"),  # torch's counter cannot handle the mask of stacked rows with cp
        *((family, 1, {}, "tree") for family in ("olmoe", "deepseek_v3", "gemma2")),
        *(
            pytest.param(family, 1, {}, "stacked", marks=pytest.mark.slow)
            for family in ("olmoe", "deepseek_v3", "gemma2")
        ),
    ],
)
def test_products_of_a_forward_pass_are_those_that_torch_executes(family, ranks, parallel, layout, tiny_hf, tmp_path):
    """A token needs the products of only those experts that the router chose for this token."""
    sizes = {"num_hidden_layers": 2, **CASES.get(family, (family, {}))[1]}
    config = run_config(tiny_hf(family, **sizes), tmp_path, parallel=parallel, batch={"layout": layout})
    results = run_ranks(counted_products, ranks, config=config)
    assert results[0][1] == pytest.approx(sum(executed for executed, _ in results), rel=1e-3)
