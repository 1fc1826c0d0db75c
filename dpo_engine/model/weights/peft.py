"""The files of a PEFT adapter: ``adapter_config.json``, and the tensors in ``adapter_model.safetensors``.

An adapter is accepted only if it has exactly the tensors that the engine's adapters have with the same settings. In
addition, its initialization must not be one that may change the weights of the checkpoint. PEFT can load other adapters
without an error, but may ignore some of their tensors. The model's results then differ from the results with the
complete adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_engine.config.adapter_section import AdapterConfig
from dpo_engine.data.hub import model_directory
from dpo_engine.errors import ConfigError, printable, shorten
from dpo_engine.model.adaptation import (
    Adaptation,
    adapter_shapes,
    peft_tensors,
)
from dpo_engine.model.adaptation_problems import adaptation_problems
from dpo_engine.model.architecture import FAMILIES, Architecture
from dpo_engine.model.weights.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    DTYPES,
    PICKLED_WEIGHTS,
    CheckpointFiles,
    carried,
    first_few,
)
from dpo_engine.strict_json import BadJson, read_object
from dpo_engine.wording import show

KEY = "adapter.path"
LARGEST = 1e30
"""Upper limit of alpha. No real adapter exceeds it, so a larger value is an error."""

READ = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "layers_to_transform")
READ += ("rank_pattern", "alpha_pattern")
"""Fields of adapter_config.json that determine the adapter."""
IGNORED = ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
IGNORED += ("inference_mode", "megatron_core", "qalora_group_size", "runtime_config", "lora_dropout", "eva_config")
IGNORED += ("ensure_weight_tying",)
"""Fields that do not affect what the adapter computes."""
THEIR_NAMES = {
    "adapter.targets": "target_modules",
    "adapter.layers": "layers_to_transform",
    "adapter.rank_pattern": "rank_pattern",
    "adapter.alpha_pattern": "alpha_pattern",
}
OF_THE_ADAPTER = ("gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that do not change the base weights."""
REASONS = {
    "bias": "the engine's adapters contain no biases",
    "modules_to_save": "the engine's adapters contain no whole modules",
    "target_parameters": "parameters outside of projections, such as those of experts, cannot be adapted",
    "fan_in_fan_out": "the model's linear layers store their weights as [out, in]",
    "layer_replication": "it changes the number of layers",
    "layers_pattern": "layers are numbered as in the checkpoint",
}
"""The reasons why some fields must have their default values."""


def read_adaptation(directory: str | Path, arch: Architecture) -> Adaptation:
    """Read the settings of the PEFT adapter in ``directory``, which can also be a Hub id.

    Raises :class:`~dpo_engine.errors.ConfigError` if the file cannot be read. If it can, the error lists the fields
    that are invalid or need features that the engine's adapters do not have. If there are none, it lists the settings
    that do not fit the model, such as targets that cannot be adapted.
    """
    where = f"{KEY}={directory}"
    try:
        values = read_object(model_directory(directory, KEY) / ADAPTER_CONFIG)
    except FileNotFoundError:
        raise ConfigError(f"{where}: has no {ADAPTER_CONFIG}; set it to the directory of a PEFT adapter") from None
    except (OSError, BadJson) as failure:
        raise ConfigError(f"{where}: {ADAPTER_CONFIG} cannot be read ({failure}); write the adapter again") from None
    if problems := _problems(values):
        raise ConfigError([f"{where}: {ADAPTER_CONFIG}: {problem}" for problem in problems])
    targets, layers = values["target_modules"], values.get("layers_to_transform")
    asked = AdapterConfig(
        kind="dora" if values.get("use_dora") else "lora",
        rank=values.get("r", 8),
        alpha=float(values.get("lora_alpha", 8)),
        rslora=bool(values.get("use_rslora")),
        targets=targets if isinstance(targets, str) else tuple(targets),
        layers=(layers,) if isinstance(layers, int) else tuple(layers) if layers else None,
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern={name: float(value) for name, value in (values.get("alpha_pattern") or {}).items()},
    )
    if problems := adaptation_problems(asked, arch, unused=True):
        raise ConfigError([f"{where}: {ADAPTER_CONFIG}: {_in_their_words(problem)}" for problem in problems])
    return Adaptation.of(asked, arch)


