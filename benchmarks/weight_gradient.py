"""Measure the time to add a weight's gradient to an fp32 buffer, with two operations and with one fused operation.

A weight's gradient is a matrix product. Without Apex, Megatron-Core computes this product in bf16, and then adds it to
the buffer. torch.addmm with out_dtype would multiply and add in one operation, without the rounding to bf16.
"""

import argparse
import sys

import torch
from attention import clock
from report import publish

SHAPES = ["6144,4096,14336", "6144,4096,4096", "6144,2048,8192", "600,2048,8192"]
"""Tokens, inputs, and outputs of a linear layer."""


def separately(inputs: torch.Tensor, grad: torch.Tensor, buffer: torch.Tensor) -> None:
    """Add ``grad.T @ inputs``, rounded to the dtype of the inputs, to the buffer."""
    buffer.add_(grad.t().matmul(inputs))


def together(inputs: torch.Tensor, grad: torch.Tensor, buffer: torch.Tensor) -> None:
    """Add ``grad.T @ inputs`` to the fp32 buffer in one operation. On a CPU, torch supports this only in fp32."""
    if inputs.dtype is torch.float32:
        buffer.addmm_(grad.t(), inputs)
    else:
        torch.addmm(buffer, grad.t(), inputs, out_dtype=torch.float32, out=buffer)


def measure(tokens: int, width: int, outputs: int) -> list[str]:
    """Return one line of the table: times, and the errors after two additions.

    An error is the norm of the difference from an fp64 computation, divided by the norm of that computation.
    """
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    inputs = torch.randn(tokens, width, device=device).to(dtype)
    grad = torch.randn(tokens, outputs, device=device).to(dtype)
    exact = 2 * (grad.double().t() @ inputs.double())
    times, errors = [], []
    for add in (separately, together):
        buffer = torch.zeros(outputs, width, device=device)
        add(inputs, grad, buffer)
        add(inputs, grad, buffer)
        errors.append(float((buffer.double() - exact).norm() / exact.norm()))
        times.append(clock(lambda add=add, buffer=buffer: add(inputs, grad, buffer)))
    numbers = [f"{1e3 * time:.3f}" for time in times]
    return [f"{tokens:,}, {width:,}, {outputs:,}", *numbers, *(f"{error:.1e}" for error in errors)]


def main(argv: list[str] | None = None) -> int:
    """Print the table, and save it if ``--save`` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    small = ["64,32,48"]
    parser.add_argument("--shapes", nargs="+", default=SHAPES if torch.cuda.is_available() else small)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.md")
    asked = parser.parse_args(argv)
    torch.manual_seed(0)
    lines = [["tokens, inputs, outputs", "two operations (ms)", "one operation (ms)", "error of two", "error of one"]]
    for text in asked.shapes:
        lines.append(measure(*map(int, text.split(","))))
        print(*lines[-1], sep="  ", file=sys.stderr, flush=True)
    publish(lines, "gradients of weights, added to an fp32 buffer", asked.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
