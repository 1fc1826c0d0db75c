#!/usr/bin/env bash
# The test suite in a local environment, on all cores: bash tests/run.sh [pytest arguments]
#
#   bash tests/run.sh                            the default suite
#   bash tests/run.sh -m "slow and not gpu"      the heavier tests; -m "" runs all
#   bash tests/run.sh -n 0 tests/data            in one process
#
# PYTHON, VENV, CONSTRAINTS: see launch/environment.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS="test"
source launch/environment.sh
# Each rank is a process; with one thread per rank they do not compete for cores.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "$python" -m pytest -n auto --dist worksteal "$@"
