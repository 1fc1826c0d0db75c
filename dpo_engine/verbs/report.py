"""``dpo-engine report``: show what runs have learned, as a page for a browser or on the terminal."""

from collections.abc import Sequence
from pathlib import Path

from dpo_engine.errors import ConfigError
from dpo_engine.reporting.page.write import PAGE, plotly_script, read_runs, write_page
from dpo_engine.verbs import console


def report(directories: Sequence[str | Path], *, to: str | Path | None = None) -> Path:
    """Write a page about runs: verdict, curves, held-out pairs token by token, speed, and settings.

    directories  train.output_dir of one or several runs, which can still be running
    to           HTML file to write; None: ``report.html``, in the run's directory or, for several runs, in the current
                 directory

    Returns  the path of the page

    Raises :class:`~dpo_engine.errors.ConfigError` if a directory does not contain a run, if plotly is missing, or if
    the file has no suffix .html or .htm, or cannot be written.
    """
    path = Path(to) if to is not None else Path(directories[0], PAGE) if len(directories) == 1 else Path(PAGE)
    if path.suffix not in (".html", ".htm"):
        raise ConfigError(f"--to={path}: must end with .html; pass --to FILE.html")
    plotly_script()
    write_page(directories, path)
    return path


def report_as_text(directories: Sequence[str | Path]) -> None:
    """Print the verdict, tables and curves of runs on the terminal. Needs no plotly.

    Raises :class:`~dpo_engine.errors.ConfigError` if a directory does not contain a run.
    """
    from dpo_engine.reporting.page.text import show_runs

    show_runs(read_runs(directories), console.terminal())
