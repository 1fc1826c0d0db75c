"""Tests of tree attention: every backend must match causal attention in fp64 on each path from root to leaf."""

import numpy as np
import pytest
import torch

from dpo_kernels import Tree, dispatch, eager, sdpa, varlen
from support.interpreter import mend

TREES = {
    "one token": ([1], [-1]),
    "no branch": ([70], [-1]),
    "pair": ([37, 21, 44], [-1, 0, 0]),
    "one-token prompt": ([1, 170, 17], [-1, 0, 0]),
    "one-token responses": ([90, 1, 1], [-1, 0, 0]),
    "pairs": ([20, 5, 9, 1, 33, 2, 64, 16, 16], [-1, 0, 0, -1, 3, 3, -1, 6, 6]),
    "short pairs": ([5, 3, 2] * 9, [p for i in range(9) for p in (-1, 3 * i, 3 * i)]),
    "short and long pairs": (
        [9, 2, 4, 80, 30, 11, 1, 1, 1, 20, 20, 24, 3],
        [-1, 0, 0, -1, 3, 3, -1, 6, 6, -1, 9, 9, -1],
    ),
    "many leaves": ([40, *range(1, 14)], [-1, *[0] * 13]),
    "deep": ([33, 10, 1, 48, 7, 20, 3, 65, 5], [-1, 0, 1, 2, 2, 1, 5, 0, -1]),
    "long": ([100, 300, 140, 7], [-1, 0, 0, 2]),
}

SHARED = ([700, 260, 300] * 2 + [1200, 90, 40, 60, 30], [-1, 0, 0, -1, 3, 3, -1, 6, 6, 6, 6])


@pytest.fixture
def triton_backend(monkeypatch):
    """Return the Triton backend. Without a GPU, it gets small blocks, so that short rows have many blocks."""
    pytest.importorskip("triton")
    mend()
    from dpo_kernels import triton_attention, triton_backend

    if not torch.cuda.is_available():
        small = triton_attention.Blocks(queries=64, keys=32, warps=4, stages=1, key_stages=1)
        monkeypatch.setattr(triton_attention, "INTERPRETED", small)
    return triton_backend


@pytest.fixture
def backends(triton_backend):
    return {"eager": eager, "sdpa": sdpa, "varlen": varlen, "triton": triton_backend}


def paths(tree: Tree) -> list[list[int]]:
    """Return the token indices of each path from a root to a leaf."""
    starts = [sum(tree.lengths[:s]) for s in range(len(tree.lengths))]
    found = []
    for leaf in set(range(len(tree.lengths))) - set(tree.parents.tolist()):
        path, segment = [], leaf
        while segment >= 0:
            path = [*range(starts[segment], starts[segment] + tree.lengths[segment]), *path]
            segment = int(tree.parents[segment])
        found.append(path)
    return found


def unshared(query, key, value, tree, scale):
    """Run causal attention on each path as a separate row. For a token on several paths, compute one result."""
    group = query.shape[1] // key.shape[1]
    of_token = {int(token): i for i, token in enumerate(tree.rows)}
    outputs, order, done = [], [], set()
    for path in paths(tree):
        k, v = (t[path].repeat_interleave(group, dim=1) for t in (key, value))
        places = [place for place, token in enumerate(path) if token in of_token and token not in done]
        done |= {path[place] for place in places}
        order += [of_token[path[place]] for place in places]
        scores = torch.einsum("qhd,khd->hqk", query[[of_token[path[place]] for place in places]], k) * scale
        behind = torch.arange(len(path))[None, :] > torch.tensor(places, dtype=torch.long)[:, None]
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(behind, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)[torch.tensor(order).argsort()]


