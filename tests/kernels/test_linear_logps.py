"""Tests of log-probabilities from hidden states: every backend must match an fp64 log_softmax over all logits."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_kernels import KeptLogits, LinearStats, dispatch, eager
from support.interpreter import mend

VOCAB, HIDDEN = 75, 24
NAMES = ("eager", "triton", "logsumexp")
EXAMPLE = Path(__file__).parents[2] / "examples" / "extend" / "backend.py"


@pytest.fixture
def backends(monkeypatch):
    """Return the backends by name: eager, triton, and the example backend.

    Without a GPU, triton gets small tiles, so that the tests' small inputs need several tiles.
    """
    pytest.importorskip("triton")
    mend()
    from dpo_kernels import triton_backend, triton_logits

    if not torch.cuda.is_available():
        for name, size in {"ROWS": 16, "VOCAB": 32, "INNER": 16, "COLUMNS": 16, "SPLITS": 2}.items():
            monkeypatch.setattr(triton_logits, name, size)
    monkeypatch.setattr(dispatch, "BACKENDS", dict(dispatch.BACKENDS))
    monkeypatch.setattr(dispatch, "_chosen", {})
    return {"eager": eager, "triton": triton_backend, "logsumexp": runpy.run_path(str(EXAMPLE))["LogSumExp"]}


def inputs(rows, width, tp, dtype=torch.float32, hidden_size=HIDDEN):
    """Make hidden states, a weight, targets, and a gradient.

    The weight is padded to ``tp`` equal shards. The padding rows would give huge logits if they were used. The targets
    include the first and the last vocabulary index of each shard, except indices of padding rows.
    """
    generator = torch.Generator().manual_seed(rows + width)
    hidden = torch.randn(rows, hidden_size, generator=generator).to(dtype)
    weight = torch.randn(tp * width, hidden_size, generator=generator).to(dtype)
    weight[VOCAB:] = 50.0
    edges = [edge for rank in range(tp) for edge in (rank * width, rank * width + width - 1) if edge < VOCAB]
    targets = torch.randint(0, VOCAB, (rows,), generator=generator)
    targets[: len(edges)] = torch.tensor(edges)[:rows]
    return hidden, weight, targets, torch.randn(rows, generator=generator)


def shards(weight, tp):
    """Return each rank's shard as (weight, index of the first row, number of valid rows)."""
    width = len(weight) // tp
    return [
        (weight[rank * width : (rank + 1) * width], rank * width, min(max(VOCAB - rank * width, 0), width))
        for rank in range(tp)
    ]


