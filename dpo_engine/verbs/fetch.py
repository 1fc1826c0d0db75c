"""``dpo-engine fetch``: download the models and data sets that a run names by Hub id."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dpo_engine.config.run import Config
from dpo_engine.data.hub import Repo, data_repo, model_repo, snapshot
from dpo_engine.data.sources import find_shards, split_slice
from dpo_engine.errors import ConfigError, EngineError
from dpo_engine.verbs import console


def fetch(config: Config, say: Callable[[str], None] = console.say) -> list[str]:
    """Download the models and data sets that a run names by Hub id. The files go to the Hub's cache.

    If a Hub id refers to a branch, the branch's newest commit is downloaded even if an older one is in the cache.

    say  called with a line for each repository

    Returns  the directories of the snapshots

    Raises :class:`~dpo_engine.errors.ConfigError` with a line for every repository that cannot be downloaded, and for
    every data set that cannot be used, for example because it lacks the requested split. The same error is raised if
    the environment variable HF_HUB_OFFLINE forbids downloads.
    """
    from huggingface_hub import constants

    problems, directories = [], []
    wanted = hub_ids(config)
    if wanted and constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE=1: forbids downloads, but `fetch` must download; unset HF_HUB_OFFLINE")
    for key, (text, repo) in wanted.items():
        try:
            directory = snapshot(repo, again=True)
            if repo.kind == "dataset":
                find_shards(text)  # converts files that must be converted, and checks config and split
        except EngineError as error:
            problems.append(f"{key}={error}" if str(error).startswith(text) else f"{key}={text}: {error}")
            continue
        directories.append(str(directory))
        say(f"{key}={text}: commit {directory.name} in {directory}")
    if problems:
        raise ConfigError(problems)
    if not wanted:
        say("the run names no Hub id: there is nothing to download")
    return directories


def hub_ids(config: Config) -> dict[str, tuple[str, Repo]]:
    """Return the keys of a run that hold Hub ids, each with its value and the repository that the value names."""
    models = {"model.path": config.model.path, "model.tokenizer": config.model.tokenizer}
    models |= {"reference.path": config.reference.path, "adapter.path": config.adapter and config.adapter.path}
    found = {key: (path, model_repo(path, key)) for key, path in models.items() if path is not None}
    for part in ("train", "validation"):
        for index, source in enumerate(getattr(config.data, part) or ()):
            base, _ = split_slice(source.path)
            read = None if Path(base).exists() else data_repo(base)
            found[f"data.{part}[{index}].path"] = (source.path, read and read[0])
    return {key: (text, repo) for key, (text, repo) in found.items() if repo is not None}
