"""Check that the engine and its kernels match, set the variables that libraries need, and speed up large imports."""

from __future__ import annotations

import gc
import getpass
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from dpo_engine.errors import ConfigError
from dpo_engine.version import __version__

HERE = Path(__file__).resolve().parent


def check_installation() -> None:
    """Check that the engine and its kernels (``dpo_kernels``) are from the same installation and have the same version.

    In a clone, ``python -m dpo_engine`` imports the engine from the current directory. Without ``kernels/`` on
    ``PYTHONPATH``, Python would import the installed kernels, which may have another version. The check does not import
    the kernels.

    Raises :class:`~dpo_engine.errors.ConfigError` if the kernels are missing, are from another installation, or have
    another version.
    """
    spec = find_spec("dpo_kernels")
    kernels = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
    installed, cloned = HERE.parent / "dpo_kernels", HERE.parent / "kernels" / "dpo_kernels"
    if kernels is None:
        problem = "not found"
    elif kernels not in (installed, cloned):
        problem = f"{kernels} belongs to another installation"
    elif (version := _version(kernels / "version.py")) != __version__:
        problem = f"{kernels} has version {version}"
    else:
        return
    way_out = "install the package again, and remove directories with older files from PYTHONPATH"
    if cloned.is_dir() and kernels != cloned:
        way_out = f"set PYTHONPATH={HERE.parent}:{cloned.parent}, or start the installed engine from another directory"
    raise ConfigError(f"dpo_kernels: {problem} (the engine is {HERE}, version {__version__}); {way_out}")


def _version(file: Path) -> str:
    """Return the version in ``version.py`` of the kernels, or ``unknown`` if there is no such file or version."""
    try:
        words = file.read_text(encoding="utf-8").split()
        return words[words.index("__version__") + 2].strip("\"'")
    except (OSError, ValueError, IndexError):
        return "unknown"


def prepare_for_user() -> None:
    """Set environment variables that libraries need if the user ID has no name or no writable home directory.

    Containers often run with such a user ID. torch and Triton then fail when they compile, because their caches are in
    directories named after the user, or in the home directory. Variables that are already set keep their values.
    """
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # no entry in the password database
        name = os.environ["USER"] = f"uid{os.getuid()}"
    home = os.path.expanduser("~")
    if not (os.path.isdir(home) and os.access(home, os.W_OK)):
        os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"triton_{name}"))


@contextmanager
def importing() -> Iterator[None]:
    """Disable garbage collection inside a ``with`` block that imports modules.

    Collections during the imports would take a fifth of the import time. At the end of the block, all objects that
    exist are exempted from later collections, which would otherwise scan the imported objects again and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
