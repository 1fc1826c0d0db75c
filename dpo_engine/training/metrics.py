"""Compute the metrics of a global batch from sums over all of its pairs.

Each sum is divided only after it covers all ranks. The metrics therefore do not depend on the layout.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_engine.objective.losses import PairLogps, accuracies, per_token
from dpo_engine.platform.parallel import ParallelGroups

LIKELIHOOD = ("likelihood/accuracies", "likelihood/accuracies_per_token")
PAIR_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    *LIKELIHOOD,
    "sft_loss",
)
COMPARED = ("loss_margin/mean", "loss_margin/accuracies")
SPREADS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
DISPLACEMENTS = ("displacement/chosen", "displacement/rejected", "displacement/chosen_fell")
ENTROPIES = ("entropy/chosen", "entropy/rejected")
ROUNDING = 1e-14
"""If a variance is at most this fraction of the mean of the squares, it counts as a rounding error of fp64."""
SOURCE_METRICS = ("loss", "rewards/margins", "rewards/accuracies")

METRICS = {
    "loss": "mean loss over the pairs. At step 1, if policy and reference are equal, most loss functions have a known "
    "value (ln 2 for `sigmoid`). The run stops if the metric of step 1 differs from this value",
    "loss/NAME": "a term of `loss`, multiplied by its weight; the terms add up to `loss`; reported for losses that are "
    "sums of terms. For `mix`, NAME is the name of a loss. For `cpo` and `orpo`, it is `preference` or `likelihood`",
    "rewards/chosen": "reward of the chosen responses: beta times the log-ratio of policy to reference, summed over "
    "tokens. Without a reference, it is beta times the log-probability. As in TRL, rewards are sums over tokens even "
    "if the loss averages over tokens. `ld_alpha` applies to rewards, too",
    "rewards/rejected": "reward of the rejected responses",
    "rewards/margins": "chosen reward minus rejected reward",
    "rewards/accuracies": "share of pairs whose chosen reward is larger than the rejected reward; a tie counts as half",
    "loss_margin/mean": "chosen reward per token minus rejected reward per token, averaged over the pairs; reported "
    "for losses that average over tokens (`ipo`, `simpo`, `average: true`), because `rewards/margins` compares sums",
    "loss_margin/accuracies": "share of pairs whose chosen reward per token is larger than the rejected reward per "
    "token; a tie counts as half",
    "rewards/chosen_std": "standard deviation of `rewards/chosen` over the pairs",
    "rewards/rejected_std": "standard deviation of `rewards/rejected` over the pairs",
    "rewards/margins_std": "standard deviation of `rewards/margins` over the pairs",
    "logps/chosen": "log-probability of the chosen responses under the policy, summed over tokens, in nats",
    "logps/rejected": "log-probability of the rejected responses under the policy, summed over tokens, in nats",
    "likelihood/accuracies": "share of pairs whose chosen response has a larger log-probability under the policy than "
    "the rejected response, regardless of the reference; a tie counts as half",
    "likelihood/accuracies_per_token": "like `likelihood/accuracies`, but each log-probability is first divided by the "
    "number of tokens in its response",
    "displacement/chosen": "log-probability of the chosen responses under the policy minus their log-probability under "
    "the reference, in nats; negative values mean that chosen responses are less likely than under the reference; "
    "reported if there is a reference",
    "displacement/rejected": "like `displacement/chosen`, for the rejected responses",
    "displacement/chosen_fell": "share of pairs whose chosen response is less likely under the policy than under the "
    "reference; a tie counts as half",
    "source/NAME/loss": "`loss` over the pairs from one data source, where NAME is the last part of the source's path "
    "without its suffix; reported if the data has several sources",
    "source/NAME/rewards/margins": "`rewards/margins` over the pairs from this source",
    "source/NAME/rewards/accuracies": "`rewards/accuracies` over the pairs from this source",
    "source/NAME/pairs": "number of pairs from this source in the step or the evaluation",
    "entropy/chosen": "entropy of the policy's distribution over the vocabulary, in nats; unweighted mean over all "
    "tokens of the chosen responses; reported if `logging.entropy` is set",
    "entropy/rejected": "like `entropy/chosen`, for the rejected responses",
    "router/balance": "for models with experts: how unevenly the routers use the experts at the tokens that predict "
    "responses; 1 if all experts are used equally. For a response and a layer, each expert's share of all uses is "
    "multiplied by the expert's mean normalized score. The sum of these products is then multiplied by the number of "
    "experts. The metric is the mean over responses, pairs and layers. `loss.balance` times the metric is part of the "
    "training objective, but not of `loss`",
    "router/z": "for models with experts: squared logarithm of the sum of exponentials of the routers' logits, "
    "averaged like `router/balance`; `loss.router_z` times the metric is part of the training objective, but not of "
    "`loss`",
    "router/load": "for models with experts: largest load of an expert in any layer. An expert's load is its number of "
    "uses at the tokens that predict responses, divided by the mean of this number over the experts of the layer",
    "sft_loss": "negative log-probability per token of the chosen responses",
    "grad_norm": "global gradient norm before clipping",
    "num_zeros_in_grad": "number of gradient values that are exactly 0, over all parameters of the model that are not "
    "frozen; reported if `logging.num_zeros` is set",
    "learning_rate": "learning rate used in the step",
    "skipped_steps": "number of steps skipped so far because of bad numbers (see `bad_steps`)",
    "epoch": "number of passes over the training data so far, such as 1.25",
    "pairs_seen": "number of pairs used so far, including those of skipped steps and of steps before a restart; a pair "
    "counts again in each epoch",
    "time": "end of the step on rank 0, in seconds since 1970-01-01 UTC",
    "step_time_s": "wall-clock time of the step on rank 0, in seconds",
    "pairs_per_s": "pairs of the global batch, divided by `step_time_s`",
    "tokens_per_s": "tokens of the rows that the policy computed, divided by `step_time_s`; in `tree`, a shared prompt "
    "counts once; padding counts in both layouts",
    "layout_gain": "operations of a forward pass in the `stacked` layout, divided by those in the layout of the run",
    "peak_memory_bytes": "on a GPU: largest amount of memory that tensors have occupied so far on rank 0",
    "reserved_memory_bytes": "on a GPU: largest amount of memory that torch has reserved so far on rank 0",
    "mfu": "operations that the step's matrix products execute per second, divided by the peak of all GPUs; reported "
    "only in bf16, on GPUs whose peak is known, and if neither `optim.freeze` nor `train.freeze_router` is set. In a "
    "run with adapters, the first layer must also have an adapter",
}
"""Every metric of a step and its meaning.

