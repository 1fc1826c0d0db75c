#!/usr/bin/env bash
# Run one task of a Slurm job. srun starts this script on the task's node:
#
#   bash launch/task.sh [VERB] RUN.yaml [a.b=c ...]
#
# The task runs one rank of the engine (LAUNCHER=srun), or a torchrun that starts all ranks of the node. If CONTAINER is
# podman, docker or apptainer, the task runs the rank or torchrun in a container. With pyxis, this script already runs
# in the container. The first argument is the verb if it is a single lowercase word. There is one exception: if the
# first argument names a file and the second does not, the first is the run's file. Without a verb, the engine trains.
# The engine itself refuses unknown verbs.
set -euo pipefail

if ! [[ ${1:-} =~ ^[a-z]+$ ]] || [[ -f $1 && ! -f ${2:-} ]]; then set -- train "$@"; fi
container=${CONTAINER:-none}
# If the home directory is mounted, the user's packages there must not be mixed with those of the image.
if [[ $container != none ]]; then export PYTHONNOUSERSITE=${PYTHONNOUSERSITE:-1}; fi

if [[ ${LAUNCHER:-srun} == torchrun ]]; then
  nodes=(--nnodes "$SLURM_NNODES" --nproc-per-node "$RANKS_PER_NODE")
  read -r -a asked <<<"${TORCHRUN_OPTIONS:-}"
  if [[ " ${asked[*]} " =~ \ --rdzv[-_]backend[=\ ]c10d\  ]]; then
    host=false
    if ((SLURM_NODEID == 0)); then host=true; fi
    nodes+=(--rdzv-id "dpo-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT"
      --rdzv-conf "is_host=$host")
  else
    nodes+=(--node-rank "$SLURM_NODEID" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
  fi
  # Unlike torchrun itself, this module gives the ranks time to save after a signal, and also handles USR1.
  command=("$PYTHON" -m dpo_engine.platform.torchrun "${nodes[@]}" "${asked[@]}" -m dpo_engine "$@")
else
  command=("$PYTHON" -m dpo_engine "$@")
fi
case $container in
  none | pyxis) exec "${command[@]}" ;;
  podman | docker | apptainer) ;;
  *) echo "CONTAINER=$container: must be none, pyxis, podman, docker or apptainer" >&2 && exit 2 ;;
esac

source "$(dirname "${BASH_SOURCE[0]}")/variables.sh"
names=$(container_variables)
mapfile -t passed <<<"$names"

if [[ $container == apptainer ]]; then
  # Apptainer passes the environment, but the image may set the same variables. With this prefix, the variables of the
  # job override them.
  for variable in "${passed[@]}"; do export "APPTAINERENV_$variable=${!variable-}"; done
  read -r -a more <<<"${CONTAINER_OPTIONS-}"
  exec apptainer exec --nv --bind "$MOUNTS" --pwd "$PWD" "${more[@]}" "$IMAGE" "${command[@]}"
fi

name=dpo-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$SLURM_PROCID
options=(--rm --name "$name" --network host --ipc host --workdir "$PWD")
IFS=, read -r -a volumes <<<"$MOUNTS"
home=
for volume in "${volumes[@]}"; do
  options+=(--volume "$volume")
  IFS=: read -r from to _ <<<"$volume"
  # If the home directory is mounted at its own path, `~` must mean the same directory as on the host.
  if [[ $from == "$to" && ${HOME:-/}/ == "${to%/}"/* ]]; then home=${HOME:-}; fi
done
for variable in "${passed[@]}"; do options+=(--env "$variable"); done
if [[ $container == docker ]]; then
  # Without --user, docker would write all output as root. Podman needs no --user: rootless podman maps root to the user
  # who starts the container.
  options+=(--user "$(id -u):$(id -g)")
  for group in $(id -G); do options+=(--group-add "$group"); done
  home=${home:-/tmp}
fi
if [[ -n $home ]]; then options+=(--env "HOME=$home"); fi
if ((${SLURM_GPUS_ON_NODE:-0})); then
  if [[ $container == podman ]]; then options+=(--device nvidia.com/gpu=all); else options+=(--gpus all); fi
fi
# InfiniBand pins memory, which the default limit on locked memory does not allow.
read -r -a more <<<"${CONTAINER_OPTIONS---ulimit memlock=-1}"
options+=("${more[@]}")

# The container is not a child process of this step. It survives if the podman or docker command is killed. Therefore,
# remove the container by name.
remove() {
  "$container" kill "$name" >/dev/null 2>&1 || true
  "$container" rm --force "$name" >/dev/null 2>&1 || true
}
trap remove EXIT
"$container" run "${options[@]}" "$IMAGE" "${command[@]}" &
child=$!
trap 'kill -USR1 "$child" 2>/dev/null || true' USR1
# After TERM, Slurm waits KillWait seconds (default: 30) and then kills this shell, so remove the container before that.
trap 'kill -TERM "$child" 2>/dev/null || true; (sleep "${REMOVE_AFTER_S:-20}" && remove) &' TERM
code=0
while :; do
  wait "$child" && code=0 || code=$?
  kill -0 "$child" 2>/dev/null || break
done
exit "$code"
