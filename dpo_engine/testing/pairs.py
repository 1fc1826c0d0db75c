"""A data set of random token pairs in memory, with the interface that the engine requires."""

from collections.abc import Sequence

import numpy as np

from dpo_engine.data.dataset import TokenPair, digest_halves

EOS = 2


class RandomPairs:
    """A data set of ``count`` random pairs.

    Unless ``sizes`` is given, prompts have 1 to 12 tokens, and responses have 2 to 16 tokens, including EOS.

    weighted  whether the pairs have different weights; otherwise all weights are 1
    judged    whether the pairs have margins and ground-truth rewards
    few       number of different prompts, and of different responses to each prompt; None: all are drawn separately
    sizes     for each pair, the numbers of tokens in prompt, chosen and rejected; None: random
    masked    whether most responses have a random mask, which selects the tokens to score
    """

    def __init__(
        self,
        count: int,
        vocab_size: int,
        *,
        seed: int = 0,
        weighted: bool = True,
        judged: bool = False,
        few: int | None = None,
        sizes: Sequence[tuple[int, int, int]] | None = None,
        masked: bool = False,
    ):
        generator = np.random.default_rng(seed)
        masks = np.random.default_rng(seed + 1000)

        def tokens(longest: int) -> np.ndarray:
            return generator.integers(3, vocab_size, size=generator.integers(1, longest + 1), dtype=np.int32)

        def judgement() -> float:
            return float(generator.normal()) if judged else float("nan")

        def response() -> np.ndarray:
            return np.append(tokens(15), np.int32(EOS))

        known = [(tokens(12), [response() for _ in range(few)]) for _ in range(few or 0)]

        def texts(index: int) -> tuple[np.ndarray, ...]:
            if sizes:
                return tuple(generator.integers(3, vocab_size, size=size, dtype=np.int32) for size in sizes[index])
            if not known:
                return tokens(12), response(), response()
            prompt, responses = known[generator.integers(few)]
            chosen, rejected = generator.choice(few, 2, replace=False)
            return prompt, responses[chosen], responses[rejected]

        self.pairs = [
            TokenPair(
                *texts(i),
                weight=float(generator.choice([0.5, 1.0, 2.0])) if weighted else 1.0,
                margin=judgement(),
                digest=f"{seed:016x}{i + 1:016x}",
                source=i % 2,
                chosen_reward=judgement(),
                rejected_reward=judgement(),
            )
            for i in range(count)
        ]
        if masked:
            self.pairs = [pair._replace(**self._masks(pair, masks)) for pair in self.pairs]
        self.scored = np.array([p.scored_counts for p in self.pairs])
        self.lengths = np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in self.pairs])
        self.weights = np.array([p.weight for p in self.pairs])
        self.source_ids = np.array([p.source for p in self.pairs])
        self.sources = ["first.jsonl", "second.jsonl"]
        self.digests = np.stack([digest_halves(p.digest) for p in self.pairs])

    @staticmethod
    def _masks(pair: TokenPair, generator: np.random.Generator) -> dict[str, np.ndarray | None]:
        """Draw masks with at least one scored token. About a quarter of the responses get no mask, so all their tokens
        are scored."""

        def mask(ids: np.ndarray) -> np.ndarray | None:
            drawn = generator.random(len(ids)) < 0.6
            drawn[generator.integers(len(ids))] = True
            return None if generator.random() < 0.25 else drawn

        return {"chosen_mask": mask(pair.chosen), "rejected_mask": mask(pair.rejected)}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TokenPair:
        return self.pairs[index]


def global_batches(sizes: Sequence[int]) -> list[np.ndarray]:
    """Return consecutive index ranges of the given sizes."""
    edges = np.cumsum([0, *sizes])
    return [np.arange(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
