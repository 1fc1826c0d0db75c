#!/usr/bin/env bash
# Build the null GPU and run its tests: PYTHON=/path/to/python bash tests/nullgpu/run.sh [pytest arguments]
#
#   PYTHON   an interpreter of an environment with a CUDA 13 build of torch, Triton, Megatron-Core and pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
PYTHON=$python bash tests/nullgpu/build.sh
export PYTHONPATH=$PWD:$PWD/kernels OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "$python" -m pytest -m nullgpu tests/nullgpu "$@"
