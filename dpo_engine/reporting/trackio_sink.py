"""Write metrics to Trackio, which stores them in a local database or in a Space of the Hugging Face Hub."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout

from dpo_engine.reporting.contract import SINKS, CannotOpen, Opening
from dpo_engine.reporting.trackers import first_line


@SINKS.register("trackio", package="trackio")
class TrackioSink:
    """Log to Trackio. A resumed run continues the same Trackio run.

    project   Trackio project
    name      name of the Trackio run; None: the name of the output directory and a random suffix
    space_id  Hugging Face Space that stores the metrics; None: a local database, which needs no network. Its folder is
              the value of the environment variable ``TRACKIO_DIR`` or, without this variable, Trackio's default folder
    """

    def __init__(
        self, opening: Opening, *, project: str = "dpo-engine", name: str | None = None, space_id: str | None = None
    ):
        import trackio

        config, directory, _ = opening
        known = opening.recall("trackio")
        name = known or name or f"{directory.resolve().name}-{secrets.token_hex(3)}"
        try:
            with redirect_stdout(sys.stderr):  # trackio prints instructions to stdout
                self._run = trackio.init(
                    project=project,
                    name=name,
                    space_id=space_id,
                    config=config.model_dump(mode="json"),
                    resume="allow" if known else "never",
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
        except Exception as error:  # trackio and huggingface_hub raise many kinds of errors
            way_out = "log in to the Hub, or remove space_id" if space_id else "set TRACKIO_DIR to a writable directory"
            raise CannotOpen(first_line(error), way_out) from error
        opening.remember("trackio", name)

    def write(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """Record the metrics of one step."""
        self._run.log({prefix + name: value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Wait until Trackio has stored all metrics."""
        with redirect_stdout(sys.stderr):
            self._run.finish()
