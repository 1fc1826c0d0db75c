"""Skip a test that needs a program that is not installed, and name the reason. In CI, fail the test instead."""

import os
import shutil
from typing import NoReturn

import pytest


def absent(what: str) -> NoReturn:
    """Skip the test. With ``CI=true`` in the environment, fail it instead, because `.ci/run` installs all programs."""
    if os.environ.get("CI") == "true":
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


def need(*programs: str) -> None:
    """If one of these programs is not installed, skip the test. In CI, fail the test instead."""
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in programs if shutil.which(program, path=search) is None]
    if missing:
        absent(f"not installed: {', '.join(missing)} (.ci/run installs them)")
