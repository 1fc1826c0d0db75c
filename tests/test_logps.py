"""Vocabulary-parallel log-probabilities against gathered log_softmax and autograd."""

import math

import pytest
import torch
from ranks import run_ranks

VOCAB = 37  # 4 shards of 10: the last has 7 real columns, and 5 shards of 8 would leave one with 5


def inputs(dtype: torch.dtype, rows: int, width: int, tp: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits over the padded vocabulary with huge values in the padding, targets at shard edges, and a gradient."""
    generator = torch.Generator().manual_seed(rows + width)
    logits = (6 * torch.randn(rows, width * tp, generator=generator)).to(dtype)
    logits[:, VOCAB:] = 99.0
    edges = [edge for rank in range(tp) for edge in (rank * width, (rank + 1) * width - 1) if edge < VOCAB]
    targets = torch.tensor((edges + [VOCAB - 1])[:rows] + [5] * max(0, rows - len(edges) - 1))[:rows]
    return logits, targets, torch.randn(rows, generator=generator)


def shard_run(tp: int, width: int, rows: int, dtype: torch.dtype):
    from torch import distributed as dist

    from dpo_engine.scoring.logps import token_logps

    logits, targets, grad = inputs(dtype, rows, width, tp)
    rank = dist.get_rank()
    mine = logits[:, rank * width : (rank + 1) * width].clone().requires_grad_()
    before = mine.detach().clone()
    got, _ = token_logps(mine, targets, vocab_size=VOCAB, group=dist.group.WORLD)
    got.backward(grad)
    assert torch.equal(mine.detach(), before), "the logits it was given were modified"
    return got.detach(), mine.grad


@pytest.mark.parametrize("tp, width", [(1, 37), (1, 40), (2, 19), (4, 10), (4, 16)])
@pytest.mark.parametrize("rows", [1, 7, 13])
def test_against_log_softmax(tp, width, rows):
    results = run_ranks(shard_run, tp, tp=tp, width=width, rows=rows, dtype=torch.float32)
    logits, targets, grad = inputs(torch.float32, rows, width, tp)
    full = logits[:, :VOCAB].double().requires_grad_()
    expected = full.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected.backward(grad.double())
    for got, _ in results:
        torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    got_grad = torch.cat([shard for _, shard in results], dim=1)
    torch.testing.assert_close(got_grad[:, :VOCAB].double(), full.grad, rtol=1e-5, atol=1e-7)
    assert (got_grad[:, VOCAB:] == 0).all()


def entropy_run(tp: int, width: int, rows: int, dtype: torch.dtype):
    from torch import distributed as dist

    from dpo_engine.scoring.logps import token_entropies, token_logps

    logits, targets, _ = inputs(dtype, rows, width, tp)
    rank = dist.get_rank()
    mine = logits[:, rank * width : (rank + 1) * width].clone().requires_grad_()
    _, lse = token_logps(mine, targets, vocab_size=VOCAB, group=dist.group.WORLD)
    found = token_entropies(mine, lse, vocab_size=VOCAB, group=dist.group.WORLD)
    assert not any(tensor.requires_grad for tensor in (lse, *found))
    assert torch.equal(mine.detach(), logits[:, rank * width : (rank + 1) * width]), "the logits were modified"
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tp, width", [(1, 37), (1, 40), (2, 19), (4, 10), (4, 16)])
def test_entropies_against_softmax(tp, width, dtype):
    """Four shards of 16 leave the last one with padding only; the bound is what fp32 keeps of logits near 20."""
    results = run_ranks(entropy_run, tp, tp=tp, width=width, rows=13, dtype=dtype)
    logits, _, _ = inputs(dtype, 13, width, tp)
    p = logits[:, :VOCAB].double().softmax(-1)
    expected = -(p * p.log()).sum(1), -p.square().sum(1).log()
    for got in results:
        torch.testing.assert_close([part.double() for part in got], list(expected), rtol=1e-5, atol=5e-6)


def test_entropies_of_known_distributions():
    from dpo_kernels import shard_entropies

    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 9.0], [1e4, 0.0, -1e4, -torch.inf, 9.0]])  # four equal; one certain
    entropy, squares = shard_entropies(logits, torch.tensor([math.log(4), 1e4]), 4)
    assert entropy.tolist() == pytest.approx([math.log(4), 0.0]) and squares.tolist() == pytest.approx([0.25, 1.0])
    assert [part.tolist() for part in shard_entropies(logits, torch.zeros(2), 0)] == [[0, 0], [0, 0]]


def test_bf16_logits_are_summed_in_fp32():
    results = run_ranks(shard_run, 2, tp=2, width=19, rows=13, dtype=torch.bfloat16)
    logits, targets, _ = inputs(torch.bfloat16, 13, 19, 2)
    expected = logits[:, :VOCAB].double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(results[0][0].double(), expected, rtol=1e-6, atol=1e-6)
    assert results[0][1].dtype is torch.bfloat16


def test_logits_far_from_zero_stay_finite():
    from dpo_kernels import shard_stats

    logits = torch.tensor([[1e4, 1e4 - 1.0, -1e4]])
    maximum, sum_exp, target = shard_stats(logits, torch.tensor([1]), 0, 3)
    expected = torch.log_softmax(logits.double(), -1)[0, 1]
    torch.testing.assert_close((target - maximum - sum_exp.log()).double()[0], expected, rtol=1e-6, atol=1e-6)


def test_a_shard_of_padding_only_contributes_nothing():
    from dpo_kernels import shard_grad, shard_stats

    logits, targets = torch.full((2, 3), 50.0), torch.tensor([0, 1])
    maximum, sum_exp, target = shard_stats(logits, targets, 8, 0)
    assert maximum.tolist() == [-torch.inf] * 2 and sum_exp.tolist() == [0, 0] and target.tolist() == [0, 0]
    assert (shard_grad(logits, targets, torch.zeros(2), torch.ones(2), 8, 0) == 0).all()
