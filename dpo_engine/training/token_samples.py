"""Write the log-probability of each token of selected held-out pairs, under the policy and under the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from dpo_engine.config.run import Config
from dpo_engine.data.cut_prompts import cut_prompts
from dpo_engine.data.dataset import PairDataset
from dpo_engine.data.pieces import text_pieces
from dpo_engine.data.tokenizer import Tokenizer
from dpo_engine.platform.long_work import Meter, from_first, without_time_limit
from dpo_engine.platform.parallel import working
from dpo_engine.platform.progress_line import counting
from dpo_engine.reporting.pair_file import Evaluation
from dpo_engine.reporting.shown_pairs import choose_pairs
from dpo_engine.reporting.token_file import TokenText, tokens_path, write_tokens
from dpo_engine.scoring.reference import Reference
from dpo_engine.scoring.tokens import score_sites, token_logps
from dpo_engine.training.engine import Engine
from dpo_engine.training.run_data import open_tokenizer


def sample_tokens(
    engine: Engine,
    chunks: Sequence[torch.nn.Module],
    reference: Reference,
    pairs: PairDataset,
    evaluation: Evaluation,
    *,
    count: int,
    path: Path,
    tokenizer: Callable[[Config], Tokenizer] = open_tokenizer,
) -> Path:
    """Select pairs of an evaluation, score their tokens, and write the results to a file.

    chunks      this rank's part of the policy
    pairs       the data set that was evaluated
    count       number of pairs to select
    path        Parquet file of the evaluation; the tokens are written to a file next to it
    tokenizer   opens the run's tokenizer, for the text of the tokens

    Returns  the path of the file with the tokens

    *Collectives*: those of scoring and of :func:`~dpo_engine.scoring.tokens.token_logps`; over world, four all-gathers
    and one broadcast of objects. Writing has no time limit.
    """
    world, writer = engine.groups.world, engine.groups.world.rank() == 0
    chosen = from_first(world, lambda: choose_pairs(evaluation.columns, count))
    indices = np.array(list(chosen), dtype=np.int64)
    batches = engine.batches(pairs, indices)
    parts = (1 + reference.passes) * sum(len(batch.index) for batch in batches)
    shown = counting("scoring tokens", len(indices), parts=parts, shown=writer)
    with working(alone=engine.groups.pp.size() > 1), shown:
        sites = score_sites(chunks, batches, vocab_size=engine.arch.vocab_size, groups=engine.groups)
        others = reference.site_logps(batches)
    policy = token_logps(sites, batches, pairs, indices, engine.groups)
    known = None if others is None else token_logps(others, batches, pairs, indices, engine.groups)
    to = tokens_path(path)

    def write() -> None:
        texts = _texts(engine.config, tokenizer(engine.config), pairs, evaluation, chosen, policy, known)
        write_tokens(to, list(texts), evaluation.facts)

    without_time_limit(world, write if writer else lambda: None, Meter(f"writing {to}"))
    return to


def _texts(
    config: Config,
    tokenizer: Tokenizer,
    pairs: PairDataset,
    evaluation: Evaluation,
    shown: dict[int, str],
    policy: np.ndarray,
    reference: np.ndarray | None,
) -> Iterator[TokenText]:
    start, cut = 0, cut_prompts(pairs, list(shown), config.data, tokenizer)
    for index, kind in shown.items():
        pair = pairs[index]
        known = {"id": str(evaluation.columns["id"][index]), "index": index, "shown": kind}
        text, gone = [tokenizer.decode(pair.prompt)], cut[index]
        removed = None if gone is None else tokenizer.decode(gone) if gone else ""
        yield TokenText(**known, side="prompt", token_ids=pair.prompt, text=text, cut=removed)
        for side, mask in (("chosen", pair.chosen_mask), ("rejected", pair.rejected_mask)):
            ids = getattr(pair, side)
            scored = np.ones(len(ids), dtype=bool) if mask is None else mask
            own, others = (
                None if values is None else np.where(scored, values[start : start + len(ids)], np.nan)
                for values in (policy, reference)
            )
            start += len(ids)
            pieces = text_pieces(ids, tokenizer)
            yield TokenText(**known, side=side, token_ids=ids, text=pieces, logps=own, ref_logps=others, scored=scored)


def unknown_reference(engine: Engine) -> str | None:
    """Return a log line if the reference's log-probabilities are known only as sums over responses; otherwise, None."""
    mode = engine.config.reference_mode
    if not engine.objective.facts.needs_reference or mode not in ("stored", "dataset"):
        return None
    return (
        f"tokens: reference.mode={mode} provides only one log-probability per response, so tokens have no "
        "log-probability under the reference; `dpo-engine eval RUN.yaml --tokens N reference.mode=resident` adds these "
        "log-probabilities"
    )
