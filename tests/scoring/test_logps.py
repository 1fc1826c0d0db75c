"""Tests of log-probabilities, losses and gradients in all layouts, compared with log_softmax and autograd in fp64."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dpo_engine.batching import batches
from dpo_engine.batching.batches import collate
from dpo_engine.batching.trees import plant
from dpo_engine.objective.losses import PairLogps
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.platform.parallel import open_groups
from dpo_engine.scoring import logps
from dpo_engine.testing.pairs import RandomPairs
from dpo_engine.testing.ranks import run_ranks

VOCAB, HIDDEN = 37, 12
LONGEST = 64


class Layout(NamedTuple):
    """TP size, number of output-layer rows per rank, and CP size.

    With 4 x 10 rows, the last shard ends with padding. With 4 x 16 rows, the last shard has only padding.
    """

    tp: int
    width: int
    cp: int = 1


LAYOUTS = {
    "one": Layout(1, 37),
    "one, padded": Layout(1, 40),
    "tp2": Layout(2, 19),
    "tp4": Layout(4, 10),
    "tp4, a shard of padding": Layout(4, 16),
    "cp2": Layout(1, 40, 2),
    "tp2 cp2": Layout(2, 19, 2),
}


class Case(NamedTuple):
    """A scoring task and its settings.

    chunk  largest number of sites whose logits are in memory at the same time. A site is a token that predicts a
           response token
    head   use of the output layer's gradient. ``frozen``: there is no gradient. ``autograd``: the gradient is returned
           to autograd. In the other three cases, the gradient is added to the gradient buffer of Megatron's DDP.
           ``buffer``: DDP waits until autograd returns a gradient, and ignores the returned gradient. ``tied``: DDP
           waits until autograd returns a gradient, and adds the returned gradient to the buffer. ``uncounted``: DDP
           does not wait for autograd
    """

    tree: bool = False
    chunk: int = 1024
    head: str = "autograd"
    dtype: torch.dtype = torch.float32
    dummies: bool = False
    softcap: float | None = None


CASES = {
    "rows": Case(),
    "rows, several chunks": Case(chunk=40, head="buffer"),
    "rows, pairs longer than a chunk": Case(chunk=5, head="uncounted"),
    "trees": Case(tree=True, head="frozen"),
    "trees, several chunks": Case(tree=True, chunk=40, head="tied"),
    "trees, pairs longer than a chunk": Case(tree=True, chunk=5),
    "bf16": Case(tree=True, chunk=40, head="buffer", dtype=torch.bfloat16),
    "rows, soft cap": Case(chunk=40, head="buffer", softcap=3.0),
    "trees, soft cap, pairs longer than a chunk": Case(tree=True, chunk=5, softcap=3.0),
    "nothing to score": Case(head="buffer", dummies=True),
}


def pairs_of(case: Case):
    """Return eight pairs and a dummy, which is None. If ``case.dummies`` is true, return only dummies.

    The prompts of the eight pairs are drawn from three prompts. One response consists of the token ids at the edges of
    the vocabulary shards of all layouts.
    """
    if case.dummies:
        return [None, None]
    few = RandomPairs(8, VOCAB, few=3, seed=1)
    pairs = sorted(few.pairs, key=lambda pair: pair.prompt.tobytes())
    edges = np.array([0, 9, 10, 15, 16, 18, 19, 20, 29, 30, 31, 32, 36], dtype=np.int32)
    return [pairs[0]._replace(rejected=edges), *pairs[1:], None]


def batch_of(case: Case, cp_size: int):
    pairs = pairs_of(case)
    numbers = [-1 if pair is None else number for number, pair in enumerate(pairs)]
    if case.tree:
        return plant(pairs, numbers, pad_id=0, cp_size=cp_size)
    return collate(pairs, numbers, pad_id=0, multiple=2 * cp_size)


def weights(dtype: torch.dtype, padded: int = VOCAB):
    """Return the token table, the position table and the output layer.

    A hidden state is the sum of an entry of the token table and an entry of the position table. The padding rows of the
    output layer are so large that the losses would be wrong if the softmax included these rows.
    """
    generator = torch.Generator().manual_seed(3)
    of_tokens = torch.randn(VOCAB, HIDDEN, generator=generator)
    of_positions = torch.randn(LONGEST, HIDDEN, generator=generator)
    head = torch.full((padded, HIDDEN), 40.0)
    head[:VOCAB] = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype).float()
    return of_tokens, of_positions, head


def losses_of(policy: PairLogps) -> torch.Tensor:
    """Compute losses that depend on every differentiable log-probability."""
    whole = policy.chosen / policy.chosen_tokens.clamp(min=1) - policy.rejected / policy.rejected_tokens.clamp(min=1)
    return (1 - whole).square() + 0.1 * (policy.rejected_shared - 0.5 * policy.chosen_shared)


def measure(layout: Layout, cases: dict[str, Case]):
    """Run every case on this rank.

    Returns a dictionary for each case. It contains, among other values, the losses, the scores computed without and
    with gradients, and the gradients of the tables and the output layer.
    """
    import torch.distributed as dist

    from dpo_engine.platform.device import open_platform

    dims = ParallelDims(tp=layout.tp, cp=layout.cp, world=dist.get_world_size())
    groups = open_groups(dims, open_platform(deterministic=True), seed=1, timeout_s=60)
    return {name: measure_case(layout, case, groups) for name, case in cases.items()}


def measure_case(layout: Layout, case: Case, groups):
    batches.CHUNK_SITES = logps.CHUNK_SITES = case.chunk
    batch = batch_of(case, layout.cp).shard(groups.cp.rank(), layout.cp)
    of_tokens, of_positions, head = weights(case.dtype, layout.tp * layout.width)
    tables = of_tokens.requires_grad_(), of_positions.requires_grad_()
    hidden = of_tokens[batch.tokens.T] + of_positions[batch.positions][:, None]  # [s/cp, r, h]
    hidden = hidden.flatten(0, 1)[batch.scored.sites].to(case.dtype)
    head = torch.nn.Parameter(head.to(case.dtype).chunk(layout.tp)[groups.tp.rank()].clone())
    head.requires_grad_(case.head != "frozen")
    if case.head in ("buffer", "tied", "uncounted"):
        head.main_grad = torch.full(head.shape, 3.0)
        head.zero_out_wgrad = case.head == "tied"
        head.counted = case.head != "uncounted"
    asked = {"vocab_size": VOCAB, "groups": groups, "softcap": case.softcap, "entropies": not case.tree}
    seen = []

    def contribution(policy: PairLogps, pairs: slice):
        seen.append(pairs)
        losses = losses_of(policy)
        return (losses * batch.weights[pairs]).sum(), losses

    scored = logps.pair_logps(hidden, head, batch, **asked)
    total, losses, policy = logps.pair_losses(hidden, head, batch, contribution, **asked)
    assert not any(t.requires_grad for t in (losses, *scored, *policy) if t is not None)
    total.backward()
    return {
        "sites": len(batch.scored.sites),
        "seen": seen,
        "scored": scored,
        "policy": policy,
        "losses": losses,
        "total": total.detach(),
        "tables": [torch.zeros_like(table) if table.grad is None else table.grad for table in tables],
        "head": gradient_of(head, case),
    }


def gradient_of(head: torch.nn.Parameter, case: Case) -> torch.Tensor | None:
    """Return the gradient that the optimizer gets for the output layer, or None if the layer is frozen.

    Without a buffer, the optimizer gets autograd's gradient. With a buffer, the optimizer gets the sum of all values
    that were added to the buffer's initial value of 3. If DDP adds autograd's gradient to the buffer, the sum includes
    autograd's gradient.
    """
    if case.head == "frozen":
        assert head.grad is None
        return None
    if case.head == "autograd":
        return head.grad
    if case.head == "uncounted":
        assert head.grad is None and not getattr(head, "grad_added_to_main_grad", False)
        return head.main_grad - 3.0
    assert head.grad is not None, "DDP waits for this gradient, so autograd must return it"
    marked = getattr(head, "grad_added_to_main_grad", False)
    assert marked == (case.head == "buffer")
    return head.main_grad - 3.0 + (0 if marked else head.grad)


def exact(case: Case):
    """Compute the expected values in fp64 from the ids of each pair. Every response is in its own sequence."""

    def rounded(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return states + (states.to(dtype).double() - states).detach()

    of_tokens, of_positions, head = (table.double() for table in weights(torch.float32))
    head = head.to(case.dtype).double()
    tables = [table.requires_grad_() for table in (of_tokens, of_positions, head)]
    columns = {name: [] for name in PairLogps._fields}
    nothing = (0 * head).sum()
    for pair in pairs_of(case):
        sides = {"chosen": pair and pair.chosen, "rejected": pair and pair.rejected}
        both = pair and min(len(pair.chosen), len(pair.rejected))
        for side, response in sides.items():
            if response is None:
                for name in columns:
                    columns[name] += [nothing] if name.startswith(side) else []
                continue
            ids = torch.tensor([*pair.prompt, *response])
            # The entries of the two tables are added in fp32, and the sum is rounded to the dtype of the case.
            states = rounded(rounded(of_tokens[ids] + of_positions[: len(ids)], torch.float32), case.dtype)
            logits = states[len(pair.prompt) - 1 : -1] @ head.T
            if case.softcap is not None:
                logits = case.softcap * (logits / case.softcap).tanh()
            every = logits.log_softmax(-1)
            found = every.gather(1, ids[len(pair.prompt) :, None])[:, 0]
            columns[side].append(found.sum())
            columns[f"{side}_tokens"].append(torch.tensor(float(len(response)), dtype=torch.float64))
            columns[f"{side}_shared"].append(found[:both].sum())
            columns[f"{side}_entropy"].append(-(every.exp() * every).sum())
            columns[f"{side}_collision"].append(-(2 * every).exp().sum(-1).log().sum())
    policy = PairLogps(*(torch.stack(column) for column in columns.values()))
    losses = losses_of(policy)
    factors = torch.tensor([0.0 if pair is None else pair.weight for pair in pairs_of(case)], dtype=torch.float64)
    total = (losses * factors).sum()
    gradients = torch.autograd.grad(total, tables, materialize_grads=True, allow_unused=True)
    return policy.map(torch.Tensor.detach), losses.detach(), total.detach(), gradients


@pytest.fixture(scope="module")
def measured():
    """Return a function that returns the results of all cases in a layout, by rank. It runs each layout only once."""
    known = {}

    def of(layout: str):
        if layout not in known:
            tp, _, cp = LAYOUTS[layout]
            known[layout] = run_ranks(measure, tp * cp, layout=LAYOUTS[layout], cases=CASES)
        return known[layout]

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_against_log_softmax(name, layout, measured):
    case, tp = CASES[name], LAYOUTS[layout].tp
    policy, losses, total, (*tables, head) = exact(case)
    results = [result[name] for result in measured(layout)]

    def check(got, expected, rtol=1e-5, atol=1e-5):
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol)

    for result in results:
        check(result["losses"], losses)
        check(result["total"], total)
        for record in (result["scored"], result["policy"]):
            for field, got, expected in zip(PairLogps._fields, record, policy, strict=True):
                if case.tree and field.endswith(("entropy", "collision")):
                    assert got is None
                else:
                    assert got.dtype == torch.float32
                    check(got, expected, atol=1e-4)
    # The gradient of the logits is rounded to the case's dtype before the matrix products. bf16 keeps 8 significant
    # bits.
    bounds = (1e-4, 1e-5) if case.dtype is torch.float32 else (5e-2, 2e-2)
    # Each TP rank has a summand of the hidden states' gradient, and each CP rank has the gradient at its own sites. The
    # sum over all ranks is the whole gradient.
    for number, expected in enumerate(tables):
        check(sum(result["tables"][number] for result in results), expected, *bounds)
    if case.head != "frozen":
        shards = [sum(result["head"] for result in results[rank::tp]) for rank in range(tp)]  # TP ranks are adjacent
        got = torch.cat(shards)
        check(got[:VOCAB], head, *bounds)
        assert (got[VOCAB:] == 0).all()


def test_cases_cover_every_path(measured):
    """Check that the cases include one chunk, several chunks, pairs longer than a chunk, and a rank without sites."""
    seen = {name: measured("one")[0][name]["seen"] for name in CASES}
    count = len(pairs_of(CASES["rows"]))
    assert seen["rows"] == seen["trees"] == [slice(0, count)]
    assert seen["rows, pairs longer than a chunk"] == [slice(i, i + 1) for i in range(count)]
    for name in ("rows, several chunks", "trees, several chunks", "trees, pairs longer than a chunk"):
        edges = [0, *(pairs.stop for pairs in seen[name])]
        assert 2 < len(edges) < count + 1 and edges[-1] == count
        assert [pairs.start for pairs in seen[name]] == edges[:-1]
    assert measured("cp2")[1]["nothing to score"]["sites"] == 0


def entropies(hidden: torch.Tensor):
    import torch.distributed as dist

    from dpo_engine.platform.device import open_platform

    groups = open_groups(ParallelDims(tp=2, world=2), open_platform(deterministic=True), seed=1, timeout_s=60)
    batch = collate([RandomPairs(1, VOCAB)[0]._replace(chosen=np.array([5]), rejected=np.array([20]))], [0], pad_id=0)
    head = torch.zeros(38, 2)
    head[20, 1] = 1e4
    mine = head.chunk(2)[dist.get_rank()]
    return logps.pair_logps(hidden, mine, batch, vocab_size=VOCAB, groups=groups, entropies=True)


def test_known_distributions_far_from_zero():
    """One distribution is uniform, and the other gives one token the probability 1.

    fp32 must be accurate despite large logits.
    """
    for got in run_ranks(entropies, 2, hidden=torch.tensor([[1.0, 0.0], [0.0, 1.0]])):
        expected = -math.log(VOCAB), 0.0
        assert (got.chosen.item(), got.rejected.item()) == pytest.approx(expected, abs=1e-5)
        expected = math.log(VOCAB), 0.0, math.log(VOCAB), 0.0
        assert [field.item() for field in got[6:]] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_that_ddp_adds_to_the_buffer_is_zero(tied, monkeypatch):
    """If DDP overlaps communication with backward, DDP adds the returned gradient of a tied embedding to the buffer.

    The engine has already added the true gradient to the buffer, so the returned gradient must be zero.
    """
    garbage = torch.full((3, 2), float("nan"))
    monkeypatch.setattr(torch, "empty_like", lambda weight: garbage)
    weight = torch.nn.Parameter(torch.ones(3, 2))
    weight.main_grad, weight.counted, weight.zero_out_wgrad = torch.ones(3, 2), True, tied
    buffer, given = logps.weight_gradient(weight)
    assert buffer is weight.main_grad
    if tied:
        assert (given == 0).all() and not getattr(weight, "grad_added_to_main_grad", False)
    else:
        assert given is garbage and weight.grad_added_to_main_grad  # DDP ignores the returned values
