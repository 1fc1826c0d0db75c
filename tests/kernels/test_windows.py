"""Tests of windows, soft caps and sinks: every backend must match the definition of attention.

The expected values and gradients are computed by this definition in fp64, with autograd and an explicit mask. A token's
mask is built by walking from the token toward the root of its tree, one token at a time.
"""

import itertools

import numpy as np
import pytest
import torch
from test_tiles import CountScores, random_tree
from test_tree_attention import TREES, backends, shares, tensors, triton_backend

from dpo_kernels import Tree, eager, sdpa, varlen
from dpo_kernels.tiles import Blocks, tile_matrix

__all__ = ["backends", "triton_backend"]  # fixtures

BACKENDS = ["eager", "sdpa", "varlen", "triton"]
WINDOWS = [None, 1, 3, 50, 129, 1000]
SHAPES = ["pair", "short pairs", "deep", "long", "no branch"]
CAP = 0.7


def walked(tree: Tree, window: int | None) -> torch.Tensor:
    """Return which keys each query sees within the window, [n_q, n] bool."""
    starts = np.concatenate([[0], np.cumsum(tree.lengths)[:-1]])
    segment_of = np.repeat(np.arange(len(tree.lengths)), tree.lengths)
    seen = torch.zeros(len(tree.rows), tree.n, dtype=torch.bool)
    for query, token in enumerate(tree.rows.tolist()):
        steps = 0
        while token >= 0 and (window is None or steps < window):
            seen[query, token] = True
            segment = segment_of[token]
            parent = tree.parents[segment]
            if token > starts[segment]:
                token -= 1
            else:
                token = -1 if parent < 0 else int(starts[parent] + tree.lengths[parent] - 1)
            steps += 1
    return seen