def exact(hidden, weight, targets, grad, logit_scale, softcap):
    """Compute logits, log-probabilities, and the gradients of ``hidden`` and ``weight``, in fp64 with autograd."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = hidden @ weight[:VOCAB].T * logit_scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return logits.detach(), logps.detach(), *torch.autograd.grad(logps, (hidden, weight), grad.double())


def merged(stats: list[LinearStats]) -> tuple[torch.Tensor, ...]:
    """Merge the shards' statistics as the engine's all-reduces do.

    Returns the log-sum-exp, the target logit, and the expected probability and expected logit under the softmax
    distribution. The two expected values are None if the statistics were computed without ``moments``.
    """
    peak = torch.stack([one.maximum for one in stats]).amax(0)
    factors = [(one.maximum - peak).exp() for one in stats]
    total = sum(one.sum_exp * factor for one, factor in zip(stats, factors, strict=True))
    target = sum(one.target_logit for one in stats)
    squares = means = None
    if stats[0].sum_exp_twice is not None:
        squares = sum(one.sum_exp_twice * factor**2 for one, factor in zip(stats, factors, strict=True)) / total**2
        means = sum(one.sum_exp_logit * factor for one, factor in zip(stats, factors, strict=True)) / total
    return peak + total.log(), target, squares, means


CAPS = [{}, {"logit_scale": 0.25}, {"softcap": 4.0}, {"logit_scale": 0.5, "softcap": 7.0}]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tp, width", [(1, 75), (1, 80), (2, 38), (3, 40)])
@pytest.mark.parametrize("options", CAPS)
def test_against_log_softmax(name, tp, width, options, backends):
    ops = backends[name]
    hidden, weight, targets, grad = inputs(21, width, tp)
    logits, logps, d_hidden, d_weight = exact(
        hidden, weight, targets, grad, options.get("logit_scale", 1.0), options.get("softcap")
    )
    probabilities = logits.softmax(-1)
    for chunk in (8,) if name == "triton" else (1, 8, 64):
        stats = [ops.linear_stats(hidden, *shard_args(shard, targets), chunk=chunk, moments=True, **options)
                 for shard in shards(weight, tp)]  # fmt: skip
        lse, target, squares, means = merged(stats)
        for got, expected in (
            (target - lse, logps),
            (squares, probabilities.square().sum(-1)),
            (means, (probabilities * logits).sum(-1)),
        ):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)
        got_hidden, got_weight = 0, []
        for shard in shards(weight, tp):
            before = torch.full_like(shard[0], 3.0)
            got_hidden = got_hidden + ops.linear_grad(
                hidden, *shard_args(shard, targets, lse, grad), chunk=chunk, d_weight=before, **options
            )
            got_weight.append(before - 3.0)
        torch.testing.assert_close(got_hidden.double(), d_hidden, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(torch.cat(got_weight).double(), d_weight, rtol=1e-4, atol=2e-5)


def shard_args(shard, targets, *more):
    weight, start, valid = shard
    return weight, targets, *more, start, valid


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", CAPS)
def test_kept_logits_give_the_same_results(name, options, backends):
    """Process the rows in chunks, and compute each chunk's gradient from its kept logits before the next chunk starts.

    The engine processes its chunks of whole pairs in the same way, except chunks with more than ``CHUNK_SITES`` rows.
    The logits of such a large chunk are computed again for the gradient.
    """
    ops = backends[name]
    hidden, weight, targets, grad = inputs(21, 38, 2)
    _, logps, d_hidden, d_weight = exact(
        hidden, weight, targets, grad, options.get("logit_scale", 1.0), options.get("softcap")
    )
    got_hidden, got_logps = [], []
    totals = [torch.zeros_like(shard[0]) for shard in shards(weight, 2)]
    for part in (slice(0, 9), slice(9, 10), slice(10, 21)):
        made = [ops.linear_keep(hidden[part], *shard_args(shard, targets[part]), moments=True, **options)
                for shard in shards(weight, 2)]  # fmt: skip
        lse, target, _, _ = merged([stats for stats, _ in made])
        got_logps.append(target - lse)
        assert all(isinstance(kept, KeptLogits) for _, kept in made)
        got_hidden.append(
            sum(ops.linear_kept_grad(kept, lse, grad[part], d_weight=total)
                for (_, kept), total in zip(made, totals, strict=True))
        )  # fmt: skip
    torch.testing.assert_close(torch.cat(got_logps).double(), logps, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(torch.cat(got_hidden).double(), d_hidden, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(torch.cat(totals).double(), d_weight, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("buffer, rtol", [(torch.float32, 2e-2), (torch.bfloat16, 4e-2)])
def test_bf16_accumulates_in_fp32(name, buffer, rtol, backends):
    ops = backends[name]
    hidden, weight, targets, grad = inputs(40, 80, 1, torch.bfloat16)
    _, logps, d_hidden, d_weight = exact(hidden, weight, targets, grad, 1.0, None)
    args = shard_args(shards(weight, 1)[0], targets)
    total = torch.zeros(weight.shape, dtype=buffer)
    stats = ops.linear_stats(hidden, *args, chunk=16)
    assert stats.sum_exp_twice is None and stats.sum_exp_logit is None
    lse = stats.maximum + stats.sum_exp.log()
    torch.testing.assert_close((stats.target_logit - lse).double(), logps, rtol=1e-5, atol=2e-5)
    args = shard_args(shards(weight, 1)[0], targets, lse, grad)
    got = ops.linear_grad(hidden, *args, chunk=16, d_weight=total)
    assert got.dtype == torch.bfloat16 and total.dtype == buffer
    torch.testing.assert_close(got.double(), d_hidden, rtol=2e-2, atol=6e-2)
    torch.testing.assert_close(total.double(), d_weight, rtol=rtol, atol=6e-2)


@pytest.mark.parametrize("name", NAMES)
def test_padding_only_shard_contributes_nothing(name, backends):
    ops = backends[name]
    hidden, weight, targets, grad = inputs(5, 75, 1)
    total = torch.zeros_like(weight)
    lse = torch.zeros(5)
    kept_stats, kept = ops.linear_keep(hidden, weight, targets, 80, 0, moments=True)
    for stats in (kept_stats, ops.linear_stats(hidden, weight, targets, 80, 0, chunk=2, moments=True)):
        assert stats.maximum.tolist() == [-torch.inf] * 5
        assert all(column.tolist() == [0.0] * 5 for column in stats[1:])
    d_hidden = ops.linear_grad(hidden, weight, targets, lse, grad, 80, 0, chunk=2, d_weight=total)
    assert (d_hidden == 0).all() and (ops.linear_kept_grad(kept, lse, grad, d_weight=total) == 0).all()
    assert (total == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_empty_input_and_frozen_weight(name, backends):
    ops = backends[name]
    hidden, weight, targets, grad = inputs(6, 75, 1)
    _, logps, d_hidden, _ = exact(hidden, weight, targets, grad, 1.0, None)
    stats = ops.linear_stats(hidden, weight, targets, 0, VOCAB, chunk=4)
    lse = stats.maximum + stats.sum_exp.log()
    got = ops.linear_grad(hidden, weight, targets, lse, grad, 0, VOCAB, chunk=4, d_weight=None)
    torch.testing.assert_close(got.double(), d_hidden, rtol=1e-4, atol=2e-5)
    none, total = slice(0, 0), torch.zeros_like(weight)
    stats = ops.linear_stats(hidden[none], weight, targets[none], 0, VOCAB, chunk=4)
    assert [column.shape for column in stats[:3]] == [(0,)] * 3
    got = ops.linear_grad(hidden[none], weight, targets[none], lse[none], grad[none], 0, VOCAB, chunk=4, d_weight=total)
    assert got.shape == (0, HIDDEN) and (total == 0).all()


def test_gradients_in_fp64():
    """Compare the gradient of ``sum(grad * logps)`` with finite differences of this sum."""
    hidden, weight, targets, grad = inputs(4, 75, 1, torch.float64, hidden_size=3)
    options = {"logit_scale": 0.7, "softcap": 3.0}

    def total(hidden):
        stats = eager.linear_stats(hidden, weight, targets, 0, VOCAB, chunk=3, **options)
        return ((stats.target_logit - stats.maximum - stats.sum_exp.log()) * grad).sum()

    stats = eager.linear_stats(hidden, weight, targets, 0, VOCAB, chunk=3, **options)
    lse = stats.maximum + stats.sum_exp.log()
    got = eager.linear_grad(hidden, weight, targets, lse, grad.double(), 0, VOCAB, chunk=3, d_weight=None, **options)
    step = 1e-6
    for i in range(hidden.numel()):
        bump = torch.zeros(hidden.numel(), dtype=torch.float64)
        bump[i] = step
        bump = bump.view_as(hidden)
        expected = (total(hidden + bump) - total(hidden - bump)) / (2 * step)
        torch.testing.assert_close(got.flatten()[i], expected, rtol=1e-6, atol=1e-7)


class Work(TorchDispatchMode):
    """Count the FLOPs of matrix products, and record the number of elements of the largest floating-point output.

    Products that are added to a tensor in place are also counted. Outputs that are views are ignored.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name in ("aten::mm", "aten::addmm_", "aten::addmm"):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor._base is None:
                self.largest = max(self.largest, tensor.numel())
        return out


