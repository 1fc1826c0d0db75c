"""Write the files of each evaluation of a run: results per pair, a summary, the tokens of some pairs, and a page."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol

from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError, DataError
from dpo_engine.platform.long_work import Meter, without_time_limit
from dpo_engine.reporting.comparison import report
from dpo_engine.reporting.page.write import PAGE, write_page
from dpo_engine.reporting.pair_file import write_evaluation, write_json
from dpo_engine.scoring.reference import Reference
from dpo_engine.training.callbacks import Run
from dpo_engine.training.evaluate import Evaluator, evaluation_path, judged_pairs
from dpo_engine.training.token_samples import sample_tokens


class EvaluatingRun(Run, Protocol):
    """A run that evaluates held-out pairs."""

    evaluator: Evaluator
    reference: Reference


def page_lines(config: Config) -> list[str]:
    """Return a list with one log line, which gives the path of the run's page or says that plotly is missing.

    If the page is turned off, the list is empty.
    """
    if not config.logging.page:
        return []
    if find_spec("plotly") is None:
        return [
            "page: not written, because plotly is missing; pip install 'dpo-engine[report]', or set logging.page=false"
        ]
    return [f"page: {config.train.output_dir}/{PAGE}, written at every evaluation"]


def record_evaluation(run: EvaluatingRun) -> None:
    """Write the files of the run's latest evaluation, and the run's page, according to the section ``logging``.

    If a file cannot be written, a line is logged and the run continues.

    *Collectives*: those of :func:`~dpo_engine.training.evaluate.judged_pairs`,
    :func:`~dpo_engine.training.token_samples.sample_tokens` and :func:`write_run_page`, and two all-gathers of objects
    over world. Writing has no time limit.
    """
    asked, engine, pairs = run.config.logging, run.engine, run.data.validation
    if not asked.page and not asked.token_samples:
        return
    evaluation = judged_pairs(engine, run.evaluator, pairs, run.step)
    path = evaluation_path(run.config, run.step)
    finite = not evaluation.not_finite()

    def write() -> None:
        write_evaluation(path, evaluation)
        if finite:
            write_json(path.with_suffix(".json"), report(evaluation))

    _on_first(run, write, f"writing {path}")
    if finite and asked.token_samples:
        count = min(asked.token_samples, len(pairs))
        try:
            sample_tokens(engine, run.trained.chunks, run.reference, pairs, evaluation, count=count, path=path)
        except ConfigError as error:  # raised on all ranks
            run.sinks.say(f"tokens: {error}; the run continues")
    write_run_page(run)


def write_run_page(run: Run) -> None:
    """Write the run's page, if ``logging.page`` is true and plotly is installed.

    *Collectives* over world: two all-gathers of objects if the page is written. Writing has no time limit.
    """
    if run.config.logging.page and find_spec("plotly") is not None:
        _on_first(run, lambda: write_page([run.output], run.output / PAGE), "writing the page")


def _on_first(run: Run, work: Callable[[], None], what: str) -> None:
    """Call ``work`` on rank 0. If a file cannot be read or written, log a line instead of ending the run.

    *Collectives* over world: two all-gathers of objects. ``work`` has no time limit.
    """

    def attempt() -> None:
        try:
            work()
        except (ConfigError, DataError, OSError) as error:
            run.sinks.say(f"{what}: {error}; the run continues")

    world = run.engine.groups.world
    without_time_limit(world, attempt if world.rank() == 0 else lambda: None, Meter(what))
