#!/usr/bin/env bash
# Run the test suite in a local environment: bash tests/run.sh [pytest arguments]
# PYTHON, VENV, CONSTRAINTS: see launch/environment.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS="test"
source launch/environment.sh
# Each rank is a process; with one thread per rank they do not compete for cores.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "$python" -m pytest "$@"