def test_flops_and_memory_of_chunks():
    """Count FLOPs in units of rows x hidden x vocabulary.

    Scoring takes 2 units. Scoring with gradients takes 8 units, or 6 units if the logits are kept.
    """
    n, h, v, chunk = 96, 16, 75, 8
    hidden, weight, targets, grad = inputs(n, v, 1, hidden_size=h)
    total = torch.zeros_like(weight)
    with Work() as scored:
        stats = eager.linear_stats(hidden, weight, targets, 0, v, chunk=chunk, moments=True)
    assert scored.flops == 2 * n * h * v
    lse = stats.maximum + stats.sum_exp.log()
    with Work() as again:
        eager.linear_grad(hidden, weight, targets, lse, grad, 0, v, chunk=chunk, d_weight=total)
    assert scored.flops + again.flops == 8 * n * h * v
    with Work() as kept:
        for first in range(0, n, chunk):
            part = slice(first, first + chunk)
            stats, logits = eager.linear_keep(hidden[part], weight, targets[part], 0, v)
            lse = stats.maximum + stats.sum_exp.log()
            eager.linear_kept_grad(logits, lse, grad[part], d_weight=total)
    assert kept.flops == 6 * n * h * v
    assert max(scored.largest, again.largest, kept.largest) <= max(chunk * v, weight.numel(), hidden.numel())
    assert n * v > 4 * max(chunk * v, weight.numel(), hidden.numel()), (
        "the limit is too high to detect a tensor of all logits"
    )


