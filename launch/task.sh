#!/usr/bin/env bash
# One task of launch/train.sbatch, started by srun on its node. It runs one rank of the engine (LAUNCHER=srun) or a
# torchrun that starts all ranks of the node, in a podman or docker container if CONTAINER is set to one of them.
set -euo pipefail

if [[ $LAUNCHER == torchrun ]]; then
  # By default, torchrun does not handle USR1: the signal would kill it and leave its workers running.
  command=("$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "$RANKS_PER_NODE"
    --node-rank "$SLURM_NODEID" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
    --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" -m dpo_engine train "$@")
else
  command=("$PYTHON" -m dpo_engine train "$@")
fi
if [[ $CONTAINER == none || $CONTAINER == pyxis ]]; then exec "${command[@]}"; fi

name=dpo-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$SLURM_PROCID
options=(--rm --name "$name" --network host --ipc host --workdir "$PWD")
read -r -a more <<<"$CONTAINER_OPTIONS"
options+=("${more[@]}")
IFS=, read -r -a volumes <<<"$MOUNTS"
for volume in "${volumes[@]}"; do options+=(--volume "$volume"); done
while read -r variable; do options+=(--env "$variable"); done < <(
  compgen -e | grep -E '^(SLURM|MASTER|CUDA|NCCL|UCX|FI|TORCH|OMP|HF|WANDB|MLFLOW|DPO)_|^PYTHONPATH$'
)
if ((${SLURM_GPUS_ON_NODE:-0})); then
  if [[ $CONTAINER == podman ]]; then options+=(--device nvidia.com/gpu=all); else options+=(--gpus all); fi
fi

# The container is not a child process of this step and survives if the client is killed, so remove it by name.
remove() {
  "$CONTAINER" kill "$name" >/dev/null 2>&1 || true
  "$CONTAINER" rm --force "$name" >/dev/null 2>&1 || true
}
trap remove EXIT
"$CONTAINER" run "${options[@]}" "$IMAGE" "${command[@]}" &
child=$!
trap 'kill -USR1 "$child" 2>/dev/null || true' USR1
# Slurm kills this shell KillWait seconds (30 by default) after TERM, so remove the container before that.
trap 'kill -TERM "$child" 2>/dev/null || true; (sleep "${REMOVE_AFTER_S:-20}" && remove) &' TERM
code=0
while :; do
  wait "$child" && code=0 || code=$?
  kill -0 "$child" 2>/dev/null || break
done
exit "$code"
