"""Measure the time of tree attention, forward and backward, for each backend. Report the rate of useful operations."""

import argparse
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from measure import Meter
from report import publish
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl

from dpo_engine.model.attention_packages import TransformerEngine
from dpo_kernels import BACKENDS, Tree, register_backend, use_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
PAIRS = ["4,3,3", "10,5,5", "30,20,20", "127,62,52", "669,94,116"]
"""Token counts of prompt, chosen and rejected: three pairs of short texts, and the medians of two generated sets."""

TARGET_S = 0.2
"""Approximate duration of one measurement. Each reported time is the median of five measurements."""


def lengths(text: str) -> tuple[int, int, int]:
    """Parse the token counts of a pair's prompt, chosen and rejected."""
    prompt, chosen, rejected = (int(part) for part in text.split(","))
    return prompt, chosen, rejected


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--pairs", nargs="+", type=lengths, default=[lengths(text) for text in PAIRS], metavar="P,C,R")
    add("--row", nargs="+", type=int, default=[1, 4, 16, 64], metavar="N", help="pairs per row")
    add("--tokens", type=int, default=16384 if gpu else 2048, help="skip rows with more tokens")
    add("--heads", type=int, default=32 if gpu else 4)
    add("--kv-heads", type=int, help="default: the number of heads")
    add("--head-dim", type=int, default=128 if gpu else 64)
    add("--dtype", choices=DTYPES, default="bf16" if gpu else "fp32")
    add(
        "--backends",
        nargs="+",
        choices=("eager", "sdpa", "varlen", "triton", "te"),
        default=["eager", "sdpa", *(["varlen", "triton"] if gpu else [])],
    )
    add("--flash-attention", type=int, choices=(2, 3, 4), default=2, help="version for varlen; 3 and 4 need a package")
    add("--save", metavar="NAME", help="write results/NAME.md")
    asked = parser.parse_args(argv)
    asked.kv_heads = asked.kv_heads or asked.heads
    return asked


def row_of(pair: tuple[int, int, int], count: int) -> Tree:
    """Return a row of ``count`` identical pairs."""
    return Tree.of(pair * count, [parent for i in range(count) for parent in (-1, 3 * i, 3 * i)])


def once(backend: str, inputs: list[Tensor], grad: Tensor, tree: Tree) -> list[Tensor]:
    """Run one forward and backward pass; return the output and the gradients."""
    for tensor in inputs:
        tensor.grad = None
    output = BACKENDS[backend].tree_attention(*inputs, tree)
    output.backward(grad)
    return [output.detach(), *(tensor.grad for tensor in inputs)]


def clock(run: Callable[[], Any]) -> float:
    """Return the duration of one call of ``run`` in seconds: processor time, or wall time on a GPU.

    The caller must have called ``run`` before, so that no measurement includes a warm-up.
    """
    meter, gpu = Meter(), torch.cuda.is_available()

    def seconds(repeats: int) -> float:
        meter.start()
        for _ in range(repeats):
            run()
        return meter.lap()[gpu] / repeats

    repeats = max(1, int(TARGET_S / max(seconds(1), 1e-6)))
    return median(seconds(repeats) for _ in range(5))


def measure(asked: argparse.Namespace, pair: tuple[int, int, int], count: int) -> list[str]:
    """Return one line of the table. Raises `SystemExit` if a backend's result differs from the first backend's."""
    tree, device = row_of(pair, count), "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [(tree.n, asked.heads), (tree.n, asked.kv_heads), (tree.n, asked.kv_heads)]
    dtype = DTYPES[asked.dtype]
    made = [torch.randn(*shape, asked.head_dim, device=device).to(dtype) for shape in (*shapes, shapes[0])]
    inputs, grad = [tensor.requires_grad_() for tensor in made[:3]], made[3]
    expected = [tensor.clone() for tensor in once(asked.backends[0], inputs, grad, tree)]
    times = []
    for backend in asked.backends:
        for got, wanted in zip(once(backend, inputs, grad, tree), expected, strict=True):
            if not (got - wanted).norm() <= TOLERANCE[asked.dtype] * wanted.norm():
                raise SystemExit(f"{backend} and {asked.backends[0]} differ on a row of {count} x {pair}")
        times.append(clock(lambda backend=backend: once(backend, inputs, grad, tree)))
    work = 14 * asked.heads * asked.head_dim * tree.visible  # two matrix products forward, five backward
    return [
        f"{'+'.join(map(str, pair))} x {count}",
        f"{tree.n:,}",
        f"{tree.visible / tree.n**2:.1%}",
        *(f"{1e3 * time:.2f}" for time in times),
        f"{work / min(times) / 1e9:.0f}",
    ]


def main(argv: list[str] | None = None) -> int:
    """Print the table, and save it if ``--save`` is given."""
    asked = arguments(argv)
    torch.manual_seed(0)
    if "te" in asked.backends:
        register_backend("te", TransformerEngine)
    if asked.flash_attention != 2:
        activate_flash_attention_impl(f"FA{asked.flash_attention}")
    for backend in asked.backends:
        use_backend(backend, "attention")  # imports the backend, or explains why it cannot run here
    names = ["row", "tokens", "visible", *(f"{backend} ms" for backend in asked.backends), "GFLOP/s of the best"]
    lines = [names]
    for pair in asked.pairs:
        for count in asked.row:
            if sum(pair) * count <= asked.tokens:
                lines.append(measure(asked, pair, count))
                print(*lines[-1], sep="  ", file=sys.stderr, flush=True)
    heads = f"{asked.heads} heads" + (f" ({asked.kv_heads} KV)" if asked.kv_heads != asked.heads else "")
    publish(lines, f"{heads}, head size {asked.head_dim}, {asked.dtype}, forward and backward", asked.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
