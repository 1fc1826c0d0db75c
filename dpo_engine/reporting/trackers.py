"""Write metrics to experiment trackers: TensorBoard, Weights & Biases, and MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_engine.config.sections import MlflowConfig, WandbConfig
from dpo_engine.errors import ConfigError
from dpo_engine.reporting.contract import Opening


class TensorBoardSink:
    def __init__(self, opening: Opening):
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run repeats some steps. With `purge_step`, TensorBoard hides the old events of these steps.
        start = opening.start_step + 1 if opening.start_step else 0
        self._writer = SummaryWriter(str(opening.directory / "tensorboard"), purge_step=start)

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        for name, value in values.items():
            self._writer.add_scalar(prefix + name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Log to Weights & Biases. A resumed run continues the same W&B run. Offline mode needs no network."""

    def __init__(self, opening: Opening, asked: WandbConfig):
        import wandb

        config, directory, _ = opening
        try:
            self._run = wandb.init(
                project=asked.project,
                name=asked.name or directory.resolve().name,
                mode=asked.mode,
                dir=str(directory),
                id=opening.recall("wandb"),
                resume="allow",
                config=config.model_dump(mode="json"),
            )
        except (wandb.errors.Error, OSError) as error:
            raise ConfigError(
                f"logging.wandb.project={asked.project}: W&B cannot be opened ({first_line(error)}); log in, or set "
                "logging.wandb.mode=offline"
            ) from error
        # W&B's own step must not decrease. The optimizer step decreases when a run resumes from an older checkpoint.
        # Therefore the optimizer step is logged as a metric.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        opening.remember("wandb", self._run.id)

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        self._run.log({"step": step, **{prefix + name: value for name, value in values.items()}})

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """Log to MLflow. A resumed run continues the same MLflow run."""

    def __init__(self, opening: Opening, asked: MlflowConfig):
        import mlflow

        config, directory, start_step = opening
        try:
            if asked.tracking_uri:
                mlflow.set_tracking_uri(asked.tracking_uri)
            mlflow.set_experiment(asked.experiment)
            run = mlflow.start_run(run_id=opening.recall("mlflow"), run_name=directory.resolve().name)
            if start_step == 0:
                mlflow.log_params(dict(_flat(config.model_dump(mode="json"))))
        except (mlflow.exceptions.MlflowException, OSError) as error:
            raise ConfigError(
                f"logging.mlflow.experiment={asked.experiment}: MLflow cannot be opened ({first_line(error)}); check "
                "logging.mlflow.tracking_uri"
            ) from error
        self._mlflow = mlflow
        opening.remember("mlflow", run.info.run_id)

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        self._mlflow.log_metrics({prefix + name: value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if there is no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _flat(nested: Mapping[str, Any], above: str = "") -> Any:
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value
