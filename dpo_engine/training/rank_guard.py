"""Check that all ranks agree on settings, code, data, and weights, and report any difference.

The problem: if one rank has a different setting, code version, environment variable, data file or weight, the run can
hang or train a wrong model, and no error explains why.

The solution: two functions compare the facts of the ranks. Facts are named values, such as settings and versions,
that must be equal on all ranks. `compare_at_rendezvous` runs before any process group exists, because ranks with
different layouts would hang while creating the groups. Each rank puts its facts into the rendezvous store; rank 0 reads
them and answers all ranks. `RankGuard.check` runs before the first step. It runs again every `train.guard_interval`
steps, before scheduled saves, before evaluations that can lead to a save (`checkpoint.keep_best`), and after the last
step; if the interval is 0, none of these later checks run.
`RankGuard.check` also compares facts about the data, and all weights of which several ranks have copies: data-parallel
and context-parallel replicas, parameters that tensor parallelism does not split, experts, and tied embeddings.

Why this way: a check reads the weights once, and exchanges only a few integers per rank, in one all-gather. The
integers are a hash of the facts, the rank within each of four process groups, and combined fingerprints of the weights.
If ranks disagree, they also exchange the facts and all fingerprints, so that the error can name the difference.
A fingerprint is a weighted sum of integers modulo 2^64. Equal tensors therefore have equal fingerprints on every
device, in any order of additions. A failed check raises the same error on all ranks. Facts are compared in the order of
`KINDS`.

Not covered: mistakes that are the same on all ranks; weights that only one rank has; optimizer state; differences that
appear and vanish between two checks; environment variables that `SWITCHES` does not list (some are omitted
deliberately). Two different weights can have the same fingerprint by chance, but a single flipped bit is always
detected.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from dpo_engine.training.fingerprints import FOLD, fingerprint
from dpo_engine.wording import show

Facts = Mapping[str, Mapping[str, str]]
"""Facts by kind (a key of :data:`KINDS`) and name. Their values must be equal on all ranks."""

SWITCHES = {
    "NVTE_*": "it selects Transformer Engine's kernels",
    "UB_SKIPMC": "it selects how ranks share the buffers of tp_comm_overlap, and a mismatch makes ranks hang",
    "DPO_KERNELS": "it selects the engine's kernels",
    "TRITON_INTERPRET": "it runs Triton kernels as Python",
    "NCCL_ALGO": "it affects the order of additions, and a mismatch makes ranks hang",
    "NCCL_PROTO": "a mismatch makes ranks hang",
    "NCCL_NVLS_ENABLE": "it affects the order of additions, and a mismatch makes ranks hang",
    "NCCL_COLLNET_ENABLE": "it affects the order of additions, and a mismatch makes ranks hang",
    "NCCL_M??_NCHANNELS": "a mismatch makes ranks hang",
    "NCCL_M??_CTAS": "a mismatch makes ranks hang",
    "NCCL_BUFFSIZE": "a mismatch makes ranks hang",
    "NCCL_IB_DISABLE": "a rank without InfiniBand cannot reach a rank that uses InfiniBand",
    "NCCL_NET": "ranks that use different networks cannot reach each other",
    "TORCH_DISTRIBUTED_DEBUG": "DETAIL adds extra collectives to every collective",
    "TORCH_NCCL_*": "it affects when a rank waits for its collectives",
    "CUDA_DEVICE_MAX_CONNECTIONS": "it affects the order in which a rank's collectives start",
    "CUBLAS_WORKSPACE_CONFIG": "it limits which matrix multiplication kernels cuBLAS may use",
    "CUBLASLT_WORKSPACE_SIZE": "it limits which matrix multiplication kernels cuBLAS may use",
    "TORCH_BLAS_PREFER_*": "it selects the matrix multiplication library",
    "NVIDIA_TF32_OVERRIDE": "it affects the precision of matrix multiplications",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "it affects the precision of matrix multiplications",
    "TORCHDYNAMO_DISABLE": "compiled code rounds differently",
    "TORCH_COMPILE_DISABLE": "compiled code rounds differently",
    "ATEN_CPU_CAPABILITY": "it selects the CPU instructions for additions",
    "MKL_CBWR": "it selects the CPU instructions for additions",
}
"""Patterns of environment variables that change numbers or can make ranks hang, and the reason for each.

Deliberately not listed: thread counts (OMP_NUM_THREADS, MKL_NUM_THREADS), which may differ between nodes and affect
only the rounding of values that a rank computes for itself; devices and network interfaces (CUDA_VISIBLE_DEVICES,
NCCL_SOCKET_IFNAME, NCCL_IB_HCA), which are specific to a node; settings of allocators and of logging.
"""

LOGS = ("NVTE_DEBUG*", "TORCH_NCCL_*DUMP*", "TORCH_NCCL_*TRACE*", "TORCH_NCCL_DEBUG*")
"""Variables that match :data:`SWITCHES` but are not compared, because they affect only logs and dumps."""

PER_NODE = ("data.cache_dir",)
"""Configuration keys whose values may differ between ranks, because a value can be a path on a node's local disk."""

