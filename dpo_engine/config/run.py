"""The configuration of one run, read from YAML and overrides. Rules that involve several keys are in `rules.py`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from dpo_engine.config import file as run_file
from dpo_engine.config.errors import erase, explain
from dpo_engine.config.sections import (
    AdapterConfig,
    BadStepsConfig,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    MegatronConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ReferenceConfig,
    Section,
    Text,
    TrainConfig,
)
from dpo_engine.errors import ConfigError


class Config(Section):
    """The configuration of one run. Paths are relative to the current directory; batch sizes count pairs, and lengths
    count tokens.
    """

    model: ModelConfig
    adapter: AdapterConfig | None = None
    """low-rank adapters that are trained instead of the model's weights; null: all weights are trained"""
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    loss: LossConfig = LossConfig()
    reference: ReferenceConfig = ReferenceConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    bad_steps: BadStepsConfig = BadStepsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    megatron: MegatronConfig = MegatronConfig()
    callbacks: dict[Text, dict[str, Any]] = {}
    """mapping from the names of training-loop callbacks, which plugins register, to the options of each callback"""
    plugins: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Python modules to import at the start; they register losses, data formats, model families, activations, norms,
    kernels, callbacks, sinks, schedules or optimizers"""

    @property
    def shares_prompts(self) -> bool:
        """Whether responses share their prompt in the tree layout. A prompt whose tokens are scored is not shared."""
        return self.batch.share and self.data.score == "response"

    @property
    def tokenizer_path(self) -> str:
        return self.model.tokenizer or self.model.path

    @property
    def reference_path(self) -> str:
        return self.reference.path or self.model.path

    @property
    def fixed_row_reason(self) -> str | None:
        """The reason, for the log, why all rows of the tree layout must have the same size; None if sizes can vary."""
        if self.megatron.tp_comm_overlap:
            return "the size of tp_comm_overlap's buffers"
        return "the size for which CUDA graphs are recorded" if self.model.cuda_graphs else None

    @property
    def reference_mode(self) -> str:
        """The value of `reference.mode`, with `auto` resolved."""
        automatic = "resident" if self.adapter is None else "shared"
        return automatic if self.reference.mode == "auto" else self.reference.mode

    @property
    def reference_has_adapter(self) -> bool:
        """Whether the reference has the adapter that training starts from."""
        started = self.adapter is not None and self.adapter.path is not None
        return started and self.reference.path is None and self.reference.adapter == "start"

    @property
    def model_name(self) -> str:
        """The model that the policy starts from: its path and, if there is one, the path of its adapter."""
        adapter = self.adapter and self.adapter.path
        return self.model.path + (f" with {adapter}" if adapter else "")

    @property
    def reference_name(self) -> str:
        """The reference's model, named like :attr:`model_name`."""
        return self.model_name if self.reference_has_adapter else self.reference_path

    @property
    def cache_dir(self) -> Path:
        return Path(self.data.cache_dir or Path(self.train.output_dir) / "cache")

    @property
    def checkpoint_dir(self) -> Path:
        return Path(self.train.output_dir) / "checkpoints"

    @property
    def store_path(self) -> Path:
        return Path(self.reference.store or self.cache_dir / "reference")

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Config:
        """Read a YAML file and `a.b=c` overrides. Raises a `ConfigError` that lists all problems.

        Rules that involve several keys are not checked; see `rules.py`.
        """
        return draft(path, overrides).finished()

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Config:
        """Build a `Config` from nested mappings. Like :meth:`load`, raises a `ConfigError` that lists all problems."""
        return _draft(raw, []).finished()

    def to_yaml(self) -> str:
        """Return the whole configuration as YAML, including defaults. Loading the result gives an equal `Config`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Draft:
    """A configuration that may have problems. Later checks can use the valid keys and report all problems together.

    config    the configuration, in which broken keys have their defaults, or the text "?" if they are required; None
              if no configuration could be built
    problems  all invalid overrides and all violations of the schema
    broken    dotted paths of the keys that were replaced or ignored
    """

    config: Config | None
    problems: list[str]
    broken: frozenset[str]

    def finished(self) -> Config:
        """Return the configuration. Raises `ConfigError` if there are problems."""
        if self.problems or self.config is None:
            raise ConfigError(self.problems)
        return self.config


def draft(path: str | Path | None, overrides: Sequence[str] = ()) -> Draft:
    """Read a run's YAML file and overrides. A `path` of None means an empty file.

    Raises `ConfigError` if the file or one of its base files cannot be read (:func:`dpo_engine.config.file.read`).
    """
    raw = {} if path is None else run_file.read(path)
    return _draft(raw, run_file.override(raw, overrides))


def _draft(raw: Mapping[str, Any], problems: list[str]) -> Draft:
    raw = deepcopy(dict(raw))
    for name, field in Config.model_fields.items():
        # Replace absent sections with empty ones, so that their missing required keys are reported.
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) and raw.get(name) is None:
            raw[name] = {}
    broken: set[str] = set()
    for _ in range(2):
        try:
            return Draft(Config.model_validate(raw), problems, frozenset(broken))
        except ValidationError as error:
            found = explain(Config, error)
        if broken:
            break
        problems = problems + [problem.text for problem in found]
        broken = {problem.path for problem in found}
        for problem in found:
            erase(raw, problem)
    return Draft(None, problems, frozenset(broken))


def import_plugins(names: Sequence[str]) -> list[str]:
    """Import the plugin modules from `sys.path` and from the current directory. Return the problems found."""
    if names and "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    problems = []
    for index, name in enumerate(names):
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a plugin may fail in any way; report one line
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            problems.append(
                f"plugins[{index}]={name}: cannot be imported ({what}); fix the module, or add its folder to PYTHONPATH"
            )
    return problems
