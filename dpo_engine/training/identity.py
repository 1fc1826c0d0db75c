"""What a checkpoint and the run that resumes from it must have in common, and what is recorded beside it.

The facts that fix a run's trajectory are its identity, one entry a key. A run whose identity differs from that of a
checkpoint does not continue it, unless ``checkpoint.accept_changes`` names the keys; the change is then part of the
checkpoint's history, which every later checkpoint carries on.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dpo_engine
from dpo_engine.config import Config
from dpo_engine.config_errors import show
from dpo_engine.config_sections import OptimConfig
from dpo_engine.data.plan import Position
from dpo_engine.errors import CheckpointError
from dpo_engine.model.architecture import Architecture

ACCEPTED = {
    "dtype": "weights are rounded from the checkpoint's, which are fp32",
    "tokenizer": "held-out pairs and the exported checkpoint get the new one",
    "reference": "rewards are differences from the new one, which starts from its own weights",
    "loss": "the next step has the new one; Adam's moments are kept",
    "train_data": "the new pairs begin with their first, and train.epochs counts from there",
    "limits": "pairs are cut or dropped by the new ones",
    "order": "the pairs begin anew in the new order, and train.epochs counts from there",
    "global_batch_size": "the epoch goes on with the pair that is next, in batches of the new size",
    "seed": "what is random in later steps follows from the new one",
    "optim": "the next step has the new settings; Adam's moments are kept, and the schedule is that of the step",
    "total_steps": "the learning rate follows the schedule of the new length",
}
"""Keys whose change can be accepted, and what the run does then. A model's change cannot: its weights would not fit."""

RESTARTING = ("train_data", "order")
"""Keys whose change leaves nothing to go on from within the data."""

COUNTING = (*RESTARTING, "global_batch_size")
"""Keys whose change makes another number of steps: who accepts one of them accepts that."""

LENGTH_LIMITS = ("max_positions", "sliding_window")
"""Facts of an architecture that change no value of a row that is short enough, which all rows are."""

MISSING = object()

DIGEST = re.compile("[0-9a-f]{32,}")
"""A hash, which is told from another by its beginning."""

PACKAGES = ("megatron-core", "transformer-engine", "triton", "transformers", "tokenizers", "sentencepiece")
"""Libraries that decide about tokens or numbers, beside torch, whose version names its build."""


class Change(NamedTuple):
    """One key of the identity that is not what the checkpoint says."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """``loss.beta was 0.1 and is now 0.2``; of nested facts, those that differ."""
        key, old, new = self
        if isinstance(old, dict) and isinstance(new, dict):
            names = [name for name in {**old, **new} if old.get(name, MISSING) != new.get(name, MISSING)]
            if len(names) == 1:
                key, old, new = f"{key}.{names[0]}", old.get(names[0], MISSING), new.get(names[0], MISSING)
            else:
                old, new = ({name: facts[name] for name in names if name in facts} for facts in (old, new))
        return f"{key} was {_shown(old)} and is now {_shown(new)}"


def _shown(value: Any) -> str:
    if isinstance(value, str) and DIGEST.fullmatch(value):
        return value[:12]
    return "not there" if value is MISSING else show(value)


def model_identity(arch: Architecture) -> dict[str, Any]:
    """The part of the identity that decides whether weights fit: that of the model."""
    return {"model": {name: value for name, value in asdict(arch).items() if name not in LENGTH_LIMITS}}


def identity(
    config: Config,
    arch: Architecture,
    *,
    dtype: str,
    loss_options: Mapping[str, Any],
    reference: Any,
    train_data: Mapping[str, Any],
    tokenizer: str,
    total_steps: int,
) -> dict[str, Any]:
    """The facts that fix a run's trajectory, as values of JSON.

    loss_options  all of them, defaults too
    reference     what decides about its log-probabilities
    train_data    digest and number of the pairs
    tokenizer     digest of its files and of its chat template
    total_steps   of the whole run; part of the identity where the learning rate depends on it
    """
    data = config.data
    facts = {
        **model_identity(arch),
        "dtype": dtype,
        "tokenizer": tokenizer,
        "reference": reference,
        "loss": {"name": config.loss.name, **config.loss.token_weighting, **loss_options},
        "train_data": dict(train_data),
        "limits": {name: getattr(data, name) for name in ("max_length", "max_prompt_length", "truncation", "add_eos")},
        "order": {
            "seed": data.seed,
            "shuffle": data.shuffle,
            "group_by_prompt": data.group_by_prompt,
            "weights": [source.weight for source in data.train],
        },
        "global_batch_size": config.train.global_batch_size,
        "seed": config.train.seed,
        "optim": config.optim.model_dump(mode="json"),
        "total_steps": total_steps if reads_length(config.optim) else None,
    }
    return json.loads(json.dumps(facts))


def reads_length(optim: OptimConfig) -> bool:
    """Whether the learning rate of a step depends on how many steps there are in all."""
    warmup_is_share = optim.warmup_steps is None and bool(optim.warmup_ratio)
    return optim.schedule in ("cosine", "linear", "wsd") or warmup_is_share


def compare(
    saved: Mapping[str, Any], current: Mapping[str, Any], accepted: Sequence[str] = (), *, where: str | Path
) -> list[Change]:
    """Every key of ``current`` that ``saved`` has otherwise, all of them accepted; other keys of ``saved`` may be.

    where  names the checkpoint in messages

    Raises :class:`~dpo_engine.errors.CheckpointError` with a line for each change that is not accepted.
    """
    changes = [
        Change(key, saved.get(key, MISSING), value)
        for key, value in current.items()
        if saved.get(key, MISSING) != value
    ]
    if impossible := [f"{where}: {change}; {_MISFIT}" for change in changes if change.key not in ACCEPTED]:
        raise CheckpointError(impossible)  # and what else has changed is a consequence, or no longer matters
    counts = any(change.key in COUNTING for change in changes)
    if refused := [change for change in changes if change.key not in (*accepted, *["total_steps"] * counts)]:
        raise CheckpointError(
            [
                f"{where}: {change}; resume with what it was, set checkpoint.accept_changes=[{change.key}], or give "
                "another train.output_dir"
                for change in refused
            ]
        )
    return changes


_MISFIT = "its weights do not fit; resume with what it was, or give another train.output_dir"


def next_position(saved: Mapping[str, Any], current: Mapping[str, Any], position: Position) -> Position:
    """Where a run with the identity ``current`` goes on in its data after a checkpoint that had got to ``position``."""
    restarts = any(saved.get(key, MISSING) != current[key] for key in RESTARTING)
    return Position(position.step, 0, 0) if restarts else position


def keeps_following(saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether a reference that follows the policy goes on with the weights that the checkpoint has of it."""
    old, new = saved.get("reference") or {}, current.get("reference") or {}
    return "sync_every" in old and old.get("weights") == new.get("weights")


