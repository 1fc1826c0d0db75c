"""Tests of parallel layouts: five optimizer steps in each layout must match the same five steps on one rank."""

import numpy as np
import pytest
import torch

from dpo_engine.testing.comparison import assert_same_numbers, assert_same_weights
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.testing.trajectory import load_weights, run_config, train_steps
from support.layouts import world

SIZES = [6, 6, 6, 6, 3]  # the last batch is smaller

LAYOUTS = {
    "tp2": dict(tp=2),
    "tp2 without sequence parallelism": dict(tp=2, sequence_parallel=False),
    "pp2": dict(pp=2),
    "pp4": dict(pp=4),
    "pp2 vpp2": dict(pp=2, vpp=2),
    "cp2": dict(cp=2),
    "dp2": dict(),
    "dp2 plain optimizer": dict(distributed_optimizer=False),
    "dp3": dict(),
    "tp2 pp2": dict(tp=2, pp=2),
    "tp2 cp2": dict(tp=2, cp=2),
    "pp2 dp2": dict(pp=2),
    "pp2 cp2": dict(pp=2, cp=2),
    "cp2 dp2": dict(cp=2),
    "tp2 dp2 overlapped": dict(tp=2, overlap=True),
    "pp2 dp2 overlapped": dict(pp=2, overlap=True),
    "pp2 vpp2 dp2 overlapped": dict(pp=2, vpp=2, overlap=True),
    "cp2 overlapped": dict(cp=2, overlap=True),
    "tp2 dp2 plain optimizer": dict(tp=2, distributed_optimizer=False),
    "pp2 vpp2 tp2": dict(pp=2, vpp=2, tp=2),
    "cp4": dict(cp=4),
    "pp2 vpp2 of 5 layers": dict(pp=2, vpp=2, layers=[1, 2, 1, 1]),
}


@pytest.fixture(scope="module")
def one_rank(tiny_hf, tmp_path_factory):
    """Return a function that trains on one rank. It trains only once for each combination of arguments.

    The function returns the trajectory and the directory of the exported weights.
    """
    known = {}

    def run(family="llama", sizes=SIZES, model_options=(), **sections):
        key = repr((family, sizes, model_options, sorted(sections.items())))
        if key not in known:
            model = tiny_hf(family, **dict(model_options))
            out = tmp_path_factory.mktemp("one")
            config = run_config(model, out, **sections)
            known[key] = run_ranks(train_steps, 1, config=config, sizes=sizes, export=str(out / "hf"))[0], out / "hf"
        return known[key]

    return run


def check_layout(one_rank, tiny_hf, tmp_path, name, layout, *, family="llama", model_options=(), **sections):
    expected, expected_dir = one_rank(family, model_options=model_options, **sections)
    model = tiny_hf(family, **dict(model_options))
    config = run_config(model, tmp_path, parallel=layout, **sections)
    results = run_ranks(train_steps, world(name, layout), config=config, sizes=SIZES, export=str(tmp_path / "hf"))
    for result in results:
        assert_same_numbers(result, expected, 1e-5)
    assert_same_weights(tmp_path / "hf", expected_dir, model, 1e-5)


REPEATED = (
    "tp2",
    "pp2",
    "cp2",
    "dp2",
    "cp4",
    "pp2 vpp2",
    "tp2 pp2",
    "pp2 dp2",
    "dp2 plain optimizer",
    "tp2 dp2 plain optimizer",
    "tp2 dp2 overlapped",
    "pp2 dp2 overlapped",
)
"""Layouts whose kinds of parallelism also occur in other layouts.

`test_layout_matches_one_rank` tests these layouts only in the slow suite.
"""
IN_FP64 = ("tp2 cp2", "cp2 dp2", "tp2 without sequence parallelism")
"""Layouts that test_fp64_layouts.py tests in fp64 in the default suite.

Therefore, `test_layout_matches_one_rank` tests these layouts only in the slow suite.
"""
SOME = [
    pytest.param(name, marks=pytest.mark.slow if name in REPEATED + IN_FP64 else ())
    for name in LAYOUTS
    if "layers" not in LAYOUTS[name]
]


@pytest.mark.parametrize("name", SOME)
def test_layout_matches_one_rank(name, one_rank, tiny_hf, tmp_path):
    check_layout(one_rank, tiny_hf, tmp_path, name, LAYOUTS[name])


