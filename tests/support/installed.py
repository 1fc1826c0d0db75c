"""Programs that a test needs beyond Python packages: continue if present, otherwise skip with a reason."""

import os
import shutil
from typing import NoReturn

import pytest


def absent(what: str) -> NoReturn:
    """Skip the test; fail it if CI is ``true``, since `.ci/run` installs everything that can be missing."""
    if os.environ.get("CI") == "true":
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


def need(*programs: str) -> None:
    """Continue only if all of these programs are installed."""
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in programs if shutil.which(program, path=search) is None]
    if missing:
        absent(f"not installed: {', '.join(missing)} (.ci/run installs them)")
