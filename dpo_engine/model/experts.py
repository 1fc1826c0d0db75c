"""The router of a mixture of experts. It chooses the experts of each token and computes their weights.

Megatron's router cannot be used. It computes scores in fp32 even in fp64 models, it cannot choose groups of experts by
their best expert (DeepSeek-V2), and it always divides sigmoid scores by their sum. Its losses for load balancing are
means over a micro-batch, so they depend on the layout. They also assume that gradients are later divided by the number
of tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_engine.model.mixture import Experts
from dpo_engine.model.router_losses import RouterLosses


class Router(nn.Module):
    """The module that Megatron's MoELayer calls to choose experts, with Megatron's constructor arguments.

    Logits and scores are in at least fp32, whatever the model's dtype. ``expert_bias`` is added to the scores for the
    choice of experts, but not for their weights. ``expert_bias`` has no gradient. It is nevertheless a parameter, so
    that it is loaded, saved and compared like every other parameter.

    If experts have equal scores and not all of them can be chosen, ``torch.topk`` decides. Its choice is the same for
    the same numbers on the same device, but it can differ between devices.

    losses   the losses of this router, and the sums for its metrics
    entries  description of the tokens at which the losses of the micro-batch are computed, from
             :func:`~dpo_engine.model.router_losses.response_tokens`; None: no losses are computed. The layer sets this
             attribute before each call
    """

    def __init__(self, config: Any, pg_collection: Any = None, **megatron: Any):
        super().__init__()
        self.experts: Experts = config.arch.experts
        self.losses = RouterLosses(pg_collection, self.experts.count, split=config.sequence_parallel)
        self.entries: Tensor | None = None
        device, count = torch.cuda.current_device(), self.experts.count
        self.weight = nn.Parameter(torch.empty(count, config.hidden_size, dtype=config.params_dtype, device=device))
        # With sequence parallelism, each rank computes the gradient from its own tokens. Megatron sums the gradients of
        # parameters with this attribute over tp.
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias = self.expert_bias = None
        if self.experts.router_bias:
            self.bias = nn.Parameter(torch.empty(count, dtype=config.params_dtype, device=device))
            self.bias.sequence_parallel = config.sequence_parallel
        if self.experts.bias:
            wide = torch.promote_types(config.params_dtype, torch.float32)
            self.expert_bias = nn.Parameter(torch.empty(count, dtype=wide, device=device), requires_grad=False)

    def set_layer_number(self, layer_number: int) -> None:
        """Set the number of the layer in the whole model, counted from 1; Megatron calls this for every router."""
        self.losses.layer = layer_number - 1

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose the experts of each token.

        hidden   [s, b, h]
        Returns  weights of the experts [s b, experts] in at least fp32, 0 for experts that are not chosen; and whether
                 each expert is chosen, with the same shape

        *Collectives*: those of :meth:`RouterLosses.attach` if ``entries`` is set and gradients are enabled.
        """
        wide = torch.promote_types(hidden.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        logits = F.linear(hidden.flatten(0, 1).to(wide), self.weight.to(wide), bias)
        weights, chosen, scores = choose(logits, self.experts, self.expert_bias)
        routed = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
        weights = torch.zeros_like(logits).scatter(1, chosen, weights)
        # A recomputed layer runs its forward pass twice, but only one of these passes has gradients enabled, so the
        # losses are computed once.
        if self.entries is not None and torch.is_grad_enabled():
            weights = self.losses.attach(weights, logits, scores, routed, self.entries)
        return weights, routed


def choose(logits: Tensor, experts: Experts, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the experts of each token.

    logits   [n, experts]
    bias     [experts], added to the scores by which experts are chosen, but not to the experts' weights; None: no bias
    Returns  weights of the chosen experts [n, chosen], their indices [n, chosen] int64, and the scores of all experts
             [n, experts]

    *Source*: DeepSeek-V2 (arXiv 2405.04434) section 2.2 for groups; DeepSeek-V3 (arXiv 2412.19437) eq. 12 to 16 for
    sigmoid scores and the bias.
    """
    scores = logits.softmax(-1) if experts.score == "softmax" else logits.sigmoid()
    rank = scores.detach() if bias is None else scores.detach() + bias
    if experts.groups > 1:
        by_group = rank.unflatten(1, (experts.groups, -1))
        best = by_group.topk(experts.group_best, dim=-1)[0].sum(-1).topk(experts.chosen_groups, dim=-1)[1]
        inside = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter(1, best, True)
        rank = by_group.masked_fill(~inside[..., None], -torch.inf).flatten(1)
    chosen = rank.topk(experts.chosen, dim=-1)[1]
    weights = scores.gather(1, chosen)
    if experts.normalized:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * experts.scale, chosen, scores
