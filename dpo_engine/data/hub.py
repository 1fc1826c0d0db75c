"""Find models and data sets of the Hugging Face Hub in the local cache, and download what is missing."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from dpo_engine.errors import ConfigError, DataError, EngineError, shorten
from dpo_engine.wording import join

NAME = r"[A-Za-z0-9][\w.-]*"
_MODEL = re.compile(rf"(?P<repo>{NAME}/{NAME})(?:@(?P<revision>[^\s:@\[\]]+))?", re.ASCII)
_DATA = re.compile(
    _MODEL.pattern.replace("(?:@", rf"(?:/(?P<config>{NAME}))?(?:@", 1) + r"(?::(?P<split>[\w.-]+))?", re.ASCII
)
FILE = re.compile(r"\.(model|jinja|json|jsonl|parquet|arrow|csv|tsv|txt|gz|zst|zip|tar|ya?ml|npy|bin|pt)$")
"""Suffixes of file names. Text that ends with one of these suffixes is a path, not a Hub id."""
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
DATA_FILES = ("*.md", "*.yaml", *(f"*.{kind}" for kind in ("json", "jsonl", "parquet", "arrow", "csv", "gz", "zst")))
NEVER = ("*.bin", "*.py", "*.pt", "*.pth", "*.pkl")
"""Pickle and code files, which are never downloaded."""
COPIES = ("consolidated*", "*/*.safetensors", "*/*.json")
"""Additional copies of a model's weights and settings in another layout, which are not downloaded."""
CONVERTED = (".json", ".json.gz", ".csv", ".csv.gz")
"""Suffixes of data files that the `datasets` library converts to Arrow before they are read."""
COURTESY_S = 1.0
"""Number of seconds that a rank waits before it looks for a snapshot. The first rank of a node does not wait. While the
other ranks wait, the first rank begins its download, if one is necessary, and shows the progress."""

found: dict[Repo, Path] = {}
"""Snapshots that this process has used. The process keeps using them even if a branch changes on the Hub."""
failed: dict[Repo, str] = {}
"""Reasons why repositories could not be used. Recording them prevents repeated attempts to reach the Hub."""


@dataclass(frozen=True)
class Repo:
    """A repository of the Hub.

    kind      type of the repository
    name      `org/name`
    revision  branch, tag or commit; None means the main branch
    weights   whether the weights of a model are needed too; if not, only its configuration and tokenizer are downloaded
    """

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None = None
    weights: bool = True

    def __str__(self) -> str:
        return self.name + (f"@{self.revision}" if self.revision else "")


def model_repo(path: str | Path, key: str = "model.path") -> Repo | None:
    """Parse `org/name` or `org/name@revision`. Returns None if `path` exists or cannot be a Hub id.

    key  the configuration key that holds the path; for `model.tokenizer`, no weights are downloaded
    """
    path = str(path)
    parts = None if FILE.search(path) or Path(path).exists() else _MODEL.fullmatch(path)
    return Repo("model", parts["repo"], parts["revision"], key != "model.tokenizer") if parts else None


def model_directory(path: str | Path, key: str = "model.path") -> Path:
    """Return the local directory of a model or tokenizer: the path itself, or the snapshot of a Hub id.

    key  the configuration key that holds the path, for messages

    Downloads a snapshot that is not in the Hub's cache, unless HF_HUB_OFFLINE is set.

    Raises :class:`ConfigError` if `path` is an id and the snapshot is not in the cache and cannot be downloaded.
    """
    repo = model_repo(path, key)
    if repo is None:
        return Path(path)
    try:
        return snapshot(repo)
    except EngineError as error:
        raise ConfigError(f"{key}={path}: not an existing directory, and not a usable Hub id: {error}") from error


def data_repo(source: str) -> tuple[Repo, str | None, str | None] | None:
    """Parse `org/name[/config][@revision][:split]` into repository, config and split. Returns None for other text.

    The caller must check first that there is no local file or directory with this name.
    """
    parts = _DATA.fullmatch(source)
    if not parts or FILE.search(source.partition(":")[0]):
        return None
    return Repo("dataset", parts["repo"], parts["revision"]), parts["config"], parts["split"]


def data_files(source: str, base: str) -> tuple[Path, ...] | None:
    """Return the local files of a data set of the Hub; None if `base` is not a Hub id.

    source  the source as written in the run file, for messages
    base    the source without its slice

    Downloads a snapshot that is not in the Hub's cache, unless HF_HUB_OFFLINE is set. The `datasets` library decides
    which files belong to a config and split. The code of a data set never runs, because `datasets` 4 and later cannot
    run it.

    Raises :class:`DataError` in these cases:

    - The snapshot is not in the cache and cannot be downloaded.
    - The data set lacks the config or split that ``base`` names.
    - The data set has several configs and ``base`` names none, or it has several splits and ``base`` names none.
    - The data set lists a file that is not one of its own files.
    - `datasets` finds no records in the data set, or cannot read it.
    """
    read = data_repo(base)
    if read is None:
        return None
    repo, config, split = read
    try:
        return _split_files(repo, config, split, snapshot(repo))
    except EngineError as error:
        raise DataError(f"{source}: not an existing file or directory, and not a usable Hub id: {error}") from error


