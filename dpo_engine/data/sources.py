"""Find the files of a data source (a file, directory, glob, saved data set or Hub id) and its slice of records."""

from __future__ import annotations

import glob
import math
import re
from dataclasses import dataclass
from pathlib import Path

from dpo_engine.data.hub import data_files
from dpo_engine.errors import DataError, quoted
from dpo_engine.strict_json import BadJson, read_object
from dpo_engine.wording import join

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet", ".arrow")
SHARD = 1 << 40
"""Factor that encodes the place of a record as one integer: ``SHARD * shard + line``. Shards are numbered from 0."""
STATE, SPLITS = "state.json", "dataset_dict.json"
SPLIT_NAMES = re.compile(r"(?:^|[-_.])(train|test|validation|valid|val|dev|eval)(?=[-_.]|$)")
IGNORED = re.compile(r"[._].*|.*\.md|LICENSE.*|dataset_infos?\.json")
"""Names of files in a directory that contain no records: hidden files, markers such as _SUCCESS, and descriptions."""
_SLICE = re.compile(r"(?P<base>.+)\[(?P<start>[^\[\]:]*):(?P<stop>[^\[\]:]*)\]", re.DOTALL)
_BOUND = re.compile(r"(?P<number>-?\d[\d_]*)(?P<percent>%?)|")


@dataclass(frozen=True)
class Slice:
    """A range of a source's records, as in ``[10%:20%]`` or ``[:-1000]``.

    start, stop  bounds in records or in percent; negative bounds count from the end; None if not given
    percent      whether the bounds are percentages
    """

    start: int | None
    stop: int | None
    percent: bool = False

    @property
    def needs_total(self) -> bool:
        """Whether the bounds depend on the number of records."""
        return self.percent or min(self.start or 0, self.stop or 0) < 0

    def bounds(self, total: int | None) -> tuple[int, float]:
        """Return the index of the first record, and the index after the last record.

        total  number of records; may be None if `needs_total` is false

        Indices start at 0. If there is no stop bound, the index after the last record may be infinite.
        If the number of records is not needed, the bounds are returned as given. Otherwise, percentages are rounded to
        the closest record, and bounds outside the source are moved to its start or end.
        Source: `datasets.ReadInstruction`, rounding "closest". One difference: a negative percentage that is rounded
        to 0 records means the end here, but the start in `datasets`.
        """
        if not self.needs_total:
            return self.start or 0, math.inf if self.stop is None else self.stop
        found = []
        for bound, default in ((self.start, 0), (self.stop, total)):
            size = 0 if bound is None else round(bound * total / 100) if self.percent else bound
            place = default if bound is None else size if bound >= 0 else total + size
            found.append(min(max(place, 0), total))
        return found[0], found[1]


@dataclass(frozen=True)
class Shards:
    """The files of one source, in the order in which they are read.

    source  the source, as written in the run file
    files   paths of the files
    suffix  common suffix of the files, one of `SUFFIXES`
    part    the slice of the records to read; None means all records
    """

    source: str
    files: tuple[Path, ...]
    suffix: str
    part: Slice | None = None

    @property
    def size(self) -> int:
        """Total size of the files in bytes. Raises `OSError`."""
        return sum(file.stat().st_size for file in self.files)


def find_shards(source: str | Path) -> Shards:
    """Find the files of a source.

    source  the path of a file, of a directory with files of one type, or of a data set saved by
            `datasets.save_to_disk`; or a glob; or a Hub id `org/name[/config][@revision][:split]`. A slice
            `[start:stop]` may follow. If a file or directory has exactly this name, including the
            brackets, there is no slice.

    The function can download a data set from the Hub; see :func:`~dpo_engine.data.hub.data_files`.

    Raises :class:`DataError` if there are no files, if it is unclear which files or which split is meant, if the types
    of the files differ or are not supported, or if the slice is invalid.
    """
    source = str(source)
    base, part = split_slice(source)
    if Path(base).is_file():
        files = (Path(base),)
    elif Path(base).is_dir():
        files = _of_directory(source, Path(base))
    elif (found := data_files(source, base)) is not None:
        files = found
    elif glob.has_magic(base):
        files = tuple(sorted(Path(found) for found in glob.glob(base, recursive=True)))
        if not files:
            raise DataError(f"{source}: no such file, and the glob pattern matches no file; correct the path")
        folder = next((file for file in files if not file.is_file()), None)
        if folder is not None:
            raise DataError(f"{source}: matches {folder}, which is not a file; use a pattern that matches only files")
    else:
        raise DataError(f"{source}: no such file; set the path of a {join(SUFFIXES, 'or')} file")
    suffixes = {_suffix(file) for file in files}
    if "" in suffixes:
        file = next(file for file in files if not _suffix(file))
        named = "" if str(file) == source else f" of {file}"
        raise DataError(f"{source}: unsupported file type{named}; use {join(SUFFIXES, 'or')}")
    if len(suffixes) > 1:
        raise DataError(
            f"{source}: contains files of several types ({join(sorted(suffixes), 'and')}); use one type per source, or "
            "a glob such as DIR/*.parquet"
        )
    return Shards(source, files, suffixes.pop(), part)


