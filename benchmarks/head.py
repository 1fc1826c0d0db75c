"""Compare the time of the output layer in each backend, forward and backward, with that of bare matrix products."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from attention import TOLERANCE, clock
from report import publish

from dpo_kernels import BACKENDS, use_backend

SHAPES = ["8192,4096,151936", "8192,4096,128256", "8192,2048,128256"]
"""Scored tokens, hidden size, and vocabulary size."""
CHUNK = 1024


def shape(text: str) -> tuple[int, int, int]:
    """Parse the number of tokens, the hidden size, and the vocabulary size."""
    tokens, hidden, vocab = (int(part) for part in text.split(","))
    return tokens, hidden, vocab


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    small = ["512,64,1000"]
    add("--shapes", nargs="+", type=shape, default=[shape(text) for text in (SHAPES if gpu else small)])
    add("--backends", nargs="+", choices=("eager", "triton"), default=["eager", *(["triton"] if gpu else [])])
    add("--save", metavar="NAME", help="write results/NAME.md")
    return parser.parse_args(argv)


def tensors(tokens: int, hidden: int, vocab: int) -> dict[str, torch.Tensor]:
    """Return random inputs: hidden states, weight, targets, gradients, and the fp32 buffer for weight gradients."""
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    return {
        "hidden": torch.randn(tokens, hidden, device=device).to(dtype) * hidden**-0.5,
        "weight": torch.randn(vocab, hidden, device=device).to(dtype),
        "targets": torch.randint(0, vocab, (tokens,), device=device),
        "grad": torch.randn(tokens, device=device),
        "d_weight": torch.zeros(vocab, hidden, device=device),
    }


def kept(backend: str, given: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """Return a function that scores all tokens chunk by chunk and computes the gradients, as a training step does."""
    operations, vocab = BACKENDS[backend], len(given["weight"])

    def run() -> torch.Tensor:
        for start in range(0, len(given["hidden"]), CHUNK):
            part = slice(start, start + CHUNK)
            hidden, targets = given["hidden"][part], given["targets"][part]
            stats, logits = operations.linear_keep(hidden, given["weight"], targets, 0, vocab)
            lse = stats.maximum + stats.sum_exp.log()
            result = operations.linear_kept_grad(logits, lse, given["grad"][part], d_weight=given["d_weight"])
        return result

    return run


def products(given: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """Return a function that computes only the three matrix products, in the same chunks."""
    logits = given["weight"].new_zeros(CHUNK, len(given["weight"]))

    def run() -> torch.Tensor:
        for start in range(0, len(given["hidden"]), CHUNK):
            hidden = given["hidden"][start : start + CHUNK]
            torch.mm(hidden, given["weight"].T, out=logits[: len(hidden)])
            result = logits[: len(hidden)] @ given["weight"]
            torch.mm(logits[: len(hidden)].T, hidden)
        return result

    return run


def main(argv: list[str] | None = None) -> int:
    """Print the table, and save it if ``--save`` is given. Raises `SystemExit` if two backends differ."""
    asked = arguments(argv)
    torch.manual_seed(0)
    for backend in asked.backends:
        use_backend(backend, "head")  # imports the backend, or explains why it cannot run here
    names = ["tokens, hidden, vocabulary", "products ms", *(f"{name} ms" for name in asked.backends)]
    lines = [[*names, "best / products"]]
    for size in asked.shapes:
        given = tensors(*size)
        runs = [products(given), *(kept(backend, given) for backend in asked.backends)]
        _, *found = (run() for run in runs)
        tolerance = TOLERANCE["bf16" if torch.cuda.is_available() else "fp32"]
        for backend, gradient in zip(asked.backends, found, strict=True):
            if not (gradient - found[0]).norm() <= tolerance * found[0].norm():
                raise SystemExit(f"{backend} and {asked.backends[0]} differ on {size}")
        bare, *times = (clock(run) for run in runs)
        numbers = [f"{1e3 * time:.2f}" for time in (bare, *times)]
        lines.append([", ".join(f"{n:,}" for n in size), *numbers, f"{min(times) / bare:.2f}"])
        print(*lines[-1], sep="  ", file=sys.stderr, flush=True)
    publish(lines, f"chunks of {CHUNK} tokens, with gradients", asked.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