@pytest.mark.parametrize(
    "family, options, name",
    [
        pytest.param("llama", dict(tie_word_embeddings=True), "tp2 pp2", marks=pytest.mark.slow),
        pytest.param("llama", dict(tie_word_embeddings=True), "pp2 vpp2", marks=pytest.mark.slow),
        pytest.param("llama", dict(tie_word_embeddings=True), "pp2 cp2", marks=pytest.mark.slow),
        pytest.param("llama", dict(tie_word_embeddings=True), "tp2 dp2 overlapped", marks=pytest.mark.slow),
        pytest.param("llama", dict(tie_word_embeddings=True), "pp2 dp2 overlapped", marks=pytest.mark.slow),
        pytest.param("llama", dict(num_key_value_heads=1), "tp2", marks=pytest.mark.slow),
        pytest.param("qwen2", dict(), "tp2 cp2", marks=pytest.mark.slow),
        pytest.param("qwen3", dict(head_dim=16), "tp2 pp2", marks=pytest.mark.slow),
        pytest.param("qwen3", dict(head_dim=16), "tp2 without sequence parallelism", marks=pytest.mark.slow),
        pytest.param("mistral", dict(), "pp2 cp2", marks=pytest.mark.slow),
        pytest.param("llama", dict(num_hidden_layers=5), "pp2 vpp2 of 5 layers", marks=pytest.mark.slow),
    ],
)
def test_families_in_layouts(family, options, name, one_rank, tiny_hf, tmp_path):
    model_options = tuple(options.items())
    check_layout(one_rank, tiny_hf, tmp_path, name, LAYOUTS[name], family=family, model_options=model_options)


@pytest.mark.parametrize(
    "name, size",
    [
        ("dp2", "260 tokens"),
        ("pp2", 4),
        ("pp2 vpp2", "260 tokens"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("dp2", 4), ("pp2", "260 tokens"), ("pp2 vpp2", 4))),
    ],
)
def test_micro_batch_size_changes_nothing(name, size, one_rank, tiny_hf, tmp_path):
    """A micro-batch of at most 260 tokens has room for four pairs with long rows, or for six pairs with short rows."""
    expected, expected_dir = one_rank()
    model = tiny_hf("llama")
    tokens = {"batch": {"layout": "stacked", "tokens_per_micro_batch": 260}, "train": {"micro_batch_size": None}}
    sized = {"train": {"micro_batch_size": size}} if size == 4 else tokens
    config = run_config(model, tmp_path, parallel=LAYOUTS[name], **sized)
    results = run_ranks(
        train_steps, world(name, LAYOUTS[name]), config=config, sizes=SIZES, export=str(tmp_path / "hf")
    )
    assert_same_numbers(results[0], expected, 1e-5)
    assert_same_weights(tmp_path / "hf", expected_dir, model, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [dict(tp=2, pp=2, cp=2), dict(tp=2, pp=2, vpp=2), dict(pp=2, vpp=2, cp=2)], ids=str)
def test_eight_ranks(layout, one_rank, tiny_hf, tmp_path):
    expected, expected_dir = one_rank()
    model = tiny_hf("llama")
    config = run_config(model, tmp_path, parallel=layout)
    results = run_ranks(train_steps, 8, config=config, sizes=SIZES, export=str(tmp_path / "hf"))
    assert_same_numbers(results[7], expected, 1e-5)
    assert_same_weights(tmp_path / "hf", expected_dir, model, 1e-5)


@pytest.mark.parametrize(
    "name, recompute",
    [
        ("tp2 pp2", "selective"),
        pytest.param("cp2", "full", marks=pytest.mark.slow),
        pytest.param("tp2 pp2", "full", marks=pytest.mark.slow),
        pytest.param("cp2", "selective", marks=pytest.mark.slow),
    ],
)
def test_recomputation_changes_nothing(name, recompute, one_rank, tiny_hf, tmp_path):
    expected, expected_dir = one_rank()
    model = tiny_hf("llama")
    config = run_config(model, tmp_path, parallel=LAYOUTS[name], model={"path": str(model), "recompute": recompute})
    results = run_ranks(
        train_steps, world(name, LAYOUTS[name]), config=config, sizes=SIZES, export=str(tmp_path / "hf")
    )
    assert_same_numbers(results[0], expected, 1e-5)
    assert_same_weights(tmp_path / "hf", expected_dir, model, 1e-5)


