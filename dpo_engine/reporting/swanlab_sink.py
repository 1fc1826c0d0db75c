"""Write metrics to SwanLab, online or in local files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from dpo_engine.reporting.contract import SINKS, CannotOpen, Opening
from dpo_engine.reporting.trackers import first_line


@SINKS.register("swanlab", package="swanlab")
class SwanlabSink:
    """Log to SwanLab.

    project    SwanLab project
    name       name of the SwanLab run; None: the name of the output directory
    workspace  SwanLab workspace; None: the account's default workspace
    mode       ``offline`` writes files in ``<train.output_dir>/swanlab``, which ``swanlab sync`` uploads later; None:
               the value of the environment variable ``SWANLAB_MODE``, or ``online`` if the variable is not set

    In mode ``online``, a resumed run continues the same SwanLab run. In the modes ``local`` and ``offline``, SwanLab
    cannot continue a run, so each start of the run writes its own files. The mode ``disabled`` records nothing.
    """

    def __init__(
        self,
        opening: Opening,
        *,
        project: str = "dpo-engine",
        name: str | None = None,
        workspace: str | None = None,
        mode: Literal["online", "local", "offline", "disabled"] | None = None,
    ):
        import swanlab

        config, directory, _ = opening
        files = directory / "swanlab"
        files.mkdir(parents=True, exist_ok=True)
        settings = swanlab.Settings(interactive=False)  # never ask for an API key
        known = opening.recall("swanlab") if (mode or settings.mode) == "online" else None
        try:
            self._run = swanlab.init(
                project=project,
                name=name or directory.resolve().name,
                workspace=workspace,
                mode=mode,
                log_dir=str(files),
                id=known,
                resume="allow" if known else None,
                config=config.model_dump(mode="json"),
                settings=settings,
                reinit=True,
            )
        except Exception as error:  # swanlab raises many kinds of errors
            raise CannotOpen(first_line(error), "log in, or set logging.sinks.swanlab.mode=offline") from error
        opening.remember("swanlab", self._run.id)

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """Record the metrics of one step."""
        self._run.log({prefix + name: value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Wait until SwanLab has stored all metrics."""
        self._run.finish()
