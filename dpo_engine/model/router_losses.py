"""Losses on the load balance and the logits of routers, and router metrics. All values are the same in every layout.

Problem. Losses for load balancing are usually means over the tokens of a micro-batch, or products of two such means.
Such losses depend on which pairs share a micro-batch, on padding, on the number of copies of a prompt in the
micro-batch, and on the layout. Megatron's losses also assume that gradients are later divided by the number of tokens,
which does not happen here.

Solution. The losses are computed for each response, at the n tokens that predict the response's scored tokens::

    f_e = number of the n tokens that use expert e / (k n)        k experts per token, E experts
    P_e = mean over the n tokens of (score of expert e / sum of the token's scores)
    balance = E sum_e f_e P_e         1 if all experts are used equally, at most E / k
    z       = mean over the n tokens of (logsumexp of the token's logits) squared

Both losses are averaged over the two responses of a pair, and over the layers with experts. Then, like the preference
loss, they are averaged over the pairs, with the weights of the pairs. The losses therefore do not depend on the number
of copies of a prompt in a row, on whether pairs share a response, on padding, or on the distribution of pairs and
tokens over ranks. A definition over all tokens would depend on the batch layout: in the tree layout, the last layer
computes no output for the tokens of a prompt, except for the prompt's last token. ``f`` is a constant in the backward
pass.

For each response and expert of a layer, the number of tokens is counted, and summed over the ranks that have them. The
tokens are described by one tensor (:func:`response_tokens`), which Megatron passes to every layer, also when it
recomputes the layer.

*Source*: ``balance``: DeepSeek-V3 (arXiv 2412.19437) eq. 17 to 20, where each response is a sequence; ``z``: ST-MoE
(arXiv 2202.08906) eq. 5.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo_engine.batching.batches import Batch
from dpo_engine.model.mixture import Experts


def response_tokens(batch: Batch, total_weight: float) -> Tensor:
    """Describe the tokens at which router losses are computed.

    batch         a micro-batch, or a context-parallel rank's share of a micro-batch
    total_weight  sum of the weights of all pairs of the global batch

    Returns  [2b, 3, e] fp64, the same at every index of the first axis. An entry of ``batch.scored`` is a scored token
             of a response; its site is the index of the token that predicts it. For each entry, the result has the
             site, the response (i for the chosen response of pair i, b + i for the rejected one), and the factor of the
             entry in the mean of the global batch. The only purpose of the first axis is that the host can read the
             number of responses, 2b, from the shape
    """
    scored, tokens = batch.scored, torch.cat([batch.chosen_tokens, batch.rejected_tokens]).double().clamp(min=1)
    factors = batch.weights.double().repeat(2) / (2 * total_weight * tokens)
    rows = torch.stack([scored.sites[scored.take].double(), scored.owner.double(), factors[scored.owner]])
    return rows.expand(len(tokens), -1, -1)


def within(entries: Tensor, columns: Tensor) -> Tensor:
    """Return the ``entries`` of :func:`response_tokens` with each site as an index into the selected ``columns``."""
    kept = entries[0].clone()
    kept[0] = torch.searchsorted(columns, entries[0, 0].long()).double()
    return kept.expand(len(entries), -1, -1)


class _Attach(torch.autograd.Function):
    """Return ``weights`` unchanged; the backward pass also differentiates ``loss``."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, ctx.saved_tensors[0]


class RouterLosses:
    """The losses of one router, and the sums for its metrics over the current step.

    balance, z  coefficients of the losses, divided by the number of layers with experts
    groups      Megatron's process groups
    count       number of experts
    split       whether sequence parallelism splits the tokens over tp
    layer       index of the layer in the whole model, counted from 0
    sums        [2] fp64, this rank's contribution to both losses, summed over the micro-batches of the step
    counts      [experts] fp64, for each expert, the number of this rank's tokens in the step that use the expert. Only
                tokens at which losses are computed are counted
    """

    def __init__(self, groups: Any, count: int, *, split: bool):
        self.groups, self.split, self.count = groups, split, count
        self.balance = self.z = 0.0
        self.layer = 0
        self.reset()

    def reset(self) -> None:
        """Reset the sums at the start of a step."""
        device = torch.cuda.current_device()
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.counts = torch.zeros(self.count, dtype=torch.float64, device=device)

    def attach(self, weights: Tensor, logits: Tensor, scores: Tensor, routed: Tensor, entries: Tensor) -> Tensor:
        """Add a micro-batch to the sums, and return ``weights`` with the gradients of the losses attached.

        weights, logits, scores  [n, experts] of this rank's tokens
        routed                   [n, experts] bool
        entries                  result of :func:`response_tokens` for the tokens of all tensor-parallel ranks

        *Collectives*: SUM [2b, experts] over cp and, with sequence parallelism, tp.
        """
        site, owner, factor = entries[0].unbind(0)
        site = site.long() - (self.groups.tp.rank() * len(logits) if self.split else 0)
        here = (site >= 0) & (site < len(logits))
        site, owner, factor = site.clamp(0, len(logits) - 1), owner.long(), factor * here
        used = routed[site] * here[:, None].double()
        counts = used.new_zeros(len(entries), self.count).index_add_(0, owner, used)
        self.counts += used.sum(0)
        group = self.groups.tp_cp if self.split else self.groups.cp
        if group.size() > 1:
            dist.all_reduce(counts, group=group)
        shares = counts[owner] / counts[owner].sum(-1, keepdim=True).clamp(min=1)  # the sum over experts is k n
        probabilities = (scores / scores.sum(-1, keepdim=True))[site]
        factor = factor.to(scores.dtype)
        balance = self.count * ((shares.to(scores.dtype) * probabilities).sum(-1) * factor).sum()
        z = (logits[site].logsumexp(-1).square() * factor).sum()
        self.sums += torch.stack([balance, z]).detach().double()
        if not (self.balance or self.z):
            return weights
        return _Attach.apply(weights, self.balance * balance + self.z * z)


def routers_of(chunks: Sequence[nn.Module]) -> Iterator[RouterLosses]:
    """Yield the losses of each router of this rank's model chunks."""
    for chunk in chunks:
        found = (getattr(module, "losses", None) for module in chunk.modules())
        yield from (losses for losses in found if isinstance(losses, RouterLosses))


def set_router_losses(chunks: Sequence[nn.Module], experts: Experts | None, *, balance: float, z: float) -> None:
    """Set the coefficients of the losses of all routers on this rank. A model without experts has no routers."""
    for losses in routers_of(chunks):
        losses.balance, losses.z = balance / len(experts.layers), z / len(experts.layers)


@torch.no_grad()
def router_metrics(chunks: Sequence[nn.Module], experts: Experts, group: dist.ProcessGroup) -> dict[str, float]:
    """Return the metrics of all routers for the micro-batches since the last reset, with equal values on all ranks.

    group   all ranks

    *Collectives*: one SUM of [layers with experts, experts + 2] over ``group``.
    """
    mine = list(routers_of(chunks))
    device = torch.cuda.current_device()
    rows = torch.zeros(len(experts.layers), experts.count + 2, dtype=torch.float64, device=device)
    for losses in mine:
        rows[experts.layers.index(losses.layer)] = torch.cat([losses.sums, losses.counts])
    dist.all_reduce(rows, group=group)
    sums, counts = rows.cpu().split([2, experts.count], dim=1)
    balance, z = sums.mean(0).tolist()
    loads = counts.max(1).values / counts.mean(1)
    return {"router/balance": balance, "router/z": z, "router/load": loads.max().item()}
