"""What must be equal on all ranks is compared, so that a difference is named instead of a hang or a wrong model.

First where the ranks meet, through the store, before any process group exists: another layout on one rank would leave
the others waiting in the making of groups. Then by one collective before the first step and at an interval, with the
data and with the weights that several ranks hold copies of.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_engine.checkpoint.identity import code_version, model_identity
from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError, DataError, EngineError, NumbersError
from dpo_engine.model.architecture import FAMILIES, Architecture
from dpo_engine.model.weights.table import placed_parameters
from dpo_engine.platform.device import Platform
from dpo_engine.platform.parallel import ParallelGroups
from dpo_engine.wording import show

Facts = Mapping[str, Mapping[str, str]]
"""Kind, one of :data:`KINDS`, to names and values of what all ranks must share."""

SWITCHES = {
    "NVTE_*": "it chooses Transformer Engine's kernels",
    "DPO_KERNELS": "it chooses the engine's kernels",
    "TRITON_INTERPRET": "it runs Triton's kernels as Python",
    "NCCL_ALGO": "it decides the order of additions, and ranks that disagree wait for each other",
    "NCCL_PROTO": "ranks that disagree wait for each other",
    "NCCL_NVLS_ENABLE": "it decides the order of additions, and ranks that disagree wait for each other",
    "NCCL_COLLNET_ENABLE": "it decides the order of additions, and ranks that disagree wait for each other",
    "NCCL_M??_NCHANNELS": "ranks that disagree wait for each other",
    "NCCL_M??_CTAS": "ranks that disagree wait for each other",
    "NCCL_BUFFSIZE": "ranks that disagree wait for each other",
    "NCCL_IB_DISABLE": "a rank that does without InfiniBand cannot reach one that uses it",
    "NCCL_NET": "ranks that use different networks cannot reach each other",
    "TORCH_DISTRIBUTED_DEBUG": "DETAIL adds collectives to every collective",
    "TORCH_NCCL_*": "it decides when a rank waits for its collectives",
    "CUDA_DEVICE_MAX_CONNECTIONS": "it decides in which order a rank's collectives start",
    "CUBLAS_WORKSPACE_CONFIG": "it decides which matrix products cuBLAS may use",
    "CUBLASLT_WORKSPACE_SIZE": "it decides which matrix products cuBLAS may use",
    "TORCH_BLAS_PREFER_*": "it chooses the library of matrix products",
    "NVIDIA_TF32_OVERRIDE": "it rounds the factors of matrix products",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "it rounds the factors of matrix products",
    "TORCHDYNAMO_DISABLE": "compiled code rounds differently",
    "TORCH_COMPILE_DISABLE": "compiled code rounds differently",
    "ATEN_CPU_CAPABILITY": "it chooses the instructions that add on a CPU",
    "MKL_CBWR": "it chooses the instructions that add on a CPU",
}
"""Variables that change numbers or can make ranks wait for each other, and why.

Left out on purpose: the numbers of threads (OMP_NUM_THREADS, MKL_NUM_THREADS), which differ where nodes do, and round
only what each rank computes for itself; devices and interfaces (CUDA_VISIBLE_DEVICES, NCCL_SOCKET_IFNAME, NCCL_IB_HCA),
which are a node's own; allocators and logs, which change neither.
"""

LOGS = ("NVTE_DEBUG*", "TORCH_NCCL_*DUMP*", "TORCH_NCCL_*TRACE*", "TORCH_NCCL_DEBUG*")
"""Variables among :data:`SWITCHES` that only write."""

PER_NODE = ("data.cache_dir",)
"""Keys of a run that may differ: a node's own disk."""

KINDS: dict[str, tuple[type[EngineError], str]] = {
    "ranks": (ConfigError, "start all ranks of a job with the same number"),
    "config": (ConfigError, "start all ranks with one run file and the same overrides"),
    "code": (ConfigError, "install the same on all nodes"),
    "environment": (ConfigError, "set it alike on all nodes"),
    "platform": (ConfigError, "a node lacks a GPU or a library; look at it, or leave it out"),
    "model": (ConfigError, "config.json in model.path is not the same on all nodes; copy it again"),
    "tokenizer": (ConfigError, "its files are not the same on all nodes; copy them again"),
    "data": (DataError, "the files are not the same on all nodes, or one sees them late; copy them again"),
}
"""What may differ, the error it is and the way out; an earlier kind explains a later one."""

NUMBER = "number of ranks"
MOST_LINES = 10
MOST_VALUES = 3
READ_WITHIN_S = 5.0
BLOCK = 1 << 22
FOLD = 0x5851F42D4C957F2D


