"""What a checkpoint and the run that resumes from it must have in common, and what is recorded beside it.

The facts that fix a run's trajectory are its identity, one entry a key. A run whose identity differs from that of a
checkpoint does not continue it, unless ``checkpoint.accept_changes`` names the keys; the change is then part of the
checkpoint's history, which every later checkpoint carries on.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dpo_engine import version
from dpo_engine.batching.plan import Position
from dpo_engine.config.run import Config
from dpo_engine.model.architecture import Architecture
from dpo_engine.optim.schedule import reads_length

LENGTH_LIMITS = ("max_positions", "sliding_window")
"""Facts of an architecture that change no value of a row that is short enough, which all rows are."""


PACKAGES = ("megatron-core", "transformer-engine", "triton", "transformers", "tokenizers", "sentencepiece")
"""Libraries that decide about tokens or numbers, beside torch, whose version names its build."""


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
    """Hash of Python files and of all of them in directories, with their names."""
    digest = hashlib.blake2b(digest_size=8)
    for place in places:
        root = place if place.is_dir() else place.parent
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def commit() -> str | None:
    """The git commit that the engine is a checkout of; None for an installed one."""
    root = Path(version.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
