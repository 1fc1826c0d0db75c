#!/usr/bin/env bash
# Create a small model, and align it with DPO on this machine's CPU, in a few minutes:
#
#   bash launch/quickstart.sh [a.b=c ...]
#
# This creates a virtual environment and a small task, runs DPO in 4 processes with TP 2 x PP 2, and shows the result.
# Overrides apply to examples/quickstart/run.yaml and can change the layout, for example: parallel.tp=1 parallel.pp=4
#
#   RANKS=8     number of processes. By default, the quickstart starts as many copies of the model as fit into 4
#               processes, but at least one. Several copies train with data parallelism.
#   PYTHON, VENV, CONSTRAINTS: see launch/environment.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS=${EXTRAS:-quickstart}
source launch/environment.sh

run=examples/quickstart/run.yaml
# Each rank is a process. One thread per process avoids oversubscribing the cores.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

# This command refuses wrong overrides, so it runs before the commands that write files.
started=$("$python" examples/quickstart/ranks.py "$run" "$@")
"$python" examples/quickstart/make_task.py --out runs/quickstart/task
read -r ranks output <<<"$started"
ranks=${RANKS:-$ranks}
# The quickstart's default output directory is removed, so that training starts at step 0. In another output directory,
# training resumes from the newest checkpoint.
if [[ $output == runs/quickstart/dpo ]]; then rm -rf "$output"; fi
"$python" -m dpo_engine check --world-size "$ranks" "$run" "$@"
"$python" -m dpo_engine.platform.torchrun --standalone --nproc-per-node "$ranks" -m dpo_engine train "$run" "$@"
"$python" examples/quickstart/show.py runs/quickstart/task "$output"
