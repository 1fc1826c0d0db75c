"""Describe a run's identity: the settings and data that determine its results.

The identity is a dictionary. Every checkpoint records the identity of the run that saved it. A run resumes from a
checkpoint only if the two identities are equal, or if ``checkpoint.accept_changes`` lists the keys that differ.
Accepted changes are appended to a history that every later checkpoint contains. A checkpoint also records information
about its run that may differ on resumption; see :func:`record`.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_engine import version
from dpo_engine.batching.plan import Position
from dpo_engine.config.run import Config
from dpo_engine.config.sections import DataConfig, OptimConfig
from dpo_engine.data.hub import commits
from dpo_engine.model.architecture import Architecture
from dpo_engine.optim.schedules import reads_length

NOT_OF_MODEL = ("max_positions", "sliding_window")
"""Fields of an architecture that are not part of the identity of the model.

``max_positions`` limits the length of rows, and the engine rejects longer rows. ``sliding_window`` has no effect on
rows that are not longer than the window. If longer rows are allowed, the identity contains the window in ``limits``."""

PACKAGES = (
    *("megatron-core", "transformer-engine", "triton", "flash-attn", "flash-attn-3", "flash-attn-4"),
    *("transformers", "tokenizers", "sentencepiece"),
)
"""Libraries that affect the tokens or the numerical results of a run.

torch is recorded separately, from ``torch.__version__``, because this version also names the build."""


def model_identity(arch: Architecture, adapter: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the part of the identity that describes the model, as JSON values.

    If this part differs, the saved state does not fit the model.

    adapter  facts that determine the adapters: their settings, and digests of the base weights and of the adapter that
             the run started from; None: the run has no adapters
    """
    model = {name: value for name, value in arch.facts.items() if name not in NOT_OF_MODEL}
    return json.loads(json.dumps({"model": model, "adapter": adapter}))


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
    adapter: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the settings and data that determine a run's results, as JSON values.

    loss_options  all options of the loss, including defaults
    reference     everything that determines the reference's log-probabilities; see
                  :func:`~dpo_engine.training.references.reference_identity`
    train_data    digest of the training pairs, and their number
    tokenizer     digest of the tokenizer's files and chat template
    total_steps   number of steps in the whole run; included only if the learning rate depends on it
    adapter       as for :func:`model_identity`
    """
    data = config.data
    facts = {
        **model_identity(arch, adapter),
        "dtype": dtype,
        "tokenizer": tokenizer,
        "reference": reference,
        "loss": {"name": config.loss.name, **config.loss.settings, **loss_options},
        "train_data": dict(train_data),
        "limits": _limits(data, arch),
        "order": {
            "seed": data.seed,
            "shuffle": data.shuffle,
            "group_by_prompt": data.group_by_prompt,
            "weights": [source.weight for source in data.train],
        },
        "global_batch_size": config.train.global_batch_size,
        "seed": config.train.seed,
        "optim": _optim(config.optim),
        "optim.optimizer": config.optim.optimizer,
        "optim.freeze": frozen(config),
        "total_steps": total_steps if reads_length(config.optim) else None,
        "megatron": config.megatron.model_dump(exclude_defaults=True),
    }
    return json.loads(json.dumps(facts))


def frozen(config: Config) -> list[str]:
    """Return the settings that determine which weights are frozen."""
    return sorted([*config.optim.freeze, *(["train.freeze_router"] if config.train.freeze_router else [])])


def _optim(optim: OptimConfig) -> dict[str, Any]:
    """Return the settings of the optimizer and the schedule, except the settings that have their own identity keys.

    ``optim.states`` is left out, because it does not change results, and checkpoints do not depend on it.

    Options that earlier versions of the engine did not have are left out while they have their default values, so that
    the identity still matches the identity in checkpoints of these versions.
    """
    newer = {"schedule_options": {}, "optimizer_options": {}, "gradients": "fp32"}
    found = optim.model_dump(mode="json", exclude={"optimizer", "freeze", "states"})
    return {name: value for name, value in found.items() if name not in newer or value != newer[name]}


def _limits(data: DataConfig, arch: Architecture) -> dict[str, Any]:
    """Return the settings of tokenization, and the size of the sliding window if rows can be longer than the window.

    Settings that earlier versions of the engine did not have are left out while they have their default values, so that
    the identity still matches the identity in checkpoints of these versions.
    """
    limits = {name: getattr(data, name) for name in ("max_length", "max_prompt_length", "truncation")}
    limits["add_eos"] = True if data.add_eos == "auto" else data.add_eos
    if arch.has_windows and data.max_length > arch.sliding_window:
        limits["sliding_window"] = arch.sliding_window
    newer = {"score": "response", "max_completion_length": None}
    return limits | {name: getattr(data, name) for name, default in newer.items() if getattr(data, name) != default}


def record(
    config: Config, *, plan: str, position: Position, code: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the facts that a checkpoint records about its run in addition to the identity, as JSON values.

    plan      digest of the run's plan, which determines the pairs of each step
    position  the run's position in its training data
    code      versions, from :func:`code_version`
    history   changes accepted since the run began; see :func:`~dpo_engine.checkpoint.resume.entries`
    """
    return {
        "position": position._asdict(),
        "history": list(history),
        "plan": plan,
        "code": {**code, "commit": commit()},
        "config": config.model_dump(mode="json"),
        "hub": commits(),
    }


def code_version(plugins: Sequence[str] = ()) -> dict[str, str]:
    """Return the versions of the engine, of the run's plugins, of torch, and of `PACKAGES`, keyed by name.

    The versions of the engine and the plugins include a hash of the source files, because source files can change
    without a release.
    """
    kernels = importlib.util.find_spec("dpo_kernels")
    own = [Path(version.__file__).parent, *map(Path, kernels.submodule_search_locations or () if kernels else ())]
    versions = {"dpo-engine": f"{version.__version__} (sources {_sources_digest(own)})"}
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
    """Return a hash over the names and contents of Python files. A directory stands for all Python files under it."""
    digest = hashlib.blake2b(digest_size=8)
    for place in places:
        root = place if place.is_dir() else place.parent
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def commit() -> str | None:
    """Return the git commit of the engine's checkout, or None if there is no checkout or git fails."""
    root = Path(version.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
