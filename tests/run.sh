#!/usr/bin/env bash
# Run the test suite in a local environment, on all cores: bash tests/run.sh [pytest arguments]
#
#   bash tests/run.sh                            the default suite
#   bash tests/run.sh -m "slow and not gpu"      the slow tests that need no GPU; -m "" runs all tests
#   bash tests/run.sh -n 0 tests/data            the tests in tests/data, in one process
#
# launch/environment.sh explains the variables PYTHON, VENV and CONSTRAINTS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS="test"
source launch/environment.sh
# Tests start ranks as processes. With one thread each, these processes compete less for the cores.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# Tests often wait for processes, so pytest starts one more worker than there are cores. If OMP_NUM_THREADS is set,
# nproc prints the value of OMP_NUM_THREADS instead of the number of cores.
cores=$(env -u OMP_NUM_THREADS nproc)
export PYTEST_XDIST_AUTO_NUM_WORKERS=${PYTEST_XDIST_AUTO_NUM_WORKERS:-$((cores + 1))}
# Without stored bytecode, each of the many processes that tests start would compile all sources again.
unset PYTHONDONTWRITEBYTECODE
exec "$python" -m pytest -n auto --dist worksteal "$@"
