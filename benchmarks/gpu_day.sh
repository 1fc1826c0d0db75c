#!/usr/bin/env bash
# Measure the engine on one GPU within 15 minutes: bash benchmarks/gpu_day.sh [NAME]
#
# Every part has its own time limit, and the most useful parts run first. All limits add up to at most 840 s. A part
# that fails or takes too long does not stop the next one. Each part writes a log to gpu-day/NAME/, and a section of
# benchmarks/results/NAME.md. The default NAME is gpu-day. Set PYTHON to choose the interpreter, PARTS to run only some
# parts ("stack kernels"), SCALE to lengthen all limits by a factor, and SHAPE to train a model of another shape instead
# of both "1b" and "7b-width" (see contest.py). Triton's cache is gpu-day/triton unless TRITON_CACHE_DIR is set.
# tests/nullgpu/rehearse.sh fills the cache on a machine without a GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
name=${1:-gpu-day}
python=${PYTHON:-python3}
logs=gpu-day/$name
summary=benchmarks/results/$name.md
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/gpu-day/triton}
mkdir -p "$logs"

# part NAME LIMIT_S COMMAND...: run a command, and write its result and its last lines to the summary.
part() {
  local part=$1 limit=$(($2 * ${SCALE:-1})) began=$SECONDS code
  shift 2
  [[ " ${PARTS:-$part} " == *" $part "* ]] || return 0
  timeout --kill-after=5 "$limit" "$@" >"$logs/$part.log" 2>&1 </dev/null &
  wait $!
  code=$?
  kill -KILL -- "-$!" 2>/dev/null # end processes that the part left running, because they would disturb the next part
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
part stack 60 "$python" benchmarks/stack.py
ours=() # without overrides, the engine uses Transformer Engine's layers if it is installed
grep -q '^transformer_engine: installed, but fails' "$logs/stack.log" 2>/dev/null && ours=(model.spec=native)
te=() # the backend that needs Transformer Engine
grep -q '^transformer_engine: [0-9]' "$logs/stack.log" 2>/dev/null && te=(te)
compare=("$python" benchmarks/compare_trl.py)
day=(--global-batch-size 64 --repeats 1 --model "$logs/model")
part kernels 90 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/kernels tests/model/test_attention_packages.py \
  -x --tb=short
part model 30 "$python" benchmarks/random_model.py "${SHAPE:-1b}" "$logs/model"
part train 120 "${compare[@]}" hh-like --pairs 256 "${day[@]}" --trl --ours "${ours[@]}" --ours model.spec=native \
  --ours "${ours[@]}" train.deterministic=false --ours "${ours[@]}" batch.tokens_per_micro_batch=16384 \
  --ours "${ours[@]}" model.cuda_graphs=true batch.layout=tree
part trl 120 "${compare[@]}" hh-like --pairs 256 "${day[@]}" --ours "${ours[@]}" --trl "no options" mb4 mb1
part engine 90 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py --tb=short \
  -k "resumes or patched or bf16 or torch or graphs_match"
part repeats 75 "$python" benchmarks/repeats.py "$logs/model" --ours "${ours[@]}"
part attention 55 "$python" benchmarks/attention.py --kv-heads 8 --pairs 127,62,52 200,288,288 2048,1024,1024 \
  --row 4 16 --tokens 16384 --backends varlen triton sdpa "${te[@]}"
part causal 25 "$python" benchmarks/causal.py
part head 35 "$python" benchmarks/head.py
part wide 20 "$python" benchmarks/random_model.py "${SHAPE:-7b-width}" "$logs/wide"
part width 50 "${compare[@]}" helpsteer-like --pairs 64 --global-batch-size 32 --repeats 1 --model "$logs/wide" --trl \
  --ours "${ours[@]}" --ours model.spec=native
part memory 55 "${compare[@]}" helpsteer-like --pairs 64 --global-batch-size 32 --repeats 1 --model "$logs/model" --trl \
  --ours "${ours[@]}" model.recompute=selective --ours "${ours[@]}" model.recompute=full
part gradients 15 "$python" benchmarks/weight_gradient.py
echo "wrote $summary"