def defined(query, key, value, visible, scale, softcap, sinks):
    """Compute attention by its definition, with the mask ``visible``."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
    return torch.einsum("hqk,khd->qhd", weights / total, value)


def assert_matches(attention, tree, window, softcap, sinks, dtype=torch.float32, heads=(4, 2), d=16, d_v=16):
    inputs, grad = tensors(tree, *heads, d, d_v, dtype)
    if sinks:
        inputs.append(torch.linspace(-2, 3, heads[0], dtype=dtype).requires_grad_())
    options = {"window": window, "softcap": softcap}
    options = {name: value for name, value in options.items() if value is not None}
    out = attention(*inputs[:3], tree, 0.3, **options, **({"sinks": inputs[3]} if sinks else {}))
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = defined(*exact[:3], walked(tree, window), 0.3, softcap, exact[3] if sinks else None)
    got = [out, *torch.autograd.grad(out, inputs, grad)]
    expected = [wanted, *torch.autograd.grad(wanted, exact, grad.double())]
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 2e-5}
    for result, want in zip(got, expected, strict=True):
        assert result.dtype == dtype and result.shape == want.shape
        torch.testing.assert_close(result.double(), want, **tolerance)


def halves(tree: Tree) -> Tree:
    return tree.select(shares(tree, 2)[1])


DEFAULT = {("pair", 3), ("short pairs", 3), ("deep", 50), ("long", 129)}
TOO_LONG = {("triton", "long", window) for window in WINDOWS if window != 129}  # slow in Triton's interpreter


def marks(name: str, shape: str, window: int | None):
    quick = (shape, window) in DEFAULT and (name, shape) not in (("triton", "long"), ("triton", "deep"))
    return () if quick else pytest.mark.slow


@pytest.mark.parametrize(
    "name, shape, window",
    [
        pytest.param(*case, marks=marks(*case))
        for case in itertools.product(BACKENDS, SHAPES, WINDOWS)
        if case not in TOO_LONG
    ],
)
def test_windows_caps_and_sinks(name, shape, window, backends):
    whole = Tree.of(*TREES[shape])
    for tree in (whole, halves(whole)):
        for softcap, sinks in itertools.product((None, CAP), (False, True)):
            if not (name == "varlen" and softcap or name == "triton" and (softcap is None) == sinks):
                assert_matches(backends[name].tree_attention, tree, window, softcap, sinks)


@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen"])
def test_in_fp64(name, backends):
    for shape, window, sinks in (("pairs", 7, True), ("deep", 50, False), ("short pairs", 2, True)):
        softcap = None if name == "varlen" else CAP
        tree = halves(Tree.of(*TREES[shape]))
        assert_matches(backends[name].tree_attention, tree, window, softcap, sinks, torch.float64, (6, 3), 8, 5)


@pytest.mark.parametrize("name", BACKENDS)
def test_shard_without_queries_has_gradients(name, backends):
    tree = Tree.of(*TREES["pair"]).select([])
    (query, key, value), _ = tensors(tree, 4, 2, 16, 16, torch.float32)
    sinks = torch.zeros(4, requires_grad=True)
    out = backends[name].tree_attention(query, key, value, tree, window=3, sinks=sinks)
    grads = torch.autograd.grad(out.sum(), [query, key, value, sinks])
    assert out.shape == (0, 4, 16) and all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("name", BACKENDS)
def test_window_as_long_as_the_longest_path_changes_nothing(name, backends):
    tree = Tree.of(*TREES["pair"])
    inputs, _ = tensors(tree, 2, 1, 16, 16, torch.float32)
    longest = 37 + 44
    attention = backends[name].tree_attention
    assert torch.equal(attention(*inputs, tree, window=longest), attention(*inputs, tree))
    assert not torch.equal(attention(*inputs, tree, window=longest - 1), attention(*inputs, tree))


@pytest.mark.parametrize("name", ["eager", "sdpa", "triton"])
def test_large_scores_stay_finite(name, backends):
    """The gradient of a masked score must be 0, not NaN.

    If the derivative of the soft cap were computed from the masked score, which is -inf, the gradient would be NaN (0
    times infinity).
    """
    tree = Tree.of(*TREES["pair"])
    (query, key, value), grad = tensors(tree, 2, 1, 16, 16, torch.float32)
    out = backends[name].tree_attention(query * 1e4, key, value, tree, window=3, softcap=50.0)
    assert all(part.isfinite().all() for part in [out, *torch.autograd.grad(out, [query, key, value], grad)])


@pytest.mark.parametrize("name", BACKENDS)
def test_bf16(name, backends):
    tree = Tree.of(*TREES["deep"])
    (query, key, value), grad = tensors(tree, 4, 2, 16, 16, torch.bfloat16)
    sinks = torch.tensor([0.5, -1, 2, 0], dtype=torch.bfloat16, requires_grad=True)
    inputs = [query, key, value, sinks]
    out = backends[name].tree_attention(query, key, value, tree, window=20, sinks=sinks)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = defined(*exact[:3], walked(tree, 20), 0.25, None, exact[3])
    got = [out, *torch.autograd.grad(out, inputs, grad)]
    expected = [wanted, *torch.autograd.grad(wanted, exact, grad.double())]
    for result, want in zip(got, expected, strict=True):
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.double(), want, rtol=2e-2, atol=6e-2)


def test_varlen_refuses_a_soft_cap():
    tree = Tree.of(*TREES["pair"])
    inputs, _ = tensors(tree, 2, 1, 16, 16, torch.float32)
    with pytest.raises(ValueError, match="^varlen tree_attention: flash attention does not support a soft cap on"):
        varlen.tree_attention(*inputs, tree, softcap=50.0)


def test_sinks_are_added_to_flash_attention(monkeypatch):
    """Replace flash attention's forward and backward passes, which need a GPU, with CPU functions.

    Like flash attention, the CPU functions do not support sinks.
    """
    tree = Tree.of(*TREES["pairs"])
    window = 7
    inputs, grad = tensors(tree, 4, 2, 8, 8, torch.float64)
    sinks = torch.linspace(-2, 3, 4, dtype=torch.float64, requires_grad=True)
    copies = varlen.copies_of(tree, torch.device("cpu"), window)
    owner = torch.repeat_interleave(torch.arange(len(copies.key_ends) - 1), copies.key_ends.diff().long())
    run = torch.repeat_interleave(torch.arange(len(copies.query_ends) - 1), copies.query_ends.diff().long())
    visible = (run[:, None] == owner) & walked(tree, window)[:, copies.keys]

    def scores(query, key, scale):
        scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, dim=1)) * scale
        return scores.masked_fill(~visible, -torch.inf)

    def forward(query, key, value, given, scale, limit):
        assert given is copies and limit == window
        found = scores(query, key, scale)
        return torch.einsum("hqk,khd->qhd", found.softmax(-1), value.repeat_interleave(2, dim=1)), found.logsumexp(-1)

    def backward(d_out, query, key, value, out, lse, given, scale, limit):
        weights = (scores(query, key, scale) - lse[..., None]).exp()
        wide_value = value.repeat_interleave(2, dim=1)
        d_weights = torch.einsum("qhd,khd->hqk", d_out, wide_value) - (d_out * out).sum(-1).T[..., None]
        d_scores = weights * d_weights * scale
        d_key, d_value = torch.einsum("hqk,qhd->khd", d_scores, query), torch.einsum("hqk,qhd->khd", weights, d_out)
        shared = [part.unflatten(1, (2, 2)).sum(2) for part in (d_key, d_value)]
        return torch.einsum("hqk,khd->qhd", d_scores, key.repeat_interleave(2, dim=1)), *shared

    monkeypatch.setattr(varlen, "_flash_with_lse", forward)
    monkeypatch.setattr(varlen, "_flash_backward", backward)
    query, key, value = inputs
    copied = [varlen._Copied.apply(tensor, copies) for tensor in (key, value)]
    out = varlen._FlashWithSinks.apply(query, *copied, sinks, copies, 0.3, window)
    exact = [tensor.detach().requires_grad_() for tensor in (*inputs, sinks)]
    wanted = defined(*exact[:3], walked(tree, window), 0.3, None, exact[3])
    got = [out, *torch.autograd.grad(out, [*inputs, sinks], grad)]
    for result, want in zip(got, [wanted, *torch.autograd.grad(wanted, exact, grad)], strict=True):
        torch.testing.assert_close(result, want, rtol=1e-11, atol=1e-11)


def test_flash_attentions_window_does_not_count_the_token_itself():
    assert varlen._window_size(None) == (-1, 0)
    assert varlen._window_size(5) == (4, 0)


@pytest.mark.parametrize("seed", range(20))
def test_skipped_tile_has_nothing_visible(seed):
    generator = np.random.default_rng(seed)
    tree = random_tree(generator)
    blocks = Blocks(int(generator.choice([4, 16])), int(generator.choice([8, 16])), 4, 1, 1)
    window = int(generator.choice([1, 2, 5, 17, 40]))
    visible = walked(tree, window).numpy()
    seen, full, _, _ = tile_matrix(tree, blocks, window)
    for i, j in itertools.product(range(seen.shape[0]), range(seen.shape[1])):
        keys = slice(j * blocks.keys, (j + 1) * blocks.keys)
        tile = visible[i * blocks.queries : (i + 1) * blocks.queries, keys]
        assert seen[i, j] or not tile.any(), (i, j)
        assert full[i, j] <= (tile.all() and tile.shape[1] == blocks.keys), (i, j)


@pytest.mark.parametrize("lengths, parents", [([8192], [-1]), ([2000, 3000, 3000], [-1, 0, 0])])
def test_tiles_outside_of_the_window_are_not_visited(lengths, parents):
    """The visited area is at most (tokens + 3 query blocks) x (window + a query block + a key block)."""
    tree, blocks, window = Tree.of(lengths, parents), Blocks(128, 64, 4, 1, 1), 512
    seen, full, _, _ = tile_matrix(tree, blocks, window)
    assert seen.sum() * 128 * 64 <= (tree.n + 3 * 128) * (window + 128 + 64)
    assert full.sum() > 0.5 * seen.sum()


def test_sdpa_computes_windows_plus_a_tile_per_query():
    window = 512
    for tree in (Tree.of([8192], [-1]), Tree.of([2000, 3000, 3000], [-1, 0, 0])):
        inputs, grad = tensors(tree, 1, 1, 8, 8, torch.float32)
        with CountScores() as counted:
            out = sdpa.tree_attention(*inputs, tree, window=window)
            torch.autograd.grad(out, inputs, grad)
        assert counted.forward == counted.backward <= tree.n * (window - 1 + sdpa.TILE)


def test_varlen_copies_only_keys_within_the_window():
    tree = Tree.of([2000, 300, 300], [-1, 0, 0])
    assert len(varlen.runs_of(tree).keys) == 2300 + 2300
    assert len(varlen.runs_of(tree, 50).keys) == 2300 + 49 + 300


def test_dispatched_options_reach_the_backend():
    from dpo_kernels import tree_attention

    tree = Tree.of(*TREES["pair"])
    inputs, _ = tensors(tree, 2, 1, 16, 16, torch.float32)
    expected = eager.tree_attention(*inputs, tree, window=3, softcap=1.0)
    torch.testing.assert_close(tree_attention(*inputs, tree, window=3, softcap=1.0), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_reached_tokens_are_those_that_a_query_sees(seed):
    generator = np.random.default_rng(seed)
    tree = random_tree(generator)
    for window in (None, 1, 5, 40):
        assert tree.reached(window).tolist() == walked(tree, window).any(dim=0).tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a CUDA device")
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.bfloat16, 6e-2)])
def test_on_a_gpu(d, dtype, atol, backends):
    for tree in (Tree.of([1500], [-1]), halves(Tree.of([700, 260, 300, 1200, 90], [-1, 0, 0, -1, 3]))):
        for window, softcap, with_sinks in itertools.product((None, 129, 1000), (None, CAP), (False, True)):
            inputs, grad = tensors(tree, 8, 2, d, d, dtype, "cuda")
            if with_sinks:
                inputs.append(torch.linspace(-2, 3, 8, device="cuda").to(dtype).requires_grad_())
            options = {"window": window, "softcap": softcap}

            def run(attention, given, upstream, tree=tree, options=options):
                out = attention(*given[:3], tree, **options, sinks=given[3] if len(given) > 3 else None)
                return [out, *torch.autograd.grad(out, given, upstream)]

            exact = run(eager.tree_attention, [t.detach().double().requires_grad_() for t in inputs], grad.double())
            flash = dtype is torch.bfloat16 and softcap is None
            for name in ("triton", "sdpa", *["varlen"] * flash):
                for got, want in zip(run(backends[name].tree_attention, inputs, grad), exact, strict=True):
                    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=atol)