KINDS: dict[str, tuple[type[EngineError], str]] = {
    "ranks": (ConfigError, "start all ranks of a job with the same world size"),
    "config": (ConfigError, "start all ranks with the same run file and overrides"),
    "code": (ConfigError, "install the same version on all nodes"),
    "environment": (ConfigError, "set it to the same value on all nodes"),
    "platform": (ConfigError, "a node lacks a GPU or a library; repair that node, or exclude it"),
    "model": (ConfigError, "config.json in model.path differs between nodes; copy it again"),
    "tokenizer": (ConfigError, "the tokenizer's files differ between nodes; copy them again"),
    "data": (DataError, "the files differ between nodes, or a node sees an old version; copy them again"),
}
"""Kinds of facts, each with an error type and advice. A difference often explains differences in later kinds."""

NUMBER = "number of ranks"
MOST_LINES = 10
MOST_VALUES = 3
READ_WITHIN_S = 5.0
EXPERT = ".local_experts."
"""Text that occurs only in the names of experts' parameters."""


def environment(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that are set, match :data:`SWITCHES`, and do not match :data:`LOGS`."""
    return {
        name: variables[name]
        for name in sorted(variables)
        if any(fnmatch(name, switch) for switch in SWITCHES) and not any(fnmatch(name, log) for log in LOGS)
    }


def rank_facts(config: Config, arch: Architecture, platform: Platform, spec: str) -> dict[str, dict[str, str]]:
    """Return the facts that a rank knows before it contacts the other ranks."""
    settings = dict(_flat(config.model_dump(mode="json")))
    return {
        "config": {name: value for name, value in settings.items() if name not in PER_NODE},
        "code": code_version(config.plugins),
        "environment": environment(),
        "platform": {"device": platform.device.type, "layer spec": spec},
        "model": dict(_flat(model_identity(arch)["model"])),
    }


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Flatten nested values into pairs of a dotted name and a text."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{name}[{index}]")
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)


def compare_at_rendezvous(store: dist.Store, rank: int, world: int, facts: Facts, wait: Callable | None = None) -> None:
    """Compare the facts of all ranks through the store, before any process group exists.

    Rank 0 reads the facts of the other ranks, in order, and answers all of them. If rank 0 finds a rank that was
    started with a different number of ranks, it answers at once, because later ranks may not exist. ``wait`` waits for
    a key and returns its value; None: ``store.get``, with the store's own time limit.

    Raises :class:`~dpo_engine.errors.ConfigError` on every rank, with a line for each of the first ``MOST_LINES``
    differences. A rank whose index is at least rank 0's ``world`` is an additional rank. Rank 0 does not read the facts
    of additional ranks. If all other ranks agree, only the additional ranks raise the error.
    """
    if world == 1:
        return
    text = json.dumps({"ranks": {NUMBER: str(world)}, **facts})
    name = hashlib.sha256(text.encode()).hexdigest()
    store.set(f"facts/{name}", text)
    store.set(f"rank/{rank}", name)
    readers, wait = world, wait or store.get
    if rank == 0:
        found = _read_facts(wait, world)
        readers = max(int(theirs["ranks"][NUMBER]) for theirs in found.values())
        store.set("verdict", json.dumps([world, _differences(found)[1]]))
    asked, problems = json.loads(wait("verdict"))
    if not problems and asked != world:
        problems = [f"{NUMBER}: {asked} on rank 0, {world} on rank {rank}; {KINDS['ranks'][1]}"]
    if problems:
        done, deadline = store.add("read", 1), time.monotonic() + READ_WITHIN_S
        # Rank 0 may host the store, so it waits until the other ranks have read the problems.
        while rank == 0 and done < readers and time.monotonic() < deadline:
            time.sleep(0.01)
            done = store.add("read", 0)
        raise ConfigError(problems)


def _read_facts(wait: Callable[[str], bytes], world: int) -> dict[int, Facts]:
    """Return the facts of each rank, up to the first rank that was started with a different number of ranks."""
    known: dict[str, Facts] = {}
    found = {}
    for rank in range(world):
        name = wait(f"rank/{rank}").decode()
        if name not in known:
            known[name] = json.loads(wait(f"facts/{name}"))
        found[rank] = known[name]
        if found[rank]["ranks"][NUMBER] != str(world):
            break
    return found


def _differences(facts: Mapping[int, Facts]) -> tuple[type[EngineError], list[str]]:
    """Return the error to raise (the error of the first kind with a difference), and lines about the differences.

    Each of the first ``MOST_LINES`` differences has its own line. If there are more, a last line counts the others.
    """
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
        lines = [*lines[:MOST_LINES], f"further differences between ranks: {len(lines) - MOST_LINES}"]
    return error, lines


def _reason(variable: str) -> str:
    return next(why for switch, why in SWITCHES.items() if fnmatch(variable, switch))


def by_value(values: Mapping[int, Any]) -> str:
    """Return the ranks of each value as text, most common value first, such as ``0.1 on ranks 0-2, 0.2 on rank 3``.

    After ``MOST_VALUES`` values, the text gives only the number of further values.
    """
    holders: dict[Any, list[int]] = {}
    for rank, value in sorted(values.items()):
        holders.setdefault(value, []).append(rank)
    ordered = sorted(holders.items(), key=lambda item: -len(item[1]))
    short = {value: "not set" if value is None else show(value) for value in holders}
    if len(set(short.values())) < len(holders):  # the shortened texts hide the difference
        short = {value: str(value) for value in holders}
    parts = [f"{short[value]} on {ranks_text(ranks)}" for value, ranks in ordered]
    more = len(parts) - MOST_VALUES
    return ", ".join(parts[:MOST_VALUES]) + (f", and {more} more" if more > 0 else "")


def ranks_text(ranks: Sequence[int]) -> str:
    """Return ranks as text: ``rank 3``, ``ranks 0-2 and 5``."""
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
    """Compare the facts of all ranks, and the weights of which several ranks have copies.

    facts   the facts of this rank: named values that must be equal on all ranks
    """

    def __init__(self, facts: Facts, arch: Architecture, groups: ParallelGroups, device: torch.device):
        self.facts = dict(facts)
        self.arch = arch
        self.groups = groups
        self.device = device

    def check(self, models: Mapping[str, Sequence[torch.nn.Module]] | None = None, *, step: int = 0) -> None:
        """Compare all ranks, and raise an error if they differ. With one rank, do nothing.

        models  this rank's chunks of each model, by the model's name
        step    number of optimizer steps done, for the error message

        Data-parallel and context-parallel ranks must have bitwise equal weights. Tensor-parallel ranks must have equal
        copies of parameters that are not split. Ranks with the same experts must have equal copies of these experts.
        The first and the last stage must have equal tied embeddings.

        *Collectives*: one all-gather of a few numbers over all ranks; if ranks disagree, one all-gather of objects.
        Raises on every rank the error from :data:`KINDS`, or :class:`~dpo_engine.errors.NumbersError` if only weights
        differ.
        """
        group = self.groups.world
        if group.size() == 1:
            return
        facts = {**self.facts, "environment": environment()}
        prints = {name: self._fingerprints(chunks) for name, chunks in (models or {}).items()}
        text = json.dumps(facts, sort_keys=True).encode()
        head = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)]
        groups = (self.groups.tp, self.groups.pp, self.groups.expt_tp, self.groups.ep)
        head += [one.rank() for one in groups]
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
        """Return this rank's fingerprints by parameter name and tensor-parallel rank (-1: a replicated parameter)."""
        found = {}
        for placed in placed_parameters(chunks, self.arch, self.groups):
            shard = -1 if placed.rule.cut is None else placed.shard
            found[placed.name, shard] = fingerprint(placed.parameter)
        return found

    def _fold(self, prints: Mapping[tuple[str, int], Tensor]) -> Tensor:
        """Combine fingerprints into four numbers [4].

        The numbers cover the sharded parameters, the replicated parameters, the tied embedding (which is also in one of
        the first two numbers), and the parameters of experts (which are in no other number).
        """
        rules = FAMILIES[self.arch.model_type].rules if self.arch.tied_embeddings else ()
        tied = {rule.tied_to for rule in rules if rule.tied_to}
        folded = [torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(4)]
        for (name, shard), value in prints.items():
            for place in {3 if EXPERT in name else 0 if shard >= 0 else 1, *([2] if name in tied else [])}:
                folded[place] = folded[place] * FOLD + value
        return torch.stack(folded)


def _agree(rows: Sequence[Sequence[int]]) -> bool:
    """Whether all ranks agree.

    The row of a rank contains a hash of its facts, its rank in tp, pp, expt_tp and ep, and four fingerprints per model.
    """
    seen: dict[Any, int] = {}
    for facts, tp, pp, expt_tp, ep, *prints in rows:
        expected = {"facts": facts}
        for place, value in enumerate(prints):
            if place % 4 == 2 and value == 0:
                continue  # this stage has no tied embedding
            expected[place, ((pp, tp), pp, tp, (pp, ep, expt_tp))[place % 4]] = value
        if any(seen.setdefault(key, value) != value for key, value in expected.items()):
            return False
    return True


def _different_weights(everyone: Sequence[Mapping[tuple[str, str, int], int]], step: int) -> str:
    """Return the error line about the first parameter whose copies differ."""
    keys = sorted({key for weights in everyone for key in weights})
    held = {key: {rank: weights[key] for rank, weights in enumerate(everyone) if key in weights} for key in keys}
    different = [key for key in keys if len(set(held[key].values())) > 1]
    model, name, _ = different[0]
    values = by_value({rank: f"{value & 0xFFFFFFFF:08x}" for rank, value in held[different[0]].items()})
    others = len(different) - 1
    more = f" and {others} more {'parameter' if others == 1 else 'parameters'}" if others else ""
    return (
        f"step {step}: copies of {model} {name}{more} differ: fingerprint {values}; restart from the last "
        "checkpoint, and test the memory of the rank that differs"
    )
