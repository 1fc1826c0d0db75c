"""Provide the pairs to train on, as token ids: random pairs with published median lengths, or pairs from files."""

from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from dpo_engine.batching.plan import epoch_order
from dpo_engine.config.run import Config
from dpo_engine.data.dataset import PairDataset, TokenPair, pair_digest
from dpo_engine.data.pair_writer import PairWriter
from dpo_engine.data.tokenize import build_dataset
from dpo_engine.data.tokenizer import load_tokenizer

FIRST_ORDINARY_ID = 3
SHORTEST, LONGEST = 4, 1024


class Lengths(NamedTuple):
    """Parameters of log-normal distributions of lengths in tokens.

    prompt, response                medians
    prompt_spread, response_spread  standard deviations of the logarithms
    correlation                     correlation of the logarithms of the lengths of two responses to one prompt
    responses                       number of responses per prompt; any two of them form a pair
    """

    prompt: float
    response: float
    prompt_spread: float
    response_spread: float
    correlation: float
    responses: int = 2


LENGTHS = {
    "hh-like": Lengths(127, 59, 0.80, 0.75, 0.3),
    "uf-like": Lengths(121, 288, 0.80, 0.60, 0.5),
    "helpsteer-like": Lengths(669, 106, 0.60, 0.60, 0.4),
    "tldr-like": Lengths(382, 34, 0.35, 0.35, 0.3, responses=3),
}
"""The medians are computed from two values in Wang & Hegde, "Accelerating Direct Preference Optimization with Prefix
Sharing" (2024): the median length of prompt plus response, and the median ratio between prompt length and response
length. The spreads and correlations are assumptions, because the paper does not give them."""


def generate(name: str, count: int, *, vocab_size: int, seed: int = 0) -> Iterator[TokenPair]:
    """Yield `count` pairs of random tokens with the lengths of a data set. Pairs with the same prompt are adjacent.

    The lengths are quantiles of the distribution, in random order. Even a small set therefore has the intended medians.
    """
    model = LENGTHS[name]
    generator = np.random.default_rng([seed, sorted(LENGTHS).index(name)])
    choices = list(combinations(range(model.responses), 2))
    prompts = -(-count // len(choices))
    shared = generator.standard_normal((prompts, 1))
    own = generator.standard_normal((prompts, model.responses))
    responses = np.sqrt(model.correlation) * shared + np.sqrt(1 - model.correlation) * own
    prompt_lengths = _log_normal(generator.standard_normal(prompts), model.prompt, model.prompt_spread)
    response_lengths = _log_normal(responses, model.response, model.response_spread)
    made = 0
    for prompt_length, lengths in zip(prompt_lengths, response_lengths, strict=True):
        prompt, *written = (
            generator.integers(FIRST_ORDINARY_ID, vocab_size, size=length, dtype=np.int32)
            for length in (prompt_length, *lengths)
        )
        for better, worse in choices[: count - made]:
            made += 1
            yield _pair(prompt, written[better], written[worse])


def _log_normal(order: np.ndarray, median: float, spread: float) -> np.ndarray:
    """Return quantiles of a log-normal distribution that have the same ranks as the entries of `order` [any shape]."""
    ranks = np.argsort(np.argsort(order, axis=None)).reshape(order.shape)
    places = [NormalDist().inv_cdf((rank + 0.5) / order.size) for rank in ranks.flat]
    lengths = median * np.exp(spread * np.array(places)).reshape(order.shape)
    return lengths.round().astype(int).clip(SHORTEST, LONGEST)


def _pair(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> TokenPair:
    digest = pair_digest(prompt, chosen, rejected).hex()
    return TokenPair(prompt, chosen, rejected, weight=1.0, margin=float("nan"), digest=digest, source=0)


def from_file(
    path: str, count: int, *, tokenizer: str, template: str | None, max_length: int, cache: Path, seed: int = 0
) -> Iterator[TokenPair]:
    """Yield `count` pairs from a file, or all pairs if there are fewer. Pairs with the same prompt are adjacent.

    tokenizer   a transformers directory, or a sentencepiece *.model file
    template    file with a chat template, for records that are conversations
    max_length  maximum number of tokens in prompt plus response; longer pairs are left out

    The order of the prompts depends only on `seed`. Raises an `EngineError` for an unusable file or tokenizer.
    """
    config = Config.parse(
        {
            "model": {"path": tokenizer},
            "data": {
                "train": path,
                "max_length": max_length,
                "truncation": "drop",
                "chat_template": template,
                "on_bad_line": "skip",
            },
            "train": {"output_dir": str(cache)},
        }
    )
    data = config.data
    pairs, _ = build_dataset(data.train, load_tokenizer(tokenizer, data.chat_template), data, cache)
    by_prompt: dict[bytes, list[int]] = {}
    for index in range(len(pairs)):
        by_prompt.setdefault(pairs[index].prompt.tobytes(), []).append(index)
    groups = list(by_prompt.values())
    drawn = [index for place in epoch_order(len(groups), seed=seed, epoch=0) for index in groups[place]]
    return (pairs[index] for index in drawn[:count])


def write(path: Path, pairs: Iterable[TokenPair]) -> PairDataset:
    """Write pairs to a file that every measured process opens."""
    with PairWriter(path) as writer:
        for pair in pairs:
            writer.add(pair)
        writer.finish({})
    return PairDataset(path, sources=[path.name])
