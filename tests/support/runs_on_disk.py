"""Write directories of made-up runs of any size, with the files that ``train`` writes."""

import json
from pathlib import Path

import numpy as np
import yaml

from dpo_engine.reporting.comparison import report
from dpo_engine.reporting.pair_file import write_evaluation, write_json
from dpo_engine.reporting.shown_pairs import choose_pairs
from dpo_engine.reporting.token_file import TokenText, tokens_path, write_tokens
from support.evaluations import evaluation

WORDS = ("which", " number", " is", " larger")
CONFIG = {
    "model": {"path": "models/tiny"},
    "parallel": {"tp": 2},
    "loss": {"name": "sigmoid", "beta": 0.1},
    "optim": {"lr": 1e-6, "clip_grad": 1.0},
    "train": {"output_dir": "runs/x", "eval_interval": 10},
    "checkpoint": {"keep_best": None},
}


def pairs(count, *, seed=0, shift=1.0, **columns):
    """Make an evaluation of `count` random pairs. The expected value of a margin is `shift`."""
    random = np.random.default_rng(seed)
    lengths = random.integers(5, 400, (2, count))
    start = -random.uniform(0.5, 2.0, (2, count)) * lengths
    moved = np.stack([random.normal(2 * shift, 10, count), random.normal(-8 * shift, 10, count)])
    given = {
        "chosen_tokens": lengths[0],
        "rejected_tokens": lengths[1],
        "ref_chosen_logps": start[0],
        "ref_rejected_logps": start[1],
        "chosen_logps": start[0] + moved[0],
        "rejected_logps": start[1] + moved[1],
        "chosen_rewards": 0.1 * moved[0],
        "rejected_rewards": 0.1 * moved[1],
        "source": [("data/helpful.jsonl", "data/harmless.jsonl")[i % 2] for i in range(count)],
    }
    return evaluation(0.1 * (moved[0] - moved[1]), **(given | columns))


def texts_of(found, count, *, words=WORDS, length=None, prompt="Which is larger?", cut=""):
    """Yield random tokens for `count` pairs of an evaluation.

    The log-probabilities of a response's tokens sum to the response's log-probability in the evaluation.
    """
    random = np.random.default_rng(1)
    for row, kind in choose_pairs(found.columns, count).items():
        known = {"id": found.columns["id"][row], "index": row, "shown": kind}
        yield TokenText(**known, side="prompt", token_ids=[1, 2], text=[prompt], cut=cut)
        for side in ("chosen", "rejected"):
            size = length or int(found.columns[f"{side}_tokens"][row])
            ids = random.integers(len(words), size=size)
            shares = random.dirichlet(np.ones(size))
            logps, ref_logps = (shares * found.columns[f"{part}{side}_logps"][row] for part in ("", "ref_"))
            text = [words[i] for i in ids]
            yield TokenText(
                **known, side=side, token_ids=ids, text=text, logps=logps, ref_logps=ref_logps, scored=[True] * size
            )


def write_directory(
    folder: Path,
    *,
    steps=60,
    every=20,
    count=200,
    shown=20,
    losses=None,
    config=None,
    seed=0,
    shift=1.0,
    found=None,
    **of,
):
    """Write a run's configuration, metrics, log and evaluations, and return the run's directory.

    The last step has a checkpoint, of which only the manifest is written.

    losses   the held-out loss of each evaluation; None: losses that decrease
    found    the last evaluation; None: an evaluation of random pairs. Its summary is written for all evaluated steps
    of       arguments of :func:`texts_of`
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **(config or {})}))
    random = np.random.default_rng(seed)
    noise = random.normal(0, 0.02, (steps + 1, 2))
    lines = []
    evaluated = list(range(every, steps + 1, every))
    found = found or pairs(count, seed=seed, shift=shift)
    for step in range(1, steps + 1):
        share = step / steps
        values = {"loss": 0.6931 - 0.4 * share + noise[step, 0], "grad_norm": 1.0 + noise[step, 1]}
        values |= {"rewards/accuracies": 0.5 + 0.4 * share, "rewards/margins": share + noise[step, 0]}
        values |= {"rewards/chosen": 0.3 * share, "rewards/rejected": -0.7 * share, "learning_rate": 1e-6 * (1 - share)}
        values |= {"displacement/chosen": 3 * share, "displacement/rejected": -7 * share, "skipped_steps": 0.0}
        values |= {"time": 1e9 + 2.5 * step, "step_time_s": 2.0, "pairs_per_s": 32 + noise[step, 1], "mfu": 0.41}
        values |= {"logps/chosen": -100.0, "layout_gain": 1.7, "pairs_seen": 64.0 * step, "peak_memory_bytes": 6e10}
        lines.append({"step": step, **values})
        if step in evaluated:
            place = evaluated.index(step)
            loss = losses[place] if losses else 0.69 - 0.3 * share
            lines.append({"step": step, "eval/loss": loss, "eval/rewards/accuracies": 0.5 + 0.35 * share})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / f"checkpoints/step_{steps:08d}").mkdir(parents=True)
    (folder / f"checkpoints/step_{steps:08d}/manifest.json").write_text("{}")
    day = "2026-01-02 03:04:05"
    (folder / "log.txt").write_text(
        f"{day} --- started after step 0 of {steps}, process 7 on host ---\n"
        f"{day} layout: tp 2, pp 2, vpp 1, cp 1, dp 3 on 12 ranks; sequence parallelism on\n"
        f"{day} saved checkpoints/step_{every:08d} (1.2 GB in 0.4 s)\n"
        f"{day} --- started again after step {every} of {steps}, process 8 on host ---\n"
    )
    summary = report(found)
    for step in evaluated:
        (folder / "eval").mkdir(exist_ok=True)
        write_json(folder / f"eval/step_{step:08d}.json", summary)
    if evaluated:
        path = folder / f"eval/step_{evaluated[-1]:08d}.parquet"
        found.facts["step"] = evaluated[-1]
        write_evaluation(path, found)
        write_tokens(tokens_path(path), list(texts_of(found, shown, **of)), found.facts)
    return folder