def _problems(values: Mapping[str, Any]) -> list[str]:
    if values.get("peft_type") != "LORA":
        kind = shorten(repr(values.get("peft_type")), 40)
        return [f"peft_type={kind}: only LORA (also with use_dora or use_rslora) is supported; use another adapter"]
    problems = []
    for name, value in values.items():
        text = shorten(json.dumps(value), 60)
        if name == "init_lora_weights":
            own = isinstance(value, str) and value.lower() in OF_THE_ADAPTER
            if not own and value is not None and type(value) is not bool:
                problems.append(
                    f"{name}={text}: may also change the base weights, so the adapter may not fit the checkpoint; "
                    "convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
                )
        elif name not in (*READ, *IGNORED) and not (value is None or value is False or value in ({}, [], "", "none")):
            reason = REASONS.get(name, "the engine's adapters do not have this feature")
            problems.append(f"{name}={text}: is not supported ({reason}); use an adapter without it")
    expected: dict[str, tuple[Callable[[Any], bool], str]] = {
        "use_dora": (_is_flag, "true or false"),
        "use_rslora": (_is_flag, "true or false"),
        "r": (_is_count, "a whole number above 0"),
        "lora_alpha": (_is_positive, "a number above 0 and below 1e30"),
        "rank_pattern": (
            lambda value: value is None or _maps_to(value, _is_count),
            "an object whose values are whole numbers above 0",
        ),
        "alpha_pattern": (
            lambda value: value is None or _maps_to(value, _is_positive),
            "an object whose values are numbers above 0 and below 1e30",
        ),
        "layers_to_transform": (
            lambda value: value is None or _is_index(value) or (isinstance(value, list) and all(map(_is_index, value))),
            "the index of a layer, or a list of such indices",
        ),
    }
    for name, (allowed, what) in expected.items():
        if name in values and not allowed(values[name]):
            problems.append(f"{name}={shorten(json.dumps(values[name]), 60)}: must be {what}; correct it")
    targets = values.get("target_modules")
    listed = isinstance(targets, list) and targets and all(map(_is_name, targets))
    if not listed and not _is_name(targets):
        problems.append("target_modules: must be a list of names or a regular expression; correct it")
    return problems


def _in_their_words(problem: str) -> str:
    """Replace the engine's names of settings in a message with PEFT's names."""
    for ours, theirs in THEIR_NAMES.items():
        problem = problem.replace(ours, theirs)
    return problem