An evaluation reports only the metrics that are computed from pairs. Their names then have the prefix ``eval/``.
"""


@dataclass(frozen=True)
class Reported:
    """The selection of metrics to report.

    The selection is equal on every rank. Pipeline stages that do not compute the loss therefore also know the number of
    metric sums.

    reference  whether there is a reference to compare with
    entropy    whether the policy's entropies are reported
    sources    names of the data sources; ``Batch.source`` is an index into this sequence
    averages   whether the loss compares averages over tokens
    parts      names of the loss's terms
    """

    reference: bool
    entropy: bool
    sources: Sequence[str]
    averages: bool = False
    parts: tuple[str, ...] = ()

    @property
    def weighted(self) -> list[str]:
        """Names of the weighted sums over all pairs."""
        names = [*PAIR_METRICS, *self.terms, *(COMPARED if self.averages else ()), *(f"{name}^2" for name in SPREADS)]
        return [*names, *(DISPLACEMENTS if self.reference else ())]

    @property
    def terms(self) -> list[str]:
        """Names of the metrics of the loss's terms."""
        return [f"loss/{name}" for name in self.parts]

    @property
    def names(self) -> list[str]:
        """Names of all metrics that are computed from pairs.

        The metrics of a source are reported only if the batch has pairs from this source.
        """
        names = [name for name in self.weighted if not name.endswith("^2")] + [f"{name}_std" for name in SPREADS]
        names += ENTROPIES if self.entropy else ()
        if len(self.sources) > 1:
            names += [f"source/{name}/{metric}" for name in self.sources for metric in (*SOURCE_METRICS, "pairs")]
        return names

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Three counts: how many sums are over all pairs, over all tokens, and over the pairs from one of the sources.

        The last count is the total of all sources.
        """
        by_source = len(self.sources) * (2 + len(SOURCE_METRICS)) if len(self.sources) > 1 else 0
        return len(self.weighted), 2 * len(ENTROPIES) * self.entropy, by_source


@torch.no_grad()
def pair_sums(
    reported: Reported,
    losses: Tensor,
    rewards: tuple[Tensor, Tensor],
    policy: PairLogps,
    reference: PairLogps | None,
    weights: Tensor,
    source: Tensor,
    scale: float = 1.0,
    tolerance: Tensor | float = 0.0,
    parts: Sequence[Tensor] = (),
) -> Tensor:
    """Return sums over a micro-batch's pairs, from which :func:`means` computes the metrics.

    losses, weights  [b]; a weight of 0 marks padding
    rewards          rewards of the chosen and of the rejected responses, each [b]
    source           [b]  index into ``reported.sources``
    scale            factor of log-ratios in the rewards
    tolerance        [b]  nats, largest difference of log-probabilities that counts as a tie; for the metrics in
                     `LIKELIHOOD`, only equal values are a tie
    parts            [b] each, the loss's terms in the order of ``reported.parts``

    Returns  [sum(reported.sizes)]  fp64
    """
    chosen, rejected = rewards
    columns = {
        "loss": losses,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": accuracies(chosen - rejected, scale * tolerance),
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
        "sft_loss": -policy.chosen / policy.chosen_tokens.clamp(min=1),
    }
    logps = torch.stack([policy.chosen, policy.rejected]).double()
    tokens = torch.stack([policy.chosen_tokens, policy.rejected_tokens]).clamp(min=1)
    for name, values in zip(LIKELIHOOD, (logps, logps / tokens), strict=True):
        columns[name] = accuracies(values[0] - values[1])
    columns |= zip(reported.terms, parts, strict=True)
    if reported.averages:
        compared = torch.sub(*per_token(policy, chosen, rejected))
        columns |= zip(COMPARED, (compared, accuracies(compared, scale * tolerance)), strict=True)
    if reference is not None:
        columns["displacement/chosen"] = policy.chosen - reference.chosen
        columns["displacement/rejected"] = policy.rejected - reference.rejected
        columns["displacement/chosen_fell"] = 1 - accuracies(columns["displacement/chosen"], tolerance)
    columns = {name: column.double() for name, column in columns.items()}
    columns |= {f"{name}^2": columns[name].square() for name in SPREADS}
    weights = weights.double()
    parts = [torch.stack([columns[name] for name in reported.weighted]) @ weights]
    _, over_tokens, over_sources = reported.sizes
    if over_tokens:
        tokens = (policy.chosen_entropy, policy.rejected_entropy, policy.chosen_tokens, policy.rejected_tokens)
        parts.append(torch.stack(tokens).double().sum(1))
    if over_sources:
        numbers = torch.arange(len(reported.sources), device=source.device)
        members = ((source == numbers[:, None]) & (weights > 0)).double()  # [sources, b]
        own = [torch.ones_like(weights), weights, *(columns[name] * weights for name in SOURCE_METRICS)]
        parts.append((members @ torch.stack(own, dim=1)).flatten())
    return torch.cat(parts)


def reduce_pair_sums(
    sums: Tensor | None, reported: Reported, total_weight: float, groups: ParallelGroups, device: torch.device
) -> dict[str, float]:
    """Reduce the sums of all ranks, and return the metrics of the global batch, equal on every rank.

    sums          [sum(reported.sizes)] fp64, this rank's sums on the last stage; ``None`` on other stages
    total_weight  sum of the weights of all pairs in the global batch

    *Collectives*: SUM over dp on the last stage, then a broadcast over pp from the last stage.
    """
    if groups.last_stage and sums is not None:
        totals = sums.clone()
        dist.all_reduce(totals, group=groups.dp)
    else:
        totals = torch.zeros(sum(reported.sizes), dtype=torch.float64, device=device)
    if groups.pp.size() > 1:
        dist.broadcast(totals, src=dist.get_process_group_ranks(groups.pp)[-1], group=groups.pp)
    return means(totals.cpu(), reported, total_weight)


def means(totals: Tensor, reported: Reported, total_weight: float) -> dict[str, float]:
    """Compute the metrics, by name, from their sums over the global batch.

    A source without pairs in the batch has no metrics. Standard deviations are weighted, and computed as
    ``sqrt(E[x^2] - E[x]^2)``. Squares of fp32 rewards are exact in fp64. If the variance ``E[x^2] - E[x]^2`` is at most
    `ROUNDING` times ``E[x^2]``, the variance can be a rounding error and counts as 0. This loses no information,
    because a deviation of 1e-7 times the rewards is below the precision of fp32.
    """
    over_pairs, over_tokens, over_sources = totals.split(reported.sizes)
    metrics = dict(zip(reported.weighted, (over_pairs / total_weight).tolist(), strict=True))
    for name in SPREADS:
        square = metrics.pop(f"{name}^2")
        variance = square - metrics[name] ** 2
        metrics[f"{name}_std"] = variance**0.5 if variance > ROUNDING * square else 0.0
    if len(over_tokens):
        entropy, tokens = over_tokens.view(2, len(ENTROPIES))
        metrics |= zip(ENTROPIES, (entropy / tokens).tolist(), strict=True)
    if len(over_sources):
        rows = over_sources.view(len(reported.sources), -1).tolist()
        for name, (pairs, weight, *own) in zip(reported.sources, rows, strict=True):
            if pairs:
                named = zip(SOURCE_METRICS, own, strict=True)
                metrics |= {f"source/{name}/{metric}": total / weight for metric, total in named}
                metrics[f"source/{name}/pairs"] = pairs
    return metrics


_ENDING = re.compile(r"(\.(json|jsonl|jsonl\.gz|jsonl\.zst|parquet|arrow))?(\[[^\[\]]*:[^\[\]]*\])?$")
"""The file type and the slice at the end of a source."""


def source_names(paths: Sequence[str | Path]) -> tuple[str, ...]:
    """Return a short name for each data source, for use in metric names.

    The name is the last part of the source's path, without a slice and without the suffix of a known file type.
    Characters other than letters, digits, ``_``, ``.`` and ``-`` are replaced by ``_``. If the last part has no letter
    or digit, the nearest part before it that has one is used instead. If no part has one, the name is ``data``. If
    several sources have the same name, a number is appended to all of these names but the first.

    >>> source_names(["a/train.jsonl", "b/train.jsonl.gz[:10%]", "b/more pairs.parquet", "org/set:train"])
    ('train', 'train_2', 'more_pairs', 'set_train')
    """
    names: list[str] = []
    for path in paths:
        # Experiment trackers do not accept other characters in the name of a metric.
        stems = (re.sub(r"[^\w.-]", "_", part) for part in reversed(Path(_ENDING.sub("", str(path))).parts))
        stem = next((stem for stem in stems if re.search(r"[^\W_]", stem)), "data")
        same = (stem if number == 1 else f"{stem}_{number}" for number in range(1, len(paths) + 1))
        names.append(next(name for name in same if name not in names))
    return tuple(names)
