"""Write the model card of an export: a README.md with metadata for model hubs and a description of the run."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dpo_engine.data.hub import Repo, data_repo, model_repo
from dpo_engine.data.sources import split_slice
from dpo_engine.platform.dims import ParallelDims
from dpo_engine.reporting.sinks import read_metrics
from dpo_engine.version import __version__

SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]+)")
UNSHOWN = ("_time_s", "_per_s", "learning_rate", "skipped_steps", "_memory_bytes", "mfu", "layout_gain")
"""Suffixes of metrics that the card omits, because they describe the machine or the schedule and not the model."""


class RunFacts(NamedTuple):
    """The information about a run that a model card shows.

    config    the run's configuration, as JSON values
    identity  settings and data that determine the run's results; see :mod:`~dpo_engine.checkpoint.identity`
    layout    sizes of the parallel dimensions, by name
    step      number of optimizer steps
    train     metrics of the last logged step, by name
    logged    step of the metrics in ``train``
    held_out  metrics of the last evaluation, by name; empty without held-out pairs
    judged    step of the evaluation in ``held_out``
    dtype     dtype of all exported tensors; None: the dtypes of the base model
    chosen    why this step was exported, such as ``lowest eval/loss``; None: it was not chosen by a metric
    """

    config: Mapping[str, Any]
    identity: Mapping[str, Any]
    layout: Mapping[str, Any]
    step: int
    train: Mapping[str, float | None]
    logged: int
    held_out: Mapping[str, float | None]
    judged: int
    dtype: str | None = None
    chosen: str | None = None


def card_writer(
    config: Mapping[str, Any],
    identity: Mapping[str, Any],
    layout: Mapping[str, Any] | ParallelDims,
    step: int,
    metrics: Path,
    dtype: str | None = None,
    chosen: str | None = None,
) -> Callable[[str], str]:
    """Return a function that takes the name of a tokenizer class and returns a run's model card.

    With the keyword argument ``adapter=True``, the function returns the card of the run's PEFT adapter. The function
    reads ``metrics`` when it is called.

    config, identity, step, dtype, chosen  as for :class:`RunFacts`
    layout                                 as for :class:`RunFacts`, or a ``ParallelDims``
    metrics                                the run's metrics.jsonl
    """
    sizes = asdict(layout) if isinstance(layout, ParallelDims) else layout

    def write(loader: str, adapter: bool = False) -> str:
        found = last_metrics(read_metrics(metrics), step)
        return model_card(RunFacts(config, identity, sizes, step, *found, dtype, chosen), loader, adapter=adapter)

    return write


def last_metrics(lines: Sequence[Mapping[str, Any]], step: int) -> tuple[dict[str, Any], int, dict[str, Any], int]:
    """Return the last training metrics and their step, then the last evaluation and its step, both up to ``step``.

    Without training metrics, or without an evaluation, the corresponding metrics are empty and their step is 0.

    lines  the lines of a run's metrics.jsonl
    """
    train: dict[str, Any] = {}
    held_out: dict[str, Any] = {}
    logged = judged = 0
    for line in lines:
        values = {name: value for name, value in line.items() if name != "step"}
        if line["step"] > step:
            continue
        if all(name.startswith("eval/") for name in values):
            held_out, judged = {name.removeprefix("eval/"): value for name, value in values.items()}, line["step"]
        else:
            train, logged = values, line["step"]
    return train, logged, held_out, judged


def model_card(run: RunFacts, loader: str, *, adapter: bool = False) -> str:
    """Return the content of README.md.

    loader   name of the transformers class that reads the exported tokenizer
    adapter  whether the directory contains a PEFT adapter instead of a whole model

    Local paths appear without their directories, because directories are private to the machine.
    """
    config, identity = run.config, run.identity
    base, data = config["model"]["path"], config["data"]
    hub_base = hub_id(base)
    datasets = sorted({name for source in data["train"] if (name := hub_id(source["path"]))})
    loss = identity["loss"]
    library, relation = ("peft", "adapter") if adapter else ("transformers", "finetune")
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    front |= {"base_model": hub_base, "base_model_relation": relation} if hub_base else {}
    front |= {"datasets": datasets} if datasets else {}
    front["tags"] = ["dpo-engine", "preference-optimization", "dpo" if loss["name"] == "sigmoid" else loss["name"]]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {code(shown(config['train']['output_dir']))}",
        "",
        f"{code(shown(base))}, trained on preference pairs with dpo-engine {__version__} on NVIDIA Megatron-Core.",
        "",
        "## Training",
        "",
        *table(("setting", "value"), _settings(run)),
        "",
        "## Data",
        "",
        *table(("data", "source", "format"), _sources(data)),
        "",
        f"Training pairs: {identity['train_data']['pairs']:,}.",
        "",
        "## Results",
        "",
        *_results(run),
        "",
        "## Use",
        "",
        "```python",
        *(_use_adapter(shown(base)) if adapter else _use_model(loader)),
        "```",
        "",
    ]
    return "\n".join(lines)


def _use_model(loader: str) -> list[str]:
    return [
        f"from transformers import AutoModelForCausalLM, {loader}",
        "",
        'directory = "."  # this directory, or the name under which it was uploaded',
        f"tokenizer = {loader}.from_pretrained(directory)",
        "model = AutoModelForCausalLM.from_pretrained(directory)",
    ]


def _use_adapter(base: str) -> list[str]:
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        'directory = "."  # this directory, or the name under which it was uploaded',
        f"base = AutoModelForCausalLM.from_pretrained({base!r})",
        "model = PeftModel.from_pretrained(base, directory)",
    ]


def hub_id(place: str) -> str | None:
    """Return ``org/name`` for a Hub id or a snapshot in the Hub's cache; None for other paths."""
    if found := SNAPSHOT.search(place):
        return f"{found[1]}/{found[2]}"
    base, _ = split_slice(place)
    if Path(base).exists():
        return None
    repo = model_repo(base) or next(iter(data_repo(base) or ()), None)
    return repo.name if isinstance(repo, Repo) else None


