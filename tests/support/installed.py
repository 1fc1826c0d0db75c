"""What a test needs of the machine beyond Python packages: there, or a skip that says what is not."""

import os
import shutil
from typing import NoReturn

import pytest


def absent(what: str) -> NoReturn:
    """Skip the test; where the variable CI is ``true`` it fails, since `.ci/run` installs all that can be missing."""
    if os.environ.get("CI") == "true":
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


def need(*programs: str) -> None:
    """Go on only where all of these programs are installed."""
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in programs if shutil.which(program, path=search) is None]
    if missing:
        absent(f"not installed: {', '.join(missing)} (.ci/run installs them)")
