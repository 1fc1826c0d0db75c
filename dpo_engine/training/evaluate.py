"""Evaluate the policy on all held-out pairs. Return the metrics, and a table with one row per pair."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dpo_engine.batching.batches import Batch
from dpo_engine.config.rules import reads_reference
from dpo_engine.config.run import Config
from dpo_engine.data.dataset import PairDataset
from dpo_engine.faults import reach
from dpo_engine.objective.losses import PairLogps, accuracies
from dpo_engine.platform.parallel import ParallelGroups, working
from dpo_engine.platform.progress_line import counting
from dpo_engine.reporting.pair_file import Evaluation
from dpo_engine.scoring.reference import Reference, score
from dpo_engine.training.engine import Engine, batch_facts
from dpo_engine.training.metrics import reduce_pair_sums
from dpo_engine.training.objective import BatchFacts, Coupled, Objective
from dpo_engine.version import __version__

PAIR_LOGPS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
PAIR_COLUMNS = ("index", *PAIR_LOGPS, "chosen_rewards", "rejected_rewards", "margin", "accuracy", "loss")


class Evaluator:
    """Evaluation of the policy on the held-out pairs. The reference scores them again only if its weights have changed.

    batches  this rank's micro-batches of the whole held-out set
    known    BatchFacts of the whole held-out set, such as its total weight
    pairs    number of pairs in the whole held-out set; None: the number of this rank's pairs
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        reference: Reference,
        objective: Objective,
        *,
        known: BatchFacts,
        vocab_size: int,
        groups: ParallelGroups,
        pairs: int | None = None,
    ):
        self.batches = batches
        self.pairs = sum(len(batch.index) for batch in batches) if pairs is None else pairs
        self.reference = reference
        self.objective = objective
        self.known = known
        self.vocab_size = vocab_size
        self.groups = groups
        self._reference_logps: list[PairLogps] | None = None
        self._scored_at: int | None = None
        self._latest: list[PairLogps] = []
        self._losses: list[Tensor | Coupled] = []

    @torch.no_grad()
    def evaluate(self, chunks: Sequence[torch.nn.Module], *, tie: float = 0.0) -> dict[str, float]:
        """Return the metrics of the policy ``chunks`` over all held-out pairs, equal on every rank.

        tie   see :class:`~dpo_engine.training.objective.BatchFacts`

        *Collectives*: those of the forward passes, one SUM over dp, and one broadcast over pp; for coupled losses, also
        those of :meth:`~dpo_engine.training.objective.Objective.couple`.
        """
        self.known = self.known._replace(tie=tie)
        with working(alone=self.groups.waits_for_others):
            return self._evaluate(chunks)

    def _evaluate(self, chunks: Sequence[torch.nn.Module]) -> dict[str, float]:
        reach("eval")
        stale = self._scored_at != self.reference.age
        with counting("evaluating", **self._work(1 + stale * self.reference.passes)):
            if stale:
                self._reference_logps = self.reference.logps(self.batches)
                self._scored_at = self.reference.age
            options = {"vocab_size": self.vocab_size, "groups": self.groups}
            self._latest = score(chunks, self.batches, entropies=self.objective.reads_entropies, **options)
        self._losses = self._pair_losses(self._latest) if self.groups.last_stage else []
        sums = self._pair_sums() if self.groups.last_stage else None
        reported = self.objective.reported(self.known, reference=self._reference_logps is not None)
        device = self.batches[0].tokens.device
        return reduce_pair_sums(sums, reported, self.known.total_weight, self.groups, device)

    def _work(self, passes: int) -> dict[str, Any]:
        """Return the arguments of :func:`~dpo_engine.platform.progress_line.counting`."""
        mine = sum(len(batch.index) for batch in self.batches)
        return {"total": self.pairs, "parts": passes * mine, "shown": self.groups.world.rank() == 0}

    def _pair_losses(self, policy: Sequence[PairLogps]) -> list[Tensor | Coupled]:
        """Return the losses of each of this rank's micro-batches, [b] or ``Coupled``. Call on the last stage only."""
        objective, reference = self.objective, self._reference_logps
        data = [objective.data(batch, self.known) for batch in self.batches]
        if objective.facts.couples_pairs:
            places = [batch.index for batch in self.batches]
            return objective.couple(policy, reference, data, places, self.groups)
        against = reference or [None] * len(policy)
        return [objective.losses(*parts) for parts in zip(policy, against, data, strict=True)]

    def _pair_sums(self) -> Tensor:
        """Return the metric sums over this rank's pairs. Call on the last stage only."""
        reference = self._reference_logps
        sums = [
            self.objective.sums(loss, scored, reference[i] if reference else None, self.batches[i], self.known)
            for i, (loss, scored) in enumerate(zip(self._losses, self._latest, strict=True))
        ]
        return torch.stack(sums).sum(0)

    def per_pair(self) -> dict[str, np.ndarray]:
        """Return the values of the latest evaluation for each pair, in the order of the held-out set.

        Returns  `PAIR_COLUMNS` on every rank, [n] each, fp64 except ``index``; without a reference, the columns
                 ``ref_*`` are nan

        *Collectives*: on the last stage, an all-gather over dp of ``[pairs of a rank, columns]`` fp64; and a broadcast
        over pp from the last stage.
        """
        groups = self.groups
        places = sum(len(batch.index) for batch in self.batches)
        device = self.batches[0].tokens.device
        everyone = torch.empty((groups.dp.size() * places, len(PAIR_COLUMNS)), dtype=torch.float64, device=device)
        if groups.last_stage:
            mine = torch.cat([self._columns(place) for place in range(len(self.batches))])
            dist.all_gather_into_tensor(everyone, mine, group=groups.dp)
        if groups.pp.size() > 1:
            dist.broadcast(everyone, src=dist.get_process_group_ranks(groups.pp)[-1], group=groups.pp)
        rows = everyone[everyone[:, 0] >= 0]
        rows = rows[rows[:, 0].argsort()].cpu().numpy()
        columns = dict(zip(PAIR_COLUMNS, rows.T, strict=True))
        return columns | {"index": columns["index"].astype(np.int64)}

    def _columns(self, place: int) -> Tensor:
        """Return `PAIR_COLUMNS` for this rank's micro-batch ``place``, [b, columns]. Call on the last stage only."""
        policy, batch, objective = self._latest[place], self.batches[place], self.objective
        losses = self._losses[place]
        reference = self._reference_logps[place] if self._reference_logps else None
        chosen, rejected = objective.rewards(policy, reference)
        nothing = torch.full_like(policy.chosen, float("nan"))
        columns = [
            batch.index,
            policy.chosen,
            policy.rejected,
            reference.chosen if reference else nothing,
            reference.rejected if reference else nothing,
            chosen,
            rejected,
            chosen - rejected,
            accuracies(chosen - rejected, objective.facts.reward_scale * objective.tolerance(policy, self.known)),
            losses.losses if isinstance(losses, Coupled) else losses,
        ]
        return torch.stack([column.double() for column in columns], dim=1)


