"""Measure the time of causal attention in stacked rows, with flash attention (deterministic and not) and with cuDNN.

The additional time of the first call with a new length is measured, too. In this call, cuDNN creates its plans.
"""

import argparse
import sys
from statistics import median

import torch
from attention import clock
from measure import Meter
from report import publish
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

KERNELS = {
    "flash, deterministic": (SDPBackend.FLASH_ATTENTION, True),
    "flash": (SDPBackend.FLASH_ATTENTION, False),
    "cuDNN": (SDPBackend.CUDNN_ATTENTION, False),
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--lengths", nargs="+", type=int, default=[1024, 4096] if gpu else [64], help="tokens of a row")
    add("--rows", type=int, default=2)
    add("--heads", type=int, default=32 if gpu else 4)
    add("--kv-heads", type=int, default=8 if gpu else 2)
    add("--head-dim", type=int, default=128 if gpu else 16)
    add("--new-lengths", type=int, default=6, help="number of new lengths whose first and second call are compared")
    add("--save", metavar="NAME", help="write results/NAME.md")
    return parser.parse_args(argv)


class Case:
    """Forward and backward pass over rows of equal length, in which each token attends to itself and earlier tokens."""

    def __init__(self, asked: argparse.Namespace, length: int):
        gpu = torch.cuda.is_available()
        place = {"device": "cuda", "dtype": torch.bfloat16} if gpu else {"device": "cpu", "dtype": torch.float32}
        heads = (asked.heads, asked.kv_heads, asked.kv_heads, asked.heads)
        *made, self.grad = (torch.randn(asked.rows, count, length, asked.head_dim, **place) for count in heads)
        self.inputs = [tensor.requires_grad_() for tensor in made]
        self.flops = 14 * asked.rows * asked.heads * asked.head_dim * length * (length + 1) / 2

    def run(self) -> None:
        """Compute the output and the gradients."""
        for tensor in self.inputs:
            tensor.grad = None
        scaled_dot_product_attention(*self.inputs, is_causal=True, enable_gqa=True).backward(self.grad)

    def seconds(self) -> float:
        """Return the time of one call, without a warm-up."""
        meter = Meter()
        meter.start()
        self.run()
        return meter.lap()[1]


def measure(asked: argparse.Namespace, name: str) -> list[str]:
    """Return the line of the table for the kernels ``name``, a key of ``KERNELS``."""
    backend, deterministic = KERNELS[name]
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    cells = [name]
    with sdpa_kernel(backend):
        for length in asked.lengths:
            case = Case(asked, length)
            case.run()
            time = clock(case.run)
            cells += [f"{1e3 * time:.2f}", f"{case.flops / time / 1e12:.1f}"]
        # In the first call with a new length, cuDNN creates a forward plan and a backward plan.
        news = [Case(asked, asked.lengths[0] + 8 * (1 + number)) for number in range(asked.new_lengths)]
        first = [case.seconds() for case in news]
        again = [case.seconds() for case in news]
        cells.append(f"{1e3 * (median(first) - median(again)):.2f}")
    torch.use_deterministic_algorithms(False)
    return cells


def main(argv: list[str] | None = None) -> int:
    """Print the table, and save it if ``--save`` is given. On a CPU, only flash attention is measured."""
    asked = arguments(argv)
    torch.manual_seed(0)
    sizes = [cell for length in asked.lengths for cell in (f"{length:,} tokens: ms", "TFLOP/s")]
    lines = [["kernels", *sizes, "additional ms of a new length"]]
    for name in KERNELS if torch.cuda.is_available() else ["flash"]:
        lines.append(measure(asked, name))
        print(*lines[-1], sep="  ", file=sys.stderr, flush=True)
    heads = f"{asked.heads} heads ({asked.kv_heads} KV)"
    publish(lines, f"{asked.rows} rows, {heads}, head size {asked.head_dim}, forward and backward", asked.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
