#!/usr/bin/env bash
# Print "NODE: ok", or "NODE: " and the first problem with this node's GPUs: a GPU is missing or must not be used, or
# nvidia-smi fails. If GPU_CHECK=1, launch/job.sh runs this script on every node before the ranks start.
set -uo pipefail

node=${SLURMD_NODENAME:-$(hostname -s)}

bad() {
  echo "$node: $*"
  exit 0
}

query() { # an option of nvidia-smi; there is a time limit, because a broken driver may never answer
  timeout --kill-after=5 30 nvidia-smi "$1" --format=csv,noheader,nounits 2>&1
}

type nvidia-smi &>/dev/null || bad "nvidia-smi does not exist"
said=$(query --query-gpu=index,ecc.errors.uncorrected.volatile.total) || bad "nvidia-smi failed: ${said##*$'\n'}"
found=$(grep -c '^[0-9]' <<<"$said")
expected=${SLURM_GPUS_ON_NODE:-$found}
((found >= expected)) || bad "$found of $expected GPUs answer"
((found > 0)) || bad "no GPU answers"
while IFS=', ' read -r gpu errors; do
  # GPUs without error correction answer [N/A].
  if [[ $errors =~ ^[0-9]+$ ]] && ((errors > 0)); then bad "GPU $gpu has uncorrected memory errors: $errors"; fi
done <<<"$said"
# Older GPUs and drivers do not support this query.
if said=$(query --query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure); then
  while IFS=', ' read -r gpu pending failed; do
    if [[ $failed == 1 || ${failed,,} == yes ]]; then bad "GPU $gpu could not replace a faulty memory row"; fi
    if [[ $pending == 1 || ${pending,,} == yes ]]; then bad "GPU $gpu must be reset to replace a memory row"; fi
  done <<<"$said"
fi
echo "$node: ok"
