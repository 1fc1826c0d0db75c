"""Skip a test, or fail in CI, with the reason, if a program that the test needs is not installed."""

import os
import shutil
from typing import NoReturn

import pytest


def absent(what: str) -> NoReturn:
    """Skip the test, but fail if ``CI=true`` is in the environment: `.ci/run` installs everything that tests need."""
    if os.environ.get("CI") == "true":
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


def need(*programs: str) -> None:
    """Skip the test, or fail in CI, unless all of these programs are installed."""
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in programs if shutil.which(program, path=search) is None]
    if missing:
        absent(f"not installed: {', '.join(missing)} (.ci/run installs them)")
