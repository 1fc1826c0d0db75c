"""Print versions, the time to create a rank's process groups, and the time of the first all-reduce.

On a GPU, also test Transformer Engine.
"""

import importlib
import importlib.metadata
import importlib.util
import time

import torch

from dpo_engine.platform.device import describe_stack, open_platform
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.platform.parallel import close_groups, open_groups

PACKAGES = ("torch", "triton", "megatron-core", "transformers")


def transformer_engine() -> str:
    """Compare a linear layer of Transformer Engine with a matrix product.

    Returns  the version and the largest difference, or why Transformer Engine cannot be used
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return "not installed"
    try:
        import transformer_engine.pytorch as te

        inputs = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
        layer = te.Linear(128, 128, bias=False, params_dtype=torch.bfloat16, device="cuda")
        apart = float((layer(inputs) - inputs @ layer.weight.T).abs().max())
    except Exception as error:
        return f"installed, but fails: {type(error).__name__}: {error}"
    return f"{importlib.metadata.version('transformer_engine')}, largest difference {apart:.1e}"


def main() -> None:
    """Print the GPU, the state of Transformer Engine, the versions, and the two measured times."""
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        print(f"{card.name}, {card.total_memory / 2**30:.1f} GiB")
        print(f"transformer_engine: {transformer_engine()}")
    installed = [name for name in PACKAGES if importlib.util.find_spec(name.replace("megatron-core", "megatron.core"))]
    print(*(f"{name} {importlib.metadata.version(name)}" for name in installed))
    platform = open_platform(deterministic=True)
    print(*describe_stack(platform), sep="\n")
    importlib.import_module("megatron.core.tensor_parallel")  # now, so that the import is not timed below
    platform.synchronize()
    began = time.perf_counter()
    groups = open_groups(ParallelDims(), platform, seed=0, timeout_s=60.0)
    opened = time.perf_counter()
    torch.distributed.all_reduce(torch.zeros(1, device=platform.device), group=groups.world)
    platform.synchronize()
    print(f"process groups: {opened - began:.2f} s; first all-reduce: {time.perf_counter() - opened:.2f} s")
    close_groups()


if __name__ == "__main__":
    main()