def shown(place: str) -> str:
    """Return a Hub id in full, and a path without its directories."""
    return hub_id(place) or Path(place).name or place


def code(value: Any) -> str:
    """Return a value as Markdown code that is safe in a table."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _settings(run: RunFacts) -> list[tuple[str, str]]:
    config, identity, layout = run.config, run.identity, run.layout
    loss, optim = dict(identity["loss"]), identity["optim"]
    name = loss.pop("name")
    options = ", ".join(f"{key}={value}" for key, value in loss.items())
    reference = dict(config["reference"]) if identity["reference"] else {"mode": "none", "path": None}
    if reference["mode"] == "auto":
        reference["mode"] = "shared" if identity.get("adapter") else "resident"
    sizes = ", ".join(f"{key} {layout[key]}" for key in ("tp", "pp", "vpp", "cp", "ep") if layout.get(key))
    rows = [
        ("base model", code(shown(config["model"]["path"]))),
        *([("adapter", _adapter(identity["adapter"]))] if identity.get("adapter") else []),
        ("loss", code(name) + (f" with {code(options)}" if options else "")),
        ("reference", code(reference["mode"]) + (f", {code(shown(reference['path']))}" if reference["path"] else "")),
        ("steps", f"{run.step:,}, with a global batch size of {identity['global_batch_size']:,}"),
        *([("step chosen by", code(run.chosen))] if run.chosen else []),
        ("learning rate", f"{optim['lr']:g}, {optim['schedule']}"),
        ("dtype", code(identity["dtype"]) + (f", exported as {code(run.dtype)}" if run.dtype else "")),
        ("layout", f"{sizes}, {layout['world']} rank{'s' * (layout['world'] != 1)}"),
        ("maximum length", f"{config['data']['max_length']:,} tokens"),
    ]
    if template := config["data"]["chat_template"]:
        rows.append(("chat template", f"{code(shown(template))}, exported as `chat_template.jinja`"))
    return rows


def _adapter(facts: Mapping[str, Any]) -> str:
    targets = facts["targets"]
    listed = targets if isinstance(targets, str) else ", ".join(targets)
    scale = ", rslora" if facts["rslora"] else ""
    return f"{facts['kind']}, rank {facts['rank']}, alpha {facts['alpha']:g}{scale}, {code(listed)}"


def _sources(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    named = [("training", source) for source in data["train"]]
    named += [("held-out", source) for source in data["validation"] or ()]
    rows = [(kind, code(shown(source["path"])), code(source["format"])) for kind, source in named]
    if fraction := data["validation_fraction"]:
        rows.append(("held-out", f"{fraction:g} of the training prompts", ""))
    return rows


def _results(run: RunFacts) -> list[str]:
    held_out = f"held-out, step {run.judged}"
    columns = [(f"training, step {run.logged}", run.train), *([(held_out, run.held_out)] if run.held_out else [])]
    names = [name for name in {**run.train, **run.held_out} if name != "time" and not name.endswith(UNSHOWN)]
    rows = [(code(name), *(_number(values.get(name)) for _, values in columns)) for name in names]
    return table(("metric", *(title for title, _ in columns)), rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
