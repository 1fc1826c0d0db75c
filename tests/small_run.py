"""The file of the small run that the fault cases harm."""

from pathlib import Path

import yaml


def write_run(folder: Path, name: str, files: dict, tiny_hf, sections: dict) -> Path:
    """Write the file of a run of 12 steps that saves at every fourth; ``sections`` are merged into it."""
    raw = {
        "model": {"path": str(tiny_hf("llama", num_hidden_layers=2)), "tokenizer": files["tokenizer"]},
        "data": {"train": files["train"], "validation": files["validation"], "max_length": 64},
        "batch": {"layout": "stacked"},
        "optim": {"lr": 1e-3, "warmup_steps": 1},
        "train": {"output_dir": str(folder / name), "global_batch_size": 4, "micro_batch_size": 2, "epochs": 2},
        "checkpoint": {"save_interval": 4, "export": False},
        "logging": {"progress": "off"},
    }
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path
