"""Build data sets in a test's folder from rows or files, with a tokenizer that the test chooses."""

import json
from pathlib import Path

from dpo_engine.config.run import Config
from dpo_engine.data.tokenize import build_dataset
from dpo_engine.data.tokenizer import load_tokenizer


def data_config(*paths, **settings):
    """Return the section `data` in the configuration of a run that trains on `paths`."""
    train = [path if isinstance(path, dict) else str(path) for path in paths]
    return Config.parse(
        {"model": {"path": "m"}, "train": {"output_dir": "o"}, "data": {"train": train, **settings}}
    ).data


def write(path, rows):
    """Write rows as JSON lines; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Builder:
    """Callable: `build(rows or path, ..., max_length=9)` returns a data set and its build report.

    A list of rows is written to a file that is named after the position of the list in the arguments: `0.jsonl` for the
    first argument, `1.jsonl` for the second.
    """

    def __init__(self, folder: Path, tokenizer_path: Path):
        self.folder = folder
        self.tokenizer_path = tokenizer_path

    def __call__(self, *sources, tokenizer=None, cache="cache", **settings):
        sources = [
            write(self.folder / f"{place}.jsonl", source) if isinstance(source, list) else source
            for place, source in enumerate(sources)
        ]
        config = data_config(*sources, **settings)
        tokenizer = load_tokenizer(self.tokenizer_path) if tokenizer is None else tokenizer
        return build_dataset(config.train, tokenizer, config, self.folder / cache)


def ids(pair):
    """Return three lists: the token ids of a pair's prompt, of its chosen response, and of its rejected response."""
    return [part.tolist() for part in pair[:3]]