def _is_flag(value: Any) -> bool:
    return value is None or type(value) is bool


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_index(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < LARGEST


def _maps_to(value: Any, allowed: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(_is_name, value)) and all(map(allowed, value.values()))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != "" and "\0" not in value


def adapter_config(adaptation: Adaptation, arch: Architecture, base: str) -> str:
    """Return the text of the ``adapter_config.json`` for adapters of the checkpoint ``base``.

    If several patterns of ``rank_pattern`` or ``alpha_pattern`` match a name, the first one applies. PEFT sorts the
    patterns when it saves the adapter again, so another pattern could become the first match. Whole names are therefore
    written instead of patterns.
    """
    adapted = adapter_shapes(adaptation, arch)
    # An expression can also match modules that are not projections. PEFT would add adapters to these modules, so the
    # names of the projections are written instead of an expression.
    targets = list(adapted) if isinstance(adaptation.targets, str) else sorted(adaptation.targets)
    values = {
        "alpha_pattern": _deviations(adaptation, adapted, "alpha"),
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None if adaptation.layers is None else list(adaptation.layers),
        "lora_alpha": adaptation.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adaptation.rank,
        "rank_pattern": _deviations(adaptation, adapted, "rank"),
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": adaptation.dora,
        "use_rslora": adaptation.rslora,
    }
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _deviations(adaptation: Adaptation, projections: Sequence[str], setting: str) -> dict[str, Any]:
    found = {name: adaptation.setting(setting, name) for name in projections}
    return {name: value for name, value in found.items() if value != getattr(adaptation, setting)}


class AdapterFiles(CheckpointFiles):
    """The tensors of the PEFT adapter in ``directory``, which can also be a Hub id."""

    def __init__(self, directory: str | Path):
        super().__init__(directory, KEY)

    def _index(self) -> dict[str, str]:
        if (self.directory / ADAPTER).is_file():
            return dict.fromkeys(self._file(ADAPTER).keys(), ADAPTER)
        if (self.directory / "adapter_model.bin").is_file():
            raise self.fail(f"adapter_model.bin: {PICKLED_WEIGHTS}")
        raise self.fail(f"has no {ADAPTER}; set it to the directory of a PEFT adapter")

    def check(self, adaptation: Adaptation, arch: Architecture) -> None:
        """Check that the file has all tensors of the engine's adapters, and no others. Only the header is read.

        Raises :class:`~dpo_engine.errors.ConfigError` with the first few problems of each kind.
        """
        expected, headers = peft_tensors(adaptation, arch), self.headers()
        missing = [f"tensor {name} is missing" for name in expected if name not in headers]
        unused = [
            f"tensor {shorten(printable(name), 90)} has no place in the model"
            for name in headers
            if name not in expected
        ]
        misfits = [
            f"tensor {name} has shape {list(headers[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in headers and headers[name].shape != shape
        ]
        foreign = [
            f"tensor {name} has dtype {headers[name].dtype}; convert it to bf16, fp16 or fp32"
            for name in expected
            if name in headers and headers[name].dtype not in DTYPES
        ]
        problems = [line for kind in (missing, unused, misfits, foreign) for line in first_few(kind)]
        if problems:
            raise ConfigError(
                [f"{self.where}: {ADAPTER}: {line}" for line in problems]
                + [f"{self.where}: the adapter does not fit model.path; save it again with PEFT or use another adapter"]
            )


def adapter_digest(directory: str | Path) -> str:
    """Return a digest of an adapter's settings and tensors. The digest does not depend on the adapter's path.

    Raises :class:`~dpo_engine.errors.ConfigError` if the tensors cannot be read.
    """
    files = AdapterFiles(directory)
    values = read_object(files.directory / ADAPTER_CONFIG)
    settings = {name: values.get(name) for name in READ}  # lists are sorted below: PEFT writes sets in any order
    settings = {name: sorted(value) if isinstance(value, list) else value for name, value in settings.items()}
    whole = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(files.file_of):
        whole.update(files.digest(name).encode())
    return whole.hexdigest()[:32]


def adapter_problems(asked: AdapterConfig | None, arch: Architecture, tp: int = 1) -> list[str]:
    """List the problems of the section ``adapter`` for a model, including those of the files in ``adapter.path``.

    tp   tensor-parallel size
    """
    if asked is None:
        return []
    if carried(arch):
        return [
            f"adapter: adapters of {arch.model_type} models are not supported, because PEFT and the engine "
            "use different names for the layers of these models; remove the section"
        ]
    if any(rule.transposed and not rule.expert for rule in FAMILIES[arch.model_type].rules):
        return [
            f"adapter: adapters of {arch.model_type} models are not supported, because the weights of these "
            "models are stored transposed; remove the section"
        ]
    if arch.kv_size % tp:
        return [
            f"parallel.tp={tp}: must divide the {arch.kv_size} rows of the key projection if there are adapters; "
            "lower it"
        ]
    if asked.path is None:
        return adaptation_problems(asked, arch)
    defaults = AdapterConfig(path=asked.path)
    others = [name for name in AdapterConfig.model_fields if getattr(asked, name) != getattr(defaults, name)]
    if others:
        return [
            f"adapter.{name}={show(getattr(asked, name))}: cannot be set, because the files at adapter.path already "
            f"set {name}; remove adapter.{name}"
            for name in others
        ]
    try:
        adaptation = read_adaptation(asked.path, arch)
        AdapterFiles(asked.path).check(adaptation, arch)
    except ConfigError as error:
        return list(error.problems)
    return []


def other_base(asked: AdapterConfig | None, path: str) -> list[str]:
    """Return a warning in a list if the initial adapter names a base model other than ``path``, else an empty list.

    Only the last parts of the names are compared, because each machine has its own directories.
    """
    if asked is None or asked.path is None:
        return []
    named = read_object(model_directory(asked.path, KEY) / ADAPTER_CONFIG).get("base_model_name_or_path")
    ours = {Path(path).name.lower(), Path(path).resolve().name.lower()}
    if not isinstance(named, str) or not named or Path(named).name.lower() in ours:
        return []
    return [
        f"{KEY}={asked.path}: was trained on {shorten(printable(named), 90)}, but model.path is {path}; if these are "
        "different weights, the adapter does not fit model.path"
    ]


def adapter_facts(adaptation: Adaptation | None, start: str | None) -> dict[str, str]:
    """Return facts that must be equal on all ranks: the adapters' settings, and the digest of the initial adapter."""
    facts = {**adaptation.facts, "start": start} if adaptation else {}
    return {f"adapter.{name}": json.dumps(value) for name, value in facts.items()}


def adaptation_of(asked: AdapterConfig, arch: Architecture) -> Adaptation:
    """Return the settings of a run's adapters. With ``adapter.path``, they are the settings of the adapter's files."""
    return Adaptation.of(asked, arch) if asked.path is None else read_adaptation(asked.path, arch)