def snapshot(repo: Repo, *, again: bool = False) -> Path:
    """Return the directory of a repository's snapshot; download what the Hub's cache lacks.

    again  whether to contact the Hub even if this process has already used the repository or failed to get it

    Ranks of one node take turns: the first one downloads, and the others find the files in the cache.

    Raises :class:`EngineError` with the reason if the snapshot is not in the cache and cannot be downloaded.
    """
    whole = replace(repo, weights=True)
    if not again and (repo in found or whole in found):
        return found[repo if repo in found else whole]
    if repo in failed and not again:
        raise EngineError(failed[repo])
    from huggingface_hub import constants, errors, snapshot_download

    patterns = MODEL_FILES if repo.kind == "model" else DATA_FILES
    never = NEVER + (COPIES if repo.kind == "model" else ()) + (() if repo.weights else ("*.safetensors",))
    what = "model" if repo.kind == "model" else "data set"
    fetch = "run `dpo-engine fetch RUN.yaml` on a machine with a network"
    try:
        with _turn():
            directory = snapshot_download(
                repo.name,
                repo_type=repo.kind,
                revision=repo.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(never),
                local_files_only=constants.HF_HUB_OFFLINE,
            )
    except errors.GatedRepoError:
        why = f"the {what} is gated; request access on its page, and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        why = f"the Hub has no such {what}, or the {what} is private; correct the name, or set HF_TOKEN"
    except errors.RevisionNotFoundError:
        why = f"the {what} has no revision {repo.revision}; correct the revision"
    except errors.LocalEntryNotFoundError as error:
        whole = "not complete" if type(error).__name__ == "IncompleteSnapshotError" else "not"
        cache = f"the {what} is {whole} in the cache {constants.HF_HUB_CACHE}"
        reach = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        why = f"{cache}, and {reach}; {fetch}"
    except Exception as error:  # the Hub client's network library raises errors of its own types
        why = f"the {what} cannot be downloaded ({_first_line(error)}); {fetch}"
    else:
        found[repo] = Path(directory)
        return found[repo]
    failed[repo] = why
    raise EngineError(why)


def commits() -> list[str]:
    """Return one line per repository that this process has used, with the commit of its snapshot."""
    return sorted({f"Hub {repo.kind} {repo}: commit {directory.name}" for repo, directory in found.items()})


@contextmanager
def _turn() -> Iterator[None]:
    """Hold the cache's download lock during the ``with`` block.

    There is no lock if HF_HUB_OFFLINE is set, or if the lock file cannot be written. There is no time limit on the wait
    for the lock.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock, disable_progress_bars

    from dpo_engine.platform.launcher import local_rank

    if constants.HF_HUB_OFFLINE:
        yield
        return
    if local_rank():
        disable_progress_bars()
        time.sleep(COURTESY_S)
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / "dpo-engine.lock"
    with ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(lock))
        except OSError:
            pass  # this user cannot write the lock file: download without a lock
        yield


@lru_cache
def _split_files(repo: Repo, config: str | None, split: str | None, directory: Path) -> tuple[Path, ...]:
    from datasets import load_dataset_builder

    revision = f"@{repo.revision}" if repo.revision else ""
    try:
        builder = load_dataset_builder(str(directory), config)
    except (ValueError, OSError, RuntimeError) as error:
        names = re.search(r"(?:available configs: |Available: )\[(.*)\]", str(error))
        configs = re.findall(r"'([^']*)'", names[1]) if names else []
        if not configs:
            raise EngineError(f"`datasets` finds no records in the data set ({_first_line(error)})") from error
        asked = f"has no config {config}" if config else "has several configs"
        example = f"{repo.name}/{configs[0]}{revision}:{split or 'train'}"
        way_out = f"name one of its configs ({join(configs, 'and')}), as in {example}"
        way_out = f"remove /{config}" if configs == ["default"] else way_out
        raise EngineError(f"the data set {asked}; {way_out}") from error
    splits = {str(name): list(map(str, files)) for name, files in (builder.config.data_files or {}).items()}
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        asked = f"has no split {split}" if split else "has several splits"
        example = f"{repo.name}{f'/{config}' if config else ''}{revision}:{sorted(splits)[0]}"
        way_out = f"name one of its splits ({join(sorted(splits), 'and')}), as in {example}"
        raise EngineError(f"the data set {asked}; {way_out}")
    files = [Path(file) for file in splits[split]]
    outside = next((file for file in files if directory.resolve() not in file.parents or ".." in file.parts), None)
    if outside is not None:
        raise EngineError(
            f"the data set lists {shorten(str(outside), 60)}, which is not one of its own files; use another data set"
        )
    if not all(file.name.endswith(CONVERTED) for file in files):
        return tuple(sorted(files))
    try:
        builder.download_and_prepare()
        table = builder.as_dataset(split)
    except Exception as error:  # the library raises errors of many kinds for files that it cannot parse
        raise EngineError(
            f"`datasets` cannot read the data set ({_first_line(error)}); use another data set"
        ) from error
    return tuple(Path(file["filename"]) for file in table.cache_files)


def _first_line(error: BaseException) -> str:
    return shorten((str(error) or type(error).__name__).strip().splitlines()[0], 100)
