"""Tests of the quickstart's script without training. `test_user.py` runs the whole script."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_wrong_override_is_refused_before_the_task_is_made(tmp_path):
    for name in ("launch", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    settings = {**os.environ, "PYTHONPATH": paths, "VENV": "none", "PYTHON": sys.executable}
    command = ["bash", str(tmp_path / "launch/quickstart.sh"), "optim.lrr=1"]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, "optim.lrr=1: no such key; did you mean optim.lr?\n")
    assert not (tmp_path / "runs").exists()