def environment(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that :data:`SWITCHES` names, as far as they are set."""
    return {
        name: variables[name]
        for name in sorted(variables)
        if any(fnmatch(name, switch) for switch in SWITCHES) and not any(fnmatch(name, log) for log in LOGS)
    }


def rank_facts(config: Config, arch: Architecture, platform: Platform, spec: str) -> dict[str, dict[str, str]]:
    """What a rank knows before it has met any other."""
    settings = dict(_flat(config.model_dump(mode="json")))
    return {
        "config": {name: value for name, value in settings.items() if name not in PER_NODE},
        "code": code_version(config.plugins),
        "environment": environment(),
        "platform": {"device": platform.device.type, "layer spec": spec},
        "model": dict(_flat(model_identity(arch)["model"])),
    }


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and texts of nested values."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{name}[{index}]")
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)


def compare_at_rendezvous(store: dist.Store, rank: int, world: int, facts: Facts) -> None:
    """Compare what the ranks know when they meet, before any process group exists.

    Rank 0 reads what the others have put into the store and answers all of them. A rank that was told of another number
    of ranks than rank 0 is answered at once, whoever else is missing.

    Raises :class:`~dpo_engine.errors.ConfigError` on every rank, with what differs.
    """
    if world == 1:
        return
    text = json.dumps({"ranks": {NUMBER: str(world)}, **facts})
    name = hashlib.sha256(text.encode()).hexdigest()
    store.set(f"facts/{name}", text)
    store.set(f"rank/{rank}", name)
    readers = world
    if rank == 0:
        found = _read_facts(store, world)
        readers = max(int(theirs["ranks"][NUMBER]) for theirs in found.values())
        store.set("verdict", json.dumps([world, _differences(found)[1]]))
    asked, problems = json.loads(store.get("verdict"))
    if not problems and asked != world:
        problems = [f"{NUMBER}: {asked} on rank 0, {world} on rank {rank}; {KINDS['ranks'][1]}"]
    if problems:
        done, deadline = store.add("read", 1), time.monotonic() + READ_WITHIN_S
        while rank == 0 and done < readers and time.monotonic() < deadline:  # the store goes when rank 0 does
            time.sleep(0.01)
            done = store.add("read", 0)
        raise ConfigError(problems)


def _read_facts(store: dist.Store, world: int) -> dict[int, Facts]:
    """The facts of each rank, up to the first one that was told of another number of ranks."""
    known: dict[str, Facts] = {}
    found = {}
    for rank in range(world):
        name = store.get(f"rank/{rank}").decode()
        if name not in known:
            known[name] = json.loads(store.get(f"facts/{name}"))
        found[rank] = known[name]
        if found[rank]["ranks"][NUMBER] != str(world):
            break
    return found


def _differences(facts: Mapping[int, Facts]) -> tuple[type[EngineError], list[str]]:
    """The error of the first kind in which ranks differ, and a line for each difference."""
    error, lines = EngineError, []
    if all(theirs is facts[0] or theirs == facts[0] for theirs in facts.values()):
        return error, lines
    for kind, (kind_error, way_out) in KINDS.items():
        parts = {rank: theirs.get(kind, {}) for rank, theirs in facts.items()}
        for name in dict.fromkeys(name for part in parts.values() for name in part):
            values = {rank: part.get(name) for rank, part in parts.items()}
            if len(set(values.values())) > 1:
                error = error if lines else kind_error
                hint = f"{_reason(name)}; {way_out}" if kind == "environment" else way_out
                lines.append(f"{name}: {by_value(values)}; {hint}")
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"{len(lines) - MOST_LINES} more settings differ between ranks"]
    return error, lines


def _reason(variable: str) -> str:
    return next(why for switch, why in SWITCHES.items() if fnmatch(variable, switch))


def by_value(values: Mapping[int, Any]) -> str:
    """``0.1 on ranks 0-2, 0.2 on rank 3``: who has which value; the one that most ranks have comes first."""
    holders: dict[Any, list[int]] = {}
    for rank, value in sorted(values.items()):
        holders.setdefault(value, []).append(rank)
    ordered = sorted(holders.items(), key=lambda item: -len(item[1]))
    short = {value: "not set" if value is None else show(value) for value in holders}
    if len(set(short.values())) < len(holders):  # what differs was cut off
        short = {value: str(value) for value in holders}
    parts = [f"{short[value]} on {ranks_text(ranks)}" for value, ranks in ordered]
    more = len(parts) - MOST_VALUES
    return ", ".join(parts[:MOST_VALUES]) + (f", and {more} more values" if more > 0 else "")


def ranks_text(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0-2 and 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    text = " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


class RankGuard:
    """Compares all ranks by one collective: what they know, and weights that several of them hold copies of.

    facts   what this rank knows
    """

    def __init__(self, facts: Facts, arch: Architecture, groups: ParallelGroups, device: torch.device):
        self.facts = dict(facts)
        self.arch = arch
        self.groups = groups
        self.device = device

    def check(self, models: Mapping[str, Sequence[torch.nn.Module]] | None = None, *, step: int = 0) -> None:
        """Compare; returns when all ranks agree.

        models  this rank's chunks of each model, by the model's name
        step    optimiser steps that are done, for the message

        Data-parallel and context-parallel ranks must hold bitwise equal weights, tensor-parallel ranks equal copies of
        what is not split over them, and the first and the last stage equal shards of a tied embedding.

        *Collectives*: one all-gather of a few numbers over all ranks; on a difference, a gather of objects.
        Raises on every rank, with what differs: the error of :data:`KINDS`, or
        :class:`~dpo_engine.errors.NumbersError` for weights.
        """
        group = self.groups.world
        if group.size() == 1:
            return
        facts = {**self.facts, "environment": environment()}
        prints = {name: self._fingerprints(chunks) for name, chunks in (models or {}).items()}
        text = json.dumps(facts, sort_keys=True).encode()
        head = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)]
        head += [self.groups.tp.rank(), self.groups.pp.rank()]
        mine = torch.tensor(head, dtype=torch.int64, device=self.device)
        mine = torch.cat([mine, *(self._fold(found) for found in prints.values())])
        everyone = mine.new_empty(group.size() * len(mine))
        dist.all_gather_into_tensor(everyone, mine, group=group)
        if _agree(everyone.view(group.size(), -1).tolist()):
            return
        known: list[Any] = [None] * group.size()
        weights = {(model, *key): int(value) for model, found in prints.items() for key, value in found.items()}
        dist.all_gather_object(known, (facts, weights), group=group)
        error, lines = _differences(dict(enumerate(theirs for theirs, _ in known)))
        if lines:
            raise error(lines)
        raise NumbersError(_different_weights([theirs for _, theirs in known], step))

    def _fingerprints(self, chunks: Sequence[torch.nn.Module]) -> dict[tuple[str, int], Tensor]:
        """A number for each parameter of this rank, by its layout-independent name and its shard (-1: whole)."""
        tp, found = self.groups.tp, {}
        for parameter, rule, layer, _ in placed_parameters(chunks, self.arch, tp=tp.size()):
            shard = -1 if rule.cut is None else tp.rank()
            found[rule.parameter.format(l=layer), shard] = fingerprint(parameter)
        return found

    def _fold(self, prints: Mapping[tuple[str, int], Tensor]) -> Tensor:
        """Three numbers for a model's parameters [3]: of its shards, of its whole ones, of a tied embedding's shard."""
        rules = FAMILIES[self.arch.model_type].rules if self.arch.tied_embeddings else ()
        tied = {rule.tied_to for rule in rules if rule.tied_to}
        folded = [torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(3)]
        for (name, shard), value in prints.items():
            for place in {0 if shard >= 0 else 1, *([2] if name in tied else [])}:
                folded[place] = folded[place] * FOLD + value
        return torch.stack(folded)


def fingerprint(tensor: Tensor) -> Tensor:
    """A number [] int64 that any change of one bit changes, and any other change but by chance; the same everywhere.

    The sum, modulo 2^64, of the elements' bits with fixed odd random factors: integers add to the same in any order.
    """
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().reshape(-1).view(size)
    factors = _factors(min(BLOCK, len(bits)), tensor.device)
    total = torch.full((), len(bits), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), BLOCK):
        block = bits[start : start + BLOCK].long()
        total = total * FOLD + (block * factors[: len(block)]).sum()
    return total


def _factors(count: int, device: torch.device) -> Tensor:
    """Odd numbers that look random [count] int64."""
    mixed = torch.arange(1, count + 1, dtype=torch.int64, device=device) * (0x9E3779B97F4A7C15 - (1 << 64))
    mixed = (mixed ^ (mixed >> 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    return (mixed ^ (mixed >> 27)) | 1


def _agree(rows: Sequence[Sequence[int]]) -> bool:
    """Whether rows of ``facts, tp rank, pp rank`` and three numbers a model show no difference."""
    seen: dict[Any, int] = {}
    for facts, tp, pp, *prints in rows:
        expected = {"facts": facts}
        for place, value in enumerate(prints):
            if place % 3 == 2 and value == 0:
                continue  # this stage has no tied embedding
            expected[place, ((pp, tp), pp, tp)[place % 3]] = value
        if any(seen.setdefault(key, value) != value for key, value in expected.items()):
            return False
    return True


def _different_weights(everyone: Sequence[Mapping[tuple[str, str, int], int]], step: int) -> str:
    """A line about the first parameter whose copies differ."""
    keys = sorted({key for weights in everyone for key in weights})
    held = {key: {rank: weights[key] for rank, weights in enumerate(everyone) if key in weights} for key in keys}
    different = [key for key in keys if len(set(held[key].values())) > 1]
    model, name, _ = different[0]
    values = by_value({rank: f"{value & 0xFFFFFFFF:08x}" for rank, value in held[different[0]].items()})
    more = f" and of {len(different) - 1} more parameters" if len(different) > 1 else ""
    return (
        f"step {step}: copies of {model} {name}{more} differ: {values}; start again from the last checkpoint, and "
        "suspect the memory of the odd one"
    )
