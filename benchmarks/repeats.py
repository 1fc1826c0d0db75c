"""Train the same steps several times, and compare the bits of the results and the memory that torch reserves.

The first two runs have equal settings. In the third run, torch's allocator uses segments of fixed size instead of
expandable segments.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pair_sets
import torch
from contest import run_job
from flops import Shape
from measure import Job, Measured
from report import publish

RUNS = {"first": "", "second": "", "fixed segments": "expandable_segments:False"}
"""The settings of torch's allocator in each run. If the text is empty, the engine chooses the settings."""
ALLOCATOR = "PYTORCH_ALLOC_CONF"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("model", help="Hugging Face checkpoint")
    add("--data", choices=pair_sets.LENGTHS, default="uf-like")
    add("--steps", type=int, default=30)
    add("--global-batch-size", type=int, default=16)
    add("--ours", nargs="*", default=[], metavar="A.B=C", help="config overrides")
    add("--save", metavar="NAME", help="write results/NAME.md")
    return parser.parse_args(argv)


def run(job: Job, allocator: str) -> Measured:
    """Run a job in its own process, with these settings of torch's allocator."""
    before = os.environ.pop(ALLOCATOR, None)
    try:
        if allocator:
            os.environ[ALLOCATOR] = allocator
        return run_job(job, threads=None)
    finally:
        os.environ.pop(ALLOCATOR, None)
        if before is not None:
            os.environ[ALLOCATOR] = before


def first_difference(one: Measured, other: Measured) -> str:
    """Describe the first difference between two runs.

    Returns  the first step whose metrics differ or, if there is none, whether the weights after the last step are equal
    """
    for step, (ours, theirs) in enumerate(zip(one.metrics, other.metrics, strict=True), 1):
        if ours != theirs:
            return f"differs in step {step}"
    return "equal" if one.digest == other.digest else "only the final weights differ"


def main(argv: list[str] | None = None) -> int:
    """Print the table, and save it if ``--save`` is given. Differing bits are reported, but are not an error."""
    asked = arguments(argv)
    count = asked.steps * asked.global_batch_size
    steps = np.arange(count).reshape(asked.steps, -1).tolist()
    lines = [["run", "bits", "s", "peak GiB", "reserved GiB", "reserved / peak", "GiB outside of torch"]]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.arrow"
        pair_sets.write(file, pair_sets.generate(asked.data, count, vocab_size=Shape.read(asked.model).vocab))
        dtype = "bf16" if torch.cuda.is_available() else "fp32"
        job = Job(
            "engine", asked.model, str(file), steps, lr=5e-4, dtype=dtype, overrides=tuple(asked.ours), digest=True
        )
        first: Measured | None = None
        for name, allocator in RUNS.items():
            found = run(job, allocator)
            first = first or found
            sizes = [found.peak_bytes, found.reserved_bytes, found.outside_bytes]
            gib = [f"{size / 2**30:.2f}" for size in sizes]
            time = sum(wall for _, wall in found.steps_s)
            share = f"{found.reserved_bytes / found.peak_bytes:.3f}"
            lines.append([name, first_difference(first, found), f"{time:.1f}", *gib[:2], share, gib[2]])
            print(*lines[-1], sep="  ", file=sys.stderr, flush=True)
    publish(lines, f"{asked.steps} steps of {asked.global_batch_size} pairs, {asked.data}", asked.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
