#!/usr/bin/env bash
# Measure the engine on one GPU within 15 minutes: bash benchmarks/gpu_day.sh [NAME]
#
# Every part has its own time limit. A part that fails or takes too long does not stop the next one. Each part writes a
# log to gpu-day/NAME/, and a section of benchmarks/results/NAME.md (default: gpu-day). Set PYTHON to choose the
# interpreter, PARTS to run only some parts ("stack kernels"), SCALE to lengthen all limits by a factor, and SHAPE to
# train another model than "1b" (see contest.py). Triton's cache is gpu-day/triton unless TRITON_CACHE_DIR is set;
# tests/nullgpu/rehearse.sh fills it on a machine without a GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
name=${1:-gpu-day}
python=${PYTHON:-python3}
logs=gpu-day/$name
summary=benchmarks/results/$name.md
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/gpu-day/triton}
mkdir -p "$logs"

# part NAME LIMIT_S COMMAND...: run a command, and note its result and its last lines in the summary.
part() {
  local part=$1 limit=$(($2 * ${SCALE:-1})) began=$SECONDS code
  shift 2
  [[ " ${PARTS:-$part} " == *" $part "* ]] || return 0
  timeout --kill-after=5 "$limit" "$@" >"$logs/$part.log" 2>&1 </dev/null &
  wait $!
  code=$?
  kill -KILL -- "-$!" 2>/dev/null # end processes that the part left running, which would disturb the next part
  local result="exit code $code"
  ((code == 0)) && result=passed
  ((code == 124 || code == 137)) && result="stopped after its limit of $limit s"
  printf '%-12s %4d s  %s\n' "$part" $((SECONDS - began)) "$result"
  # shellcheck disable=SC2016 # backquotes are Markdown
  {
    printf '## %s\n\n%s in %d s: `%s`\n\n```\n' "$part" "$result" $((SECONDS - began)) "$*"
    grep -v '^$' "$logs/$part.log" | tail -n 40 | cut -c1-200
    printf '```\n\n'
  } >>"$summary"
}

printf '# %s\n\n%s, commit %s\n\n' "$name" "$(date -u +%Y-%m-%d)" "$(git describe --always --dirty 2>/dev/null)" >"$summary"
part stack 120 "$python" -c '
import torch, importlib.metadata as m
print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30, "GiB")
print(*(f"{p} {m.version(p)}" for p in ("torch", "triton", "megatron-core", "transformers")))
try:
    import transformer_engine.pytorch as te
    x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    layer = te.Linear(128, 128, bias=False, params_dtype=torch.bfloat16, device="cuda")
    print("transformer_engine", m.version("transformer_engine"), "largest difference",
          float((layer(x) - x @ layer.weight.T).abs().max()))
except ImportError as error:
    print("transformer_engine: not usable:", error)
from dpo_engine.platform.device import describe_stack, open_platform
print(*describe_stack(open_platform(deterministic=True)), sep="\n")'
part kernels 120 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/kernels -x --tb=short
part head 60 "$python" benchmarks/head.py
part attention 90 "$python" benchmarks/attention.py --kv-heads 8 --pairs 127,62,52 200,288,288 669,94,116 2048,1024,1024 \
  --row 4 16 --tokens 16384 --backends varlen triton sdpa
part gradients 30 "$python" benchmarks/weight_gradient.py
part engine 150 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py --tb=short
part model 90 "$python" benchmarks/random_model.py "${SHAPE:-1b}" "$logs/model"
part train 150 "$python" benchmarks/compare_trl.py hh-like --model "$logs/model" --pairs 256 --global-batch-size 64 \
  --repeats 1 --trl --ours --ours batch.tokens_per_micro_batch=4096 \
  --ours batch.tokens_per_micro_batch=16384 --ours model.attention=triton
part trl 150 "$python" benchmarks/compare_trl.py hh-like --model "$logs/model" --pairs 256 --global-batch-size 64 \
  --repeats 1 --trl "no options" mb4 mb8
part memory 90 "$python" benchmarks/compare_trl.py helpsteer-like --model "$logs/model" --pairs 64 --global-batch-size 32 \
  --repeats 1 --trl --ours --ours model.recompute=selective --ours model.recompute=full
echo "wrote $summary"
