#!/usr/bin/env bash
# The test suite in a local environment, on all cores: bash tests/run.sh [pytest arguments]
#
#   bash tests/run.sh -m "not slow and not gpu"      the default suite
#   bash tests/run.sh -n 0 tests/slurm               one after another, for tests that share a cluster
#
# PYTHON, VENV, CONSTRAINTS: see launch/environment.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS="test"
source launch/environment.sh
# Ranks are processes: with one thread each they do not fight for the cores.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "$python" -m pytest -n auto --dist worksteal "$@"
