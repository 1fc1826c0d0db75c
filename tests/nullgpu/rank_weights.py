"""Load a checkpoint into one rank of a run on the null GPU, and report the rank's parameters and their attributes.

    tests/nullgpu/nullgpu python tests/nullgpu/rank_weights.py --model MODEL --out FOLDER --world 2 parallel.ep=2

The null GPU executes copies of at most 16 MiB between host and device, so weights of at most this size reach the device
and can be read back. Positional arguments are configuration keys. For each parameter, the report contains the
parameter's name in the weight table and the attributes that determine how the gradient is reduced. If this rank can
export the parameter's tensors without other ranks, the report also says for each of these tensors whether it equals the
checkpoint's tensor.
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="directory of the checkpoint")
parser.add_argument("--out", required=True, type=Path, help="directory for report.json and weights.safetensors")
parser.add_argument("--world", type=int, default=1, help="number of ranks in the run")
parser.add_argument("--rank", type=int, default=0)
parser.add_argument("keys", nargs="*", help="configuration, such as parallel.ep=2 model.spec=te")
asked = parser.parse_intermixed_args()
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.update(RANK=str(asked.rank), WORLD_SIZE=str(asked.world), LOCAL_RANK=str(asked.rank % 8))
os.environ.update(TORCH_NCCL_ENABLE_MONITORING="0", TORCHDYNAMO_DISABLE="1")
os.environ.pop("MASTER_ADDR", None)
warnings.simplefilter("ignore")

import torch  # noqa: E402
import yaml  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import dpo_engine.model.weights.load as load_module  # noqa: E402
from card import Card  # noqa: E402
from dpo_engine.config.run import Config  # noqa: E402
from dpo_engine.model.weights.files import CheckpointFiles  # noqa: E402
from dpo_engine.model.weights.save import assemble, gather_shards  # noqa: E402
from dpo_engine.model.weights.table import Placed, placed_parameters  # noqa: E402
from dpo_engine.optim.optimizer import Trained  # noqa: E402
from dpo_engine.training.engine import Engine  # noqa: E402
from lone_rank import replace_numbers, replace_peers  # noqa: E402


def configuration(folder: str) -> Config:
    """Build the run's configuration: the keys from the command line, and defaults for all other keys."""
    values: dict[str, Any] = {"model": {"path": asked.model}, "data": {"train": "none.jsonl"}}
    values |= {"train": {"output_dir": folder, "global_batch_size": 2 * asked.world}, "reference": {"verify": 0}}
    for text in asked.keys:
        key, value = text.split("=", 1)
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = yaml.safe_load(value)
    return Config.model_validate(values)


def expert_buffers(trained: Trained) -> set[torch.Tensor]:
    """Return the parameters whose gradients Megatron sums over the copies of an expert."""
    buffers = [buffer for chunk in trained.chunks for buffer in chunk.expert_parallel_buffers]
    return {parameter for buffer in buffers for parameter in buffer.params}


def facts(placed: Placed, summed: set[torch.Tensor]) -> dict[str, Any]:
    """Return the attributes of a parameter that determine how Megatron reduces its gradient."""
    parameter = placed.parameter
    return {
        "table": placed.name,
        "replicated": placed.rule.cut is None,
        "allreduce": getattr(parameter, "allreduce", True),
        "sharded": getattr(parameter, "tensor_model_parallel", False),
        "summed_over_copies": parameter in summed,
        "summed_over_tp": getattr(parameter, "sequence_parallel", False),
        "written": None,
    }


def main() -> None:
    """Load the checkpoint, and write report.json and weights.safetensors."""
    replace_peers(Card(), asked.rank, asked.world)
    replace_numbers(weights=True)
    load_module.table_names = lambda arch: set()  # skip the check for tensors that no rank reads
    finite = torch.Tensor.isfinite
    torch.Tensor.isfinite = lambda self: torch.ones(self.shape) if self.is_cuda else finite(self)  # kernels do not run
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine.open(configuration(folder))
        trained = engine.load_policy(total_steps=10)
        chunks = [chunk.module for chunk in trained.chunks]
        # DDP filled its buffers by copies from device memory to device memory. The null GPU executes only small copies
        # of this kind, so most weights are missing from the buffers. Load the weights again, directly into the buffers.
        engine.load_weights(chunks, asked.model, key="model.path")
        names = {parameter: name for chunk in chunks for name, parameter in chunk.named_parameters()}
        files, summed = CheckpointFiles(asked.model), expert_buffers(trained)
        report, weights = {}, {}
        for placed in placed_parameters(chunks, engine.arch, engine.groups):
            name = names.pop(placed.parameter)
            report[name], weights[name] = facts(placed, summed), placed.parameter.detach().cpu()
            if placed.rule.cut is None or placed.shards.size() == 1:  # no NCCL needed
                kinds = {tensor.name: files.dtype(tensor.name) for tensor in placed.tensors(engine.arch)}
                written = assemble(placed, gather_shards(placed), engine.arch, kinds)
                report[name]["written"] = {
                    name: torch.equal(value, files.slices([name])[0][:]) for name, value in written.items()
                }
        assert not names, names
    save_file(weights, asked.out / "weights.safetensors")
    (asked.out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
    os._exit(0)  # destroying process groups would wait for ranks that do not exist