def tensors(tree, heads, kv_heads, d, d_v, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(tree.n + d)
    sizes = [(len(tree.rows), heads, d), (tree.n, kv_heads, d), (tree.n, kv_heads, d_v), (len(tree.rows), heads, d_v)]
    query, key, value, grad = (torch.randn(size, generator=generator).to(dtype).to(device) for size in sizes)
    return [t.requires_grad_() for t in (query, key, value)], grad


def with_grads(attention, inputs, grad, tree, scale=None):
    out = attention(*inputs, tree, scale)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def compare(
    attention, tree, heads=2, kv_heads=2, d=16, d_v=None, scale=None, dtype=torch.float32, rtol=1e-5, atol=2e-5
):
    """Compare the output and gradients of ``attention`` with those of :func:`unshared`, computed in fp64."""
    inputs, grad = tensors(tree, heads, kv_heads, d, d_v or d, dtype)
    got = with_grads(attention, inputs, grad, tree, scale)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = with_grads(unshared, exact, grad.double(), tree, d**-0.5 if scale is None else scale)
    for result, expected in zip(got, wanted, strict=True):
        assert result.dtype == dtype and result.shape == expected.shape
        torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen", "triton"])
@pytest.mark.parametrize("shape", TREES)
def test_tree_shapes(name, shape, backends):
    compare(backends[name].tree_attention, Tree.of(*TREES[shape]))


HEADS = [(4, 4, 8, 8), (4, 2, 64, 64), (8, 1, 80, 80), (3, 3, 128, 128), (4, 2, 24, 16), (2, 1, 16, 40)]


@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen", "triton"])
@pytest.mark.parametrize("heads, kv_heads, d, d_v", HEADS)
def test_head_counts_and_sizes(name, heads, kv_heads, d, d_v, backends):
    tree = Tree.of([19, 8, 1, 30, 5], [-1, 0, 1, 1, 0])
    compare(backends[name].tree_attention, tree, heads, kv_heads, d, d_v, scale=0.3)


def shares(tree: Tree, cp: int) -> list[np.ndarray]:
    """Return the tokens of each context-parallel rank when blocks of 8 tokens are distributed in zigzag order."""
    dealt = np.minimum(np.arange(tree.n) // 8 % (2 * cp), 2 * cp - 1 - np.arange(tree.n) // 8 % (2 * cp))
    return [np.flatnonzero(dealt == rank) for rank in range(cp)]


@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen", "triton"])
@pytest.mark.parametrize("shape", ["pairs", "many leaves", "deep"])
def test_queries_may_be_any_subset_of_the_row(name, shape, backends):
    whole = Tree.of(*TREES[shape])
    generator = np.random.default_rng(1)
    scattered = np.flatnonzero(generator.random(whole.n) < 0.3)
    leaves = np.flatnonzero(np.repeat(~np.isin(np.arange(len(whole.lengths)), whole.parents), whole.lengths))
    for rows in (*shares(whole, 2), scattered, leaves, [0], [whole.n - 1]):
        compare(backends[name].tree_attention, whole.select(rows))


@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen", "triton"])
def test_gradients_of_shards_add_up_to_those_of_the_row(name, backends):
    tree = Tree.of(*TREES["pairs"])
    (query, key, value), grad = tensors(tree, 2, 1, 16, 16, torch.float32)
    expected = with_grads(backends[name].tree_attention, [query, key, value], grad, tree)
    d_key = d_value = 0
    for rows in shares(tree, 3):
        got = with_grads(backends[name].tree_attention, [query[rows], key, value], grad[rows], tree.select(rows))
        torch.testing.assert_close(got[0], expected[0][rows])
        torch.testing.assert_close(got[1], expected[1][rows], rtol=1e-5, atol=1e-6)
        d_key, d_value = d_key + got[2], d_value + got[3]
    torch.testing.assert_close(d_key, expected[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_value, expected[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen", "triton"])
def test_shard_without_queries_has_gradients(name, backends):
    """A rank without queries must still take part in the collective that sums the gradients of keys and values."""
    tree = Tree.of(*TREES["pair"]).select([])
    inputs, grad = tensors(tree, 4, 2, 16, 8, torch.float32)
    out, d_query, d_key, d_value = with_grads(backends[name].tree_attention, inputs, grad, tree)
    assert out.shape == (0, 4, 8) and d_query.shape == (0, 4, 16)
    assert (d_key == 0).all() and (d_value == 0).all()


@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen", "triton"])
def test_inputs_may_be_views(name, backends):
    """Query, key and value may be slices of larger tensors. The heads of such a slice are not adjacent in memory."""
    tree = Tree.of(*TREES["pair"])
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(tree.n, heads, 48, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
    views = [tensor[..., 16:32] for tensor in wide]
    got = backends[name].tree_attention(*views, tree)
    exact = [view.detach().double().requires_grad_() for view in views]
    expected = unshared(*exact, tree, 0.25)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(got.shape, generator=generator)
    got.backward(grad)
    expected.backward(grad.double())
    for tensor, wanted in zip(wide, exact, strict=True):
        torch.testing.assert_close(tensor.grad[..., 16:32].double(), wanted.grad, rtol=1e-4, atol=1e-5)
        assert not tensor.grad[..., :16].any() and not tensor.grad[..., 32:].any()


@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen"])
def test_gradcheck(name, backends):
    tree = Tree.of([3, 2, 1, 2, 2], [-1, 0, 1, 1, 0]).select([0, 2, 4, 5, 6, 7, 9])
    inputs, _ = tensors(tree, 4, 2, 3, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: backends[name].tree_attention(q, k, v, tree), inputs)


@pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen", "triton"])
def test_half_precision(name, dtype, atol, backends):
    compare(backends[name].tree_attention, Tree.of(*TREES["deep"]), 4, 2, 16, dtype=dtype, rtol=1e-2, atol=atol)


def test_triton_refuses_fp64(triton_backend):
    tree = Tree.of([2], [-1])
    inputs, _ = tensors(tree, 1, 1, 16, 16, torch.float64)
    with pytest.raises(
        ValueError, match="triton tree_attention: does not support fp64, because it sums in fp32; use the backend sdpa"
    ):
        triton_backend.tree_attention(*inputs, tree)


def test_triton_refuses_fp64_in_the_output_layer(triton_backend):
    rows = torch.zeros(2, 16, dtype=torch.float64)
    targets, several = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.float64)
    for scored in (
        lambda: triton_backend.linear_stats(rows, rows, targets, 0, 2, chunk=2),
        lambda: triton_backend.linear_keep(rows, rows, targets, 0, 2),
        lambda: triton_backend.linear_grad(rows, rows, targets, several, several, 0, 2, chunk=2, d_weight=None),
    ):
        with pytest.raises(
            ValueError, match="triton output layer: does not support fp64, because it sums in fp32; use the backend ea"
        ):
            scored()


def test_tile_lists_are_built_once_per_tree(triton_backend):
    tree = Tree.of(*TREES["pair"])
    inputs, _ = tensors(tree, 2, 1, 16, 16, torch.float32)
    for attention in (sdpa.tree_attention, triton_backend.tree_attention):
        attention(*inputs, tree)
        before = dict(tree._prepared)
        attention(*inputs, tree)
        assert before and all(tree._prepared[name] is made for name, made in before.items())


def test_rows_of_different_lengths_share_a_mask():
    """The trees of hundreds of rows stay in memory. If each tree kept its own mask, the masks would take gigabytes."""
    sdpa._corner.cache_clear()
    for n in range(140, 250):
        tree = Tree.of([n - 20, 10, 10], [-1, 0, 0])
        inputs, _ = tensors(tree, 1, 1, 8, 8, torch.float32)
        sdpa.tree_attention(*inputs, tree)
        assert not any(isinstance(made, torch.Tensor) for made in tree._prepared.values())
    assert sdpa._corner.cache_info().currsize == 1


@pytest.mark.parametrize(
    "lengths, parents, rows, message",
    [
        ([3, 2], [-1], None, r"lengths has the shape \(2,\), and parents has the shape \(1,\); both must be non-empty"),
        ([], [], None, r"lengths has the shape \(0,\)"),
        ([3, 0, 2], [-1, 0, 0], None, "segment 1 has no tokens; leave it out"),
        ([3, 2, 2, 2], [-1, 0, -1, 1], None, "segment 3 has parent 1; the parent must be the previous segment, an"),
        ([3, 2], [-1, 1], None, "segment 1 has parent 1"),
        ([3, 2], [-1, -2], None, "segment 1 has parent -2"),
        ([3, 2], [-1, 0], [0, 3, 3], "rows must be strictly ascending indices, each between 0 and 4"),
        ([3, 2], [-1, 0], [2, 1], "rows must be strictly ascending"),
        ([3, 2], [-1, 0], [0, 5], "each between 0 and 4"),
        ([3, 2], [-1, 0], [-1, 2], "each between 0 and 4"),
        ([3, 2], [-1, 0], [[0, 2]], "each between 0 and 4"),
    ],
)
def test_invalid_trees_are_refused(lengths, parents, rows, message):
    with pytest.raises(ValueError, match=message):
        Tree.of(lengths, parents, rows)


def test_docstring_examples():
    import doctest

    from dpo_kernels import tree

    for module in (tree, varlen):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a CUDA device")
@pytest.mark.parametrize("d", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.bfloat16, 6e-2), (torch.float16, 8e-3)])
def test_on_a_gpu(d, dtype, atol, triton_backend):
    tree = Tree.of(*SHARED)
    for rows in (None, shares(tree, 2)[1]):
        some = tree if rows is None else tree.select(rows)
        inputs, grad = tensors(some, 8, 2, d, d, dtype, "cuda")
        wide = [t.detach().double().requires_grad_() for t in inputs]
        expected = with_grads(eager.tree_attention, wide, grad.double(), some)
        flash = dtype is not torch.float32
        for attention in (triton_backend.tree_attention, sdpa.tree_attention, *[varlen.tree_attention] * flash):
            got = with_grads(attention, inputs, grad, some)
            for result, want in zip(got, expected, strict=True):
                torch.testing.assert_close(result.double(), want, rtol=1e-2, atol=atol)
        torch.use_deterministic_algorithms(True)  # otherwise, flash attention's backward pass is not deterministic
        try:
            for attention in (triton_backend.tree_attention, *[varlen.tree_attention] * flash):
                again, first = (with_grads(attention, inputs, grad, some) for _ in range(2))
                assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True)), "two runs gave different bits"
        finally:
            torch.use_deterministic_algorithms(False)


def test_dispatch_uses_the_chosen_backend(monkeypatch):
    """The public function must call the chosen backend."""
    monkeypatch.setattr(dispatch, "_chosen", {})
    tree = Tree.of(*TREES["pair"])
    inputs, _ = tensors(tree, 2, 1, 16, 16, torch.float32)
    for name, module in (("eager", eager), ("sdpa", sdpa)):
        dispatch.use_backend(name, "attention")
        assert torch.equal(dispatch.tree_attention(*inputs, tree), module.tree_attention(*inputs, tree))
