"""``dpo-engine init``: write a commented YAML file for a first run."""

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
    "train.epochs",
    "train.eval_interval",
    "checkpoint.save_interval",
    "logging.tensorboard",
)
"""The keys in the written file, by section. These are the keys that a first run usually sets."""

STARTING = {
    "data.validation_fraction": 0.05,
    "loss.beta": 0.1,
    "optim.lr": 5e-7,
    "optim.warmup_ratio": 0.1,
    "train.global_batch_size": 64,
    "train.eval_interval": 50,
    "checkpoint.save_interval": 100,
}
"""Values in the written file that are not taken from the defaults.

Because of these values, a first run has warmup, evaluations, and checkpoints."""

OPTION = Key("loss.beta", "0.1", (), "loss option: how strongly the policy is kept close to the reference")


def init(
    model: str,
    data: str,
    to: str | Path = "run.yaml",
    *,
    validation: str | None = None,
    output_dir: str = "runs/first",
) -> Path:
    """Write a commented YAML file for a run that trains a model on preference data. Return the file's path.

    model         directory or Hub id of a Hugging Face checkpoint; it is not read
    data          source of preference pairs; it is not read
    to            path of the YAML file to write; it must not exist
    validation    source of pairs for evaluations; None: hold out a fraction of ``data``
    output_dir    ``train.output_dir`` of the run

    Raises :class:`~dpo_engine.errors.ConfigError` if the file exists or a value is invalid.
    """
    target = Path(to)
    if target.exists():
        raise ConfigError(f"--to={to}: already exists; pass another file, or remove this one")
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
