"""Files, configuration and logs of small runs."""

import json
from pathlib import Path

import yaml


def write_run(folder: Path, name: str, files: dict, tiny_hf, sections: dict) -> Path:
    """Write the YAML file of a run. By default, the run takes 2 epochs with 4 pairs per step, and saves every 4 steps.

    ``sections`` maps names of sections to values. If a value is a dictionary, its entries are added to the section, and
    replace entries with the same key. Any other value replaces the whole section.
    """
    raw = {
        "model": {"path": str(tiny_hf("llama", num_hidden_layers=2)), "tokenizer": files["tokenizer"]},
        "data": {"train": files["train"], "validation": files["validation"], "max_length": 64},
        "batch": {"layout": "stacked"},
        "optim": {"lr": 1e-3, "warmup_steps": 1},
        "train": {"output_dir": str(folder / name), "global_batch_size": 4, "micro_batch_size": 2, "epochs": 2},
        "checkpoint": {"save_interval": 4, "export": False},
        "logging": {"progress": "off", "page": False, "token_samples": 0},
    }
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


WORDS = "which number is larger smaller the second first of them".split()


def write_pairs(path, count, start=0):
    rows = []
    for i in range(start, start + count):
        prompt = f"which is larger {i} {WORDS[i % len(WORDS)]}"
        rows.append({"prompt": prompt, "chosen": " " + " ".join(WORDS[: 1 + i % 5]), "rejected": f" smaller {i}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config_of(files, model, output, /, **sections):
    from dpo_engine.config.run import Config

    raw = {
        "model": {"path": str(model), "tokenizer": files["tokenizer"]},
        "data": {"train": files["train"], "validation": files["validation"], "max_length": 64},
        "optim": {"lr": 1e-3, "warmup_steps": 1},
        "train": {"output_dir": str(output), "global_batch_size": 8, "micro_batch_size": 2, "epochs": 2},
        "logging": {"progress": "off", "page": False, "token_samples": 0},
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return Config.parse(raw)


def run(config):
    from dpo_engine.errors import EngineError
    from dpo_engine.verbs.train import train

    try:
        return train(config)
    except EngineError as error:
        return type(error).__name__, str(error)


def log_of(output):
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
