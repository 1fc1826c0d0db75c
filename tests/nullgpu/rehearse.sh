#!/usr/bin/env bash
# Rehearse benchmarks/gpu_day.sh on the null GPU: PYTHON=/path/to/python bash tests/nullgpu/rehearse.sh
#
# Every part of the benchmark runs with the same arguments and files as on a real GPU, but the numbers on the device are
# arbitrary (see rehearsal/). The rehearsal fails if a part fails, with one exception: in the part "trl", TRL's own
# process may fail. TRL selects tokens by masks on the device, so the shapes of its tensors depend on the arbitrary
# numbers.
#
# Triton compiles its kernels for the GPU's generation, and stores them in gpu-day/triton, where gpu_day.sh looks for
# them. Copy that folder to the machine with the GPU if that machine has the same versions of torch and Triton.
#
#   PYTHON       an interpreter, as in run.sh
#   PARTS        the parts to run, such as "stack kernels" (default: all)
#   SCALE        a factor for all time limits (default: 4, for machines with fewer cores than the GPU's machine)
#   SHAPE        a model to train in place of 1b and 7b-width; tiny makes the rehearsal short
#   NULLGPU_MIB  the GPU's memory in MiB (default: that of an H200)
#   NULLGPU_SM   the GPU's compute capability, times 10 (default: 90, as for an H200)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHON=${PYTHON:-python3} SCALE=${SCALE:-4} NULLGPU_MIB=${NULLGPU_MIB:-143771} NULLGPU_SM=${NULLGPU_SM:-90} NULLGPU_DEVICES=1
export PYTHONPATH=$PWD/tests/nullgpu/rehearsal:$PWD/tests/nullgpu HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# torch's profiler on a GPU needs CUPTI. The null GPU does not replace CUPTI, which would wait for a real driver.
export PYTEST_ADDOPTS="--deselect=tests/test_gpu.py::test_each_profiler_runs_on_a_gpu[torch-1]"
unset TRITON_INTERPRET
bash tests/nullgpu/build.sh
mkdir -p gpu-day/rehearsal
tests/nullgpu/nullgpu bash benchmarks/gpu_day.sh rehearsal | tee gpu-day/rehearsal/parts.txt
mv benchmarks/results/rehearsal.md gpu-day/rehearsal/
failed=$(grep -E '^[a-z]+ +[0-9]+ s  ' gpu-day/rehearsal/parts.txt | grep -v ' passed$' | awk '{ print $1 }' || true)
if grep -q '^run_trl.py exited' gpu-day/rehearsal/trl.log 2>/dev/null; then
  failed=$(grep -vx trl <<<"$failed" || true)
fi
if [[ $failed ]]; then
  echo "parts failed: ${failed//$'\n'/, }; their logs are in gpu-day/rehearsal" >&2
  exit 1
fi
echo "every part passed, except perhaps TRL's own process; the summary is gpu-day/rehearsal/rehearsal.md"
