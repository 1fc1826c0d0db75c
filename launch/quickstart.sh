#!/usr/bin/env bash
# From nothing to an aligned model on this machine's CPU, in a few minutes:
#
#   bash launch/quickstart.sh [a.b=c ...]
#
# makes a local environment and a small task, runs DPO on 4 processes as TP2 x PP2, and shows what it did.
# Overrides go to the run (examples/quickstart/run.yaml), the layout among them: parallel.tp=1 parallel.pp=4
#
#   RANKS=8     processes     (default: 4, or as many as the layout needs; what a layout leaves over is data parallel)
#   PYTHON, VENV, CONSTRAINTS: see launch/environment.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS=${EXTRAS:-quickstart}
source launch/environment.sh

run=examples/quickstart/run.yaml
# Each rank is a process; with one thread each they do not fight for the cores.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

"$python" examples/quickstart/make_task.py --out runs/quickstart/task
started=$("$python" examples/quickstart/ranks.py "$run" "$@")
read -r ranks output <<<"$started"
ranks=${RANKS:-$ranks}
"$python" -m dpo_engine check --world-size "$ranks" "$run" "$@"

# The quickstart starts at step 0 each time; a run of your own continues from its newest checkpoint instead.
if [[ $output == runs/quickstart/dpo ]]; then rm -rf "$output"; fi
"$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m dpo_engine train "$run" "$@"
"$python" examples/quickstart/show.py runs/quickstart/task "$output"
