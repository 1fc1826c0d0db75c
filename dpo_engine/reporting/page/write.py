"""Write the page of one or several runs: a single HTML file that makes no network requests."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2

from dpo_engine.errors import ConfigError
from dpo_engine.reporting.page.charts import SPEED, Judged, curves, held_out, summary_line, training_time
from dpo_engine.reporting.page.compared import comparison
from dpo_engine.reporting.page.foreign import breakable, visible
from dpo_engine.reporting.page.measures import Measures, signed
from dpo_engine.reporting.page.pair_charts import pair_charts
from dpo_engine.reporting.page.pair_table import flips, pair_rows
from dpo_engine.reporting.page.run_files import names_of, read_run
from dpo_engine.reporting.page.settings import differing, rank_grid, settings
from dpo_engine.reporting.page.verdict import findings
from dpo_engine.reporting.pair_file import write_file
from dpo_engine.version import __version__
from dpo_engine.wording import clock

PAGE = "report.html"
"""Name of the page in the directory of a run."""


def write_page(directories: Sequence[str | Path], to: str | Path) -> None:
    """Write the page of runs to a file, atomically.

    directories   train.output_dir of each run; the runs may still be in progress

    Raises :class:`~dpo_engine.errors.ConfigError` if a directory does not contain a run, if plotly is missing, or if
    the file cannot be written.
    """
    write_file(Path(to), page(read_runs(directories)).encode())


def read_runs(directories: Sequence[str | Path]) -> list[Judged]:
    """Read runs, with the measures of their newest evaluations.

    Raises :class:`~dpo_engine.errors.ConfigError` if a directory does not contain a run.
    """
    paths = [Path(directory) for directory in directories]
    runs = [read_run(path, visible(name, 80)) for path, name in zip(paths, names_of(paths), strict=True)]
    return [Judged(run, Measures.of(run)) for run in runs]


def page(judged: Sequence[Judged]) -> str:
    """Return the page as HTML. Raises :class:`~dpo_engine.errors.ConfigError` if plotly is missing."""
    runs = [run for run, _ in judged]
    plotly = plotly_script()
    script = _part("page.js")
    charts = {
        "curves": list(curves(judged)),
        "held": list(held_out(judged)),
        "pairs": list(pair_charts(judged)),
        "speed": list(curves(judged, SPEED)),
    }
    rows = pair_rows(judged)
    data = {"charts": charts, "pairs": rows, "flips": flips(judged), "runs": [run.name for run in runs]}
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"visible": visible, "breakable": breakable, "signed": signed}
    environment.filters["plain"] = lambda value: signed(value).removeprefix("+")
    return environment.from_string(_part("page.html")).render(
        policy=f"'sha256-{_hash(script)}' 'sha256-{_hash(plotly)}'",
        style=jinja2.utils.markupsafe.Markup(_part("page.css")),
        script=jinja2.utils.markupsafe.Markup(script),
        plotly=_packed_plotly(),
        data=_packed(json.dumps(data, allow_nan=False, separators=(",", ":"))),
        title=" and ".join(run.name for run in runs),
        runs=[_facts(item) for item in judged],
        charts=charts,
        marks={mark["kind"] for chart in (*charts["curves"], *charts["speed"]) for mark in chart["marks"]},
        pairs=len(rows),
        comparisons=[comparison(judged[0], other) for other in judged[1:]],
        differing=differing(runs) if len(runs) > 1 else [],
        referred=any(run.has_reference for run in runs),
        free=not all(run.has_reference for run in runs),
        reload=len(runs) == 1 and runs[0].running,
        written=f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        version=__version__,
    )


def _facts(item: Judged) -> dict[str, Any]:
    """Return the values that the template shows for a run."""
    run, measures = item
    loss, beta = (visible(str(run.get(f"loss.{key}", "")), 40) for key in ("name", "beta"))
    lines = [f"step {run.step:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")]
    lines += [f"{loss}, beta {beta}" if beta else loss] if loss else []
    lines += [visible(str(run.get("model.path")), 200)] if run.get("model.path") else []
    if (took := training_time(run)) is not None and math.isfinite(took):
        lines.append(f"{clock(took)} of training")
    return {
        "name": run.name,
        "directory": visible(str(run.directory), 300),
        "facts": lines,
        "findings": findings(run, measures),
        "summary": summary_line(item),
        "problems": [visible(problem, 400) for problem in run.problems],
        "no_tokens": visible(run.no_tokens, 1000),
        "settings": settings(run),
        "grid": rank_grid(run.layout),
    }


@cache
def plotly_script() -> str:
    """Return plotly's script. Raises :class:`~dpo_engine.errors.ConfigError` if plotly is not installed."""
    if find_spec("plotly") is None:
        raise ConfigError("report: needs plotly for its charts; pip install 'dpo-engine[report]', or pass --text")
    return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def _part(name: str) -> str:
    return (files("dpo_engine.reporting.page") / name).read_text(encoding="utf-8")


@cache
def _packed_plotly() -> str:
    return _packed(plotly_script())


def _packed(text: str) -> str:
    """Compress text for a browser's DecompressionStream, and encode it in base64, which needs no escapes in HTML."""
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _hash(text: str) -> str:
    """Return the hash of a script, for the page's content security policy."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