def test_triton_scores_without_logits(backends):
    n, v = 96, 75
    hidden, weight, targets, grad = inputs(n, v, 1)
    triton = backends["triton"]
    with Work() as scored:
        stats = triton.linear_stats(hidden, weight, targets, 0, v, chunk=n)
    # Triton's interpreter copies the kernel's arguments. The largest argument is the tensor ``hidden``.
    assert scored.flops == 0 and scored.largest <= hidden.numel()
    with Work() as again:
        lse = stats.maximum + stats.sum_exp.log()
        triton.linear_grad(hidden, weight, targets, lse, grad, 0, v, chunk=8, d_weight=torch.zeros_like(weight))
    # Work counts two products, one for each gradient. The kernel also computes a third product, the logits. Work does
    # not count that product.
    assert again.flops == 4 * n * HIDDEN * v
    assert again.largest <= max(8 * v, hidden.numel(), weight.numel())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a CUDA device")
@pytest.mark.parametrize("options", CAPS)
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-3), (torch.bfloat16, 6e-2)])
def test_on_a_gpu(options, dtype, tol, backends):
    generator = torch.Generator().manual_seed(0)
    n, h, v = 700, 512, 5003
    hidden, weight = (torch.randn(size, h, generator=generator).to(dtype).cuda() * h**-0.25 for size in (n, v + 5))
    targets, grad = torch.randint(0, v, (n,), generator=generator).cuda(), torch.randn(n, generator=generator).cuda()
    wide, wide_weight = hidden.double(), weight.double()
    exact_stats = eager.linear_stats(wide, wide_weight, targets, 0, v, chunk=n, **options)
    exact_lse = exact_stats.maximum + exact_stats.sum_exp.log()
    expected_weight = torch.zeros_like(wide_weight)
    expected = eager.linear_grad(
        wide, wide_weight, targets, exact_lse, grad.double(), 0, v, chunk=n, d_weight=expected_weight, **options
    )
    for ops in backends.values():
        for _ in range(2):
            total = torch.zeros(weight.shape, device="cuda")
            stats = ops.linear_stats(hidden, weight, targets, 0, v, chunk=256, **options)
            lse = stats.maximum + stats.sum_exp.log()
            got = ops.linear_grad(hidden, weight, targets, lse, grad, 0, v, chunk=256, d_weight=total, **options)
            kept_stats, kept = ops.linear_keep(hidden, weight, targets, 0, v, **options)
            kept_total = torch.zeros_like(total)
            kept_got = ops.linear_kept_grad(kept, lse, grad, d_weight=kept_total)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(kept_stats.target_logit.double(), exact_stats.target_logit, rtol=1e-4, atol=1e-3)
        for result in (got, kept_got):
            torch.testing.assert_close(result.double(), expected, rtol=tol, atol=tol)
        for result in (total, kept_total):
            torch.testing.assert_close(result.double(), expected_weight, rtol=tol, atol=tol)
        again = torch.zeros_like(total)
        ops.linear_grad(hidden, weight, targets, lse, grad, 0, v, chunk=256, d_weight=again, **options)
        assert torch.equal(again, total), "two runs gave different bits"