def split_slice(source: str) -> tuple[str, Slice | None]:
    """Split a slice off the end of a source. If a file or directory has this whole name, the source has no slice.

    Raises :class:`DataError` if the slice is invalid.
    """
    found = _SLICE.fullmatch(source)
    if not found or Path(source).exists():
        return source, None
    bounds = [_BOUND.fullmatch(found[name].strip()) for name in ("start", "stop")]
    if None in bounds:
        raise DataError(
            f"{source}: is not a valid slice; write [start:stop] with whole numbers or percentages, such as [:1000] or "
            "[-5%:]"
        )
    given = [bound for bound in bounds if bound["number"]]
    percent = {bool(bound["percent"]) for bound in given}
    numbers = [int(bound["number"]) if bound["number"] else None for bound in bounds]
    if len(percent) > 1:
        raise DataError(f"{source}: the slice has one bound in records and one in percent; use one unit for both")
    if percent == {True} and any(abs(number or 0) > 100 for number in numbers):
        raise DataError(f"{source}: the slice has a bound beyond 100%; use percentages from -100% to 100%")
    return found["base"], Slice(*numbers, percent=percent == {True})


def locate(source: str | Path, place: int) -> str:
    """Return the location of a record as `file:line`, where `file` is the shard that contains the record.

    place  the record's place in its source, as `read_rows` yields it
    """
    shard, line = divmod(place, SHARD)
    try:
        return f"{find_shards(source).files[shard]}:{line}"
    except (DataError, IndexError):  # the files have changed since they were read
        return f"{source}:{line}"


def _suffix(path: Path) -> str:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")


def _of_directory(source: str, directory: Path) -> tuple[Path, ...]:
    if (directory / SPLITS).is_file():
        splits = sorted(path.parent.name for path in directory.glob(f"*/{STATE}"))
        raise DataError(
            f"{source}: contains several splits ({join(splits, 'and') or 'none found'}); name one, for example "
            f"{directory / (splits[0] if splits else 'train')}"
        )
    if (directory / STATE).is_file():
        return _saved(source, directory)
    entries = sorted(path for path in directory.iterdir() if not IGNORED.fullmatch(path.name))
    files = tuple(path for path in entries if path.is_file() and _suffix(path))
    other = next((path.name for path in entries if path not in files), None)
    if other is not None:
        raise DataError(
            f"{source}: contains {quoted(other)}, which is not a data file; name the files with a glob such as "
            f"{directory}/*.parquet"
        )
    if not files:
        raise DataError(f"{source}: contains no data files; use a directory with {join(SUFFIXES, 'or')} files")
    splits = {split for file in files for split in SPLIT_NAMES.findall(file.name)}
    if len(splits) > 1:
        raise DataError(
            f"{source}: its file names suggest several splits ({join(sorted(splits), 'and')}); select the files of one "
            f"split with a glob such as {directory}/*{sorted(splits)[0]}*"
        )
    return files


def _saved(source: str, directory: Path) -> tuple[Path, ...]:
    """Return the files of a data set that `datasets.save_to_disk` wrote."""
    try:
        state = read_object(directory / STATE)
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, BadJson, LookupError, TypeError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise DataError(
            f"{source}: {STATE} is not the state file of a saved data set ({what}); save the data set again"
        ) from error
    if any(value for name, value in state.items() if name.startswith("_indices")):
        raise DataError(
            f"{source}: was saved with a selection of rows that is not applied to its files; call flatten_indices() "
            "and save it again"
        )
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*\.arrow", name):
            raise DataError(f"{source}: {STATE} lists {quoted(name)}; it must list .arrow files of its own directory")
        if not (directory / name).is_file():
            raise DataError(f"{source}: {STATE} lists {name}, which is missing; copy the data set again")
    if not names:
        raise DataError(f"{source}: contains no data files; save the data set again")
    return tuple(directory / name for name in names)
