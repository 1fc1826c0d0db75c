"""Write metrics to experiment trackers: TensorBoard, Weights & Biases, and MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_engine.config.run import Config
from dpo_engine.config.sections import MlflowConfig, WandbConfig
from dpo_engine.errors import ConfigError


class TensorBoardSink:
    def __init__(self, directory: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard then hides earlier events about steps that will run again.
        self._writer = SummaryWriter(str(directory), purge_step=start_step + 1 if start_step else 0)

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        for name, value in values.items():
            self._writer.add_scalar(prefix + name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Log to Weights & Biases. A resumed run continues the same W&B run. Offline mode needs no network."""

    def __init__(self, asked: WandbConfig, config: Config, directory: Path, start_step: int):
        import wandb

        remembered = directory / "wandb" / "run_id"
        try:
            self._run = wandb.init(
                project=asked.project,
                name=asked.name or directory.resolve().name,
                mode=asked.mode,
                dir=str(directory),
                id=_recall(remembered, start_step),
                resume="allow",
                config=config.model_dump(mode="json"),
            )
        except (wandb.errors.Error, OSError) as error:
            raise ConfigError(
                f"logging.wandb.project={asked.project}: W&B cannot be opened ({_first_line(error)}); log in, or set "
                "logging.wandb.mode=offline"
            ) from error
        # W&B's own step must not decrease, but the optimizer step does when a run resumes from an older checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        _remember(remembered, self._run.id)

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        self._run.log({"step": step, **{prefix + name: value for name, value in values.items()}})

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """Log to MLflow. A resumed run continues the same MLflow run."""

    def __init__(self, asked: MlflowConfig, config: Config, directory: Path, start_step: int):
        import mlflow

        remembered = directory / "mlflow" / "run_id"
        try:
            if asked.tracking_uri:
                mlflow.set_tracking_uri(asked.tracking_uri)
            mlflow.set_experiment(asked.experiment)
            run = mlflow.start_run(run_id=_recall(remembered, start_step), run_name=directory.resolve().name)
            if start_step == 0:
                mlflow.log_params(dict(_flat(config.model_dump(mode="json"))))
        except (mlflow.exceptions.MlflowException, OSError) as error:
            raise ConfigError(
                f"logging.mlflow.experiment={asked.experiment}: MLflow cannot be opened ({_first_line(error)}); check "
                "logging.mlflow.tracking_uri"
            ) from error
        self._mlflow = mlflow
        _remember(remembered, run.info.run_id)

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        self._mlflow.log_metrics({prefix + name: value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _recall(path: Path, start_step: int) -> str | None:
    return path.read_text(encoding="utf-8").strip() if start_step and path.exists() else None


def _remember(path: Path, run_id: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run_id + "\n", encoding="utf-8")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _flat(nested: Mapping[str, Any], above: str = "") -> Any:
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value