@pytest.mark.parametrize(
    "name", ["cp2 dp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2 pp2", "pp2 vpp2"))]
)
def test_same_layout_is_bitwise_reproducible(name, tiny_hf, tmp_path):
    model = tiny_hf("llama")
    config = run_config(model, tmp_path, parallel=LAYOUTS[name])
    first, second = (
        run_ranks(train_steps, world(name, LAYOUTS[name]), config=config, sizes=SIZES, export=str(tmp_path / run))
        for run in ("first", "second")
    )
    assert first == second
    a, b = (load_weights(tmp_path / run) for run in ("first", "second"))
    assert all(a[key].equal(b[key]) for key in a)


@pytest.mark.parametrize(
    "name", ["tp2 pp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dp2", "dp2 plain optimizer"))]
)
def test_bf16_with_fp32_main_weights(name, one_rank, tiny_hf, tmp_path):
    """bf16 has only 8 significant bits. The tolerances allow for the rounding of weights and activations."""
    expected, expected_dir = one_rank()
    model = tiny_hf("llama")
    config = run_config(model, tmp_path, parallel=LAYOUTS[name], model={"path": str(model), "dtype": "bf16"})
    result = run_ranks(
        train_steps, world(name, LAYOUTS[name]), config=config, sizes=SIZES, export=str(tmp_path / "hf")
    )[0]
    assert result["steps"][0]["loss"] == pytest.approx(expected["steps"][0]["loss"], abs=1e-6)
    for got, want in zip(result["steps"], expected["steps"], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=0.05)
        assert got["logps/chosen"] == pytest.approx(want["logps/chosen"], rel=0.02)
    got_weights, weights, start = (load_weights(d) for d in (tmp_path / "hf", expected_dir, model))
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        moved, expected_move = got_weights[name] - start[name].bfloat16().float(), weights[name] - start[name]
        assert torch.cosine_similarity(moved.flatten(), expected_move.flatten(), dim=0) > 0.8, name


def gradient_norm(scale_weights: float, config):
    """Return the loss and gradient norm of one step in which all pair weights are multiplied by ``scale_weights``."""
    from dpo_engine.testing.pairs import RandomPairs
    from dpo_engine.testing.trajectory import VOCAB
    from dpo_engine.training.engine import Engine, batch_facts
    from dpo_engine.training.references import open_reference
    from dpo_engine.training.step import train_step

    engine = Engine.open(config)
    pairs = RandomPairs(4, VOCAB)
    pairs.pairs = [pair._replace(weight=pair.weight * scale_weights) for pair in pairs.pairs]
    pairs.weights = pairs.weights * scale_weights
    trained = engine.load_policy(total_steps=1)
    metrics = train_step(
        trained,
        open_reference(engine, trained.chunks),
        engine.batches(pairs, np.arange(4)),
        engine.objective,
        known=batch_facts(pairs, np.arange(4)),
        vocab_size=VOCAB,
        groups=engine.groups,
    )
    engine.close()
    return metrics["loss"], metrics["grad_norm"]


@pytest.mark.parametrize(
    "layout, ranks",
    [({"cp": 2}, 2), pytest.param({"cp": 4}, 4, marks=pytest.mark.slow), ({}, 2), ({"pp": 2}, 2)],
    ids=str,
)
def test_gradient_scale_does_not_depend_on_the_megatron_version(layout, ranks, tiny_hf, tmp_path):
    """Some versions of Megatron multiply losses by the CP size and divide them by the number of micro-batches.

    The engine must prevent this scaling. A common factor of all pair weights must not change the results either.
    """
    config = run_config(tiny_hf("llama"), tmp_path, parallel=layout, train={"micro_batch_size": 1})
    one = run_config(tiny_hf("llama"), tmp_path, train={"micro_batch_size": 4})
    expected = run_ranks(gradient_norm, 1, config=one, scale_weights=1.0)[0]
    got = run_ranks(gradient_norm, ranks, config=config, scale_weights=3.0)[0]
    assert got == pytest.approx(expected, rel=1e-5)
