"""``dpo-engine init``: write a commented file to start a run from."""

from pathlib import Path
from typing import Any

from dpo_engine.atomic_files import write_whole
from dpo_engine.config.file import parse
from dpo_engine.config.keys import Key, as_yaml, keys
from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.verbs.config import comment

SHOWN = (
    "model.path",
    "model.dtype",
    "parallel.tp",
    "parallel.pp",
    "parallel.cp",
    "data.train",
    "data.validation",
    "data.validation_fraction",
    "data.max_length",
    "loss.name",
    "loss.beta",
    "reference.mode",
    "optim.lr",
    "optim.schedule",
    "optim.warmup_ratio",
    "train.output_dir",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.epochs",
    "train.eval_interval",
    "checkpoint.save_interval",
    "logging.tensorboard",
)
"""The keys of a starting file, by section: those that a first run usually sets."""

STARTING = {
    "data.validation_fraction": 0.05,
    "loss.beta": 0.1,
    "optim.lr": 5e-7,
    "optim.warmup_ratio": 0.1,
    "train.global_batch_size": 64,
    "train.eval_interval": 50,
    "checkpoint.save_interval": 100,
}
"""Values that differ from the defaults because a first run evaluates, saves and warms up."""

OPTION = Key("loss.beta", "0.1", (), "an option of the loss: how strongly the policy is held to the reference")


def init(
    model: str,
    data: str,
    to: str | Path = "run.yaml",
    *,
    validation: str | None = None,
    output_dir: str = "runs/first",
) -> Path:
    """Write a commented run file for a model and its preference data; returns its path.

    model, data   directory of a Hugging Face checkpoint, and a file of pairs; neither is read
    to            the file to write; an existing one is refused
    validation    a file of pairs to evaluate on; None: a share of ``data`` is held out
    output_dir    ``train.output_dir`` of the run

    Raises :class:`~dpo_engine.errors.ConfigError` when the file exists or a value cannot be one of a run.
    """
    target = Path(to)
    if target.exists():
        raise ConfigError(f"--to={to}: exists; give another file, or remove this one")
    values = {"model.path": model, "data.train": [data], "train.output_dir": output_dir, **STARTING}
    if validation is not None:
        values |= {"data.validation": [validation]}
        del values["data.validation_fraction"]
    text = _text(values)
    Config.parse(parse(text, str(target)))
    write_whole(target, text.encode())
    return target


def _text(values: dict[str, Any]) -> str:
    known = {key.path: key for key in keys()} | {OPTION.path: OPTION}
    lines = ["# A run of dpo-engine. `dpo-engine check FILE` validates it; `dpo-engine config` prints all keys."]
    section = ""
    for path in SHOWN:
        if path.startswith("data.validation") and path not in values:
            continue
        above, _, name = path.rpartition(".")
        if above != section:
            lines += ["", f"{above}:"]
            section = above
        value = as_yaml(values[path]) if path in values else known[path].default
        lines += [f"  {line}" for line in (*comment(known[path]), f"{name}: {value}")]
    return "\n".join(lines) + "\n"