def keeps_random(saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether random generators go on where the checkpoint left them; another seed has just begun its own."""
    return saved.get("seed", MISSING) == current["seed"]


def entries(changes: Sequence[Change], step: int) -> list[dict[str, Any]]:
    """Changes as entries of a history: what changed after which step; null for what was not there."""
    return [{"step": step, "key": key, "old": None if old is MISSING else old, "new": new} for key, old, new in changes]


def accepted_lines(changes: Sequence[Change], accepted: Sequence[str], step: int) -> list[str]:
    """What the log says about ``checkpoint.accept_changes``: each change with its effect, and names of none."""
    changed = {change.key for change in changes}
    return [
        *(f"accepted after step {step}: {change}; {ACCEPTED[change.key]}" for change in changes),
        *(f"checkpoint.accept_changes: {key} is what it was" for key in accepted if key not in changed),
    ]


def record(
    config: Config, *, plan: str, position: Position, code: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What a checkpoint says about its run beside its identity, as values of JSON.

    plan      digest of the order of the pairs
    position  where the run is in its data
    code      versions, as :func:`code_version` gives them
    history   accepted changes since the run began, see :func:`entries`
    """
    return {
        "position": position._asdict(),
        "history": list(history),
        "plan": plan,
        "code": {**code, "commit": commit()},
        "config": config.model_dump(mode="json"),
    }


def code_version(plugins: Sequence[str] = ()) -> dict[str, str]:
    """Name to version of everything that computes: the engine, the run's plugins, and the libraries below.

    The engine's and the plugins' versions have a hash of their source files, which change without a release.
    """
    kernels = importlib.util.find_spec("dpo_kernels")
    own = [Path(dpo_engine.__file__).parent, *map(Path, kernels.submodule_search_locations or () if kernels else ())]
    versions = {"dpo-engine": f"{dpo_engine.__version__} (sources {_sources_digest(own)})"}
    for name in plugins:
        file = getattr(sys.modules.get(name), "__file__", None)
        versions[f"plugin {name}"] = f"sources {_sources_digest([Path(file)])}" if file else "no file"
    versions["torch"] = str(torch.__version__)
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def _sources_digest(places: Sequence[Path]) -> str:
    """Hash of Python files and of all of them in directories, with their names."""
    digest = hashlib.blake2b(digest_size=8)
    for place in places:
        root = place if place.is_dir() else place.parent
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def commit() -> str | None:
    """The git commit that the engine is a checkout of; None for an installed one."""
    root = Path(dpo_engine.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