def held_out_evaluator(engine: Engine, pairs: PairDataset, reference: Reference) -> Evaluator:
    """Return an evaluator of all pairs in the held-out data set ``pairs``."""
    everything = np.arange(len(pairs))
    return Evaluator(
        engine.batches(pairs, everything),
        reference,
        engine.objective,
        known=batch_facts(pairs, everything),
        vocab_size=engine.arch.vocab_size,
        groups=engine.groups,
        pairs=len(pairs),
    )


def evaluation_path(config: Config, step: int, data: str = "") -> Path:
    """Return the path of the file that holds the evaluation after ``step``.

    data   name of the data set; empty for the run's own held-out pairs
    """
    name = f"step_{step:08d}_{data}" if data else f"step_{step:08d}"
    return Path(config.train.output_dir) / "eval" / f"{name}.parquet"


def judged_pairs(engine: Engine, evaluator: Evaluator, pairs: PairDataset, step: int) -> Evaluation:
    """Return the latest evaluation as a table with one row per pair, on every rank.

    pairs   the data set that ``evaluator`` was built with

    *Collectives*: those of :meth:`Evaluator.per_pair`.
    """
    config, objective = engine.config, engine.objective
    facts = {
        "step": step,
        "model": config.model_name,
        "loss": {"name": config.loss.name, **objective.options},
        "reference": _reference_name(config),
        "dtype": engine.dtype_name,
        "data": pairs.digest,
        "engine": __version__,
    }
    chosen, rejected = pairs.scored.T
    columns = {
        "id": np.array([halves.tobytes().hex() for halves in pairs.digests], dtype=object),
        "prompt_id": np.array([_hash(pairs.prompt(i)) for i in range(len(pairs))], dtype=object),
        "source": np.array(pairs.sources, dtype=object)[pairs.source_ids],
        "weight": pairs.weights,
        "prompt_tokens": pairs.lengths[:, 0],
        "chosen_tokens": chosen,
        "rejected_tokens": rejected,
    }
    return Evaluation(facts, columns | evaluator.per_pair())


def _reference_name(config: Config) -> str | None:
    if not reads_reference(config):
        return None
    return "the records' own" if config.reference_mode == "dataset" else config.reference_name


def _hash(ids: np.ndarray) -> str:
    return hashlib.blake2b(np.asarray(ids, dtype="<i4").tobytes(), digest_size=16).hexdigest()
