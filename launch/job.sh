# shellcheck shell=bash disable=SC2154  # run.sbatch sets $launch, $this_job and $early
# The body of launch/run.sbatch, which sources this file in the submission directory. It runs in the batch shell, on the
# first node of the allocation. It starts the ranks with srun. It requeues the job if the ranks were interrupted. With
# EXCLUDE_ON_LOSS=1, it also requeues the job if nodes were lost or failed the GPU check, and excludes these nodes.
#
# Expects the variables $launch (the directory of this file), $this_job and $early, and the arguments [VERB] RUN.yaml
# [a.b=c ...]. Never returns.

# Find out whether the first argument is the verb; launch/task.sh explains the rule.
verb=train
if [[ ${1:-} =~ ^[a-z]+$ ]] && ! [[ -f $1 && ! -f ${2:-} ]]; then
  verb=$1
  shift
fi
arguments=("$@")
# Each rank appends its exit code to the file $DPO_EXIT_CODES. If the rank was interrupted before it made progress, a
# line "no-progress" follows. The launchers' own exit codes do not show whether the run was saved: srun returns the
# largest code of all ranks, even of ranks that it terminated itself (143); torchrun returns 1 after every failure.
export DPO_EXIT_CODES=$PWD/.dpo-engine-$SLURM_JOB_ID.exit
# The file $idle_starts has one line for each consecutive start that was interrupted before it made progress. The file
# survives a requeue.
idle_starts=$PWD/.dpo-engine-$SLURM_JOB_ID.idle

source "$launch/slurm.sh"
source "$launch/preflight.sh"
{ : >"$DPO_EXIT_CODES"; } 2>/dev/null ||
  refuse "$PWD: $DPO_EXIT_CODES cannot be written; submit the job from a writable directory"
trap on_warning USR1
trap on_exit EXIT
read_limit
read_hosts
if [[ -n $early ]]; then on_warning; fi

# With `set -a`, all settings reach the ranks, even if site.env does not export them.
set -a
if [[ -f $launch/site.env ]]; then
  bash -n "$launch/site.env" || refuse "$launch/site.env: is not valid bash code; correct it"
  # In site.env, variables may be unset and commands may fail. For example, the last line can be
  # `[[ -d /data ]] && MOUNTS=/data:/data`.
  set +eu
  source "$launch/site.env"
  set -eu
fi
: "${CONTAINER:=none}" "${IMAGE:=}" "${PYTHON:=python3}" "${LAUNCHER:=srun}"
if [[ $launch == "$PWD"/* ]]; then : "${MOUNTS:=$PWD:$PWD}"; else : "${MOUNTS:=$PWD:$PWD,$launch:$launch}"; fi
RANKS_PER_NODE=${SLURM_NTASKS_PER_NODE:?not set; pass --ntasks-per-node to sbatch}
MASTER_ADDR=${hosts[0]}
# The port is below the range of ephemeral ports, and usually differs between jobs that share a node.
: "${MASTER_PORT:=$((20000 + SLURM_JOB_ID % 12000))}"
# With a single queue, kernels run in the order of their launch. Megatron's overlap of communication requires this.
: "${CUDA_DEVICE_MAX_CONNECTIONS:=1}" "${OMP_NUM_THREADS:=1}"
# Without this variable, srun would pass no variables on if the job was submitted with --export=NONE.
export SLURM_EXPORT_ENV=ALL
set +a
load_modules
run_site_hook
use_clone

step=(srun --export=ALL --kill-on-bad-exit=1 --cpu-bind=none)
ranks="$SLURM_NNODES x $RANKS_PER_NODE ranks"
case $verb in
  check | plan | tokenize | inspect | compare | report | fetch | config | init | rehearse)
    # These verbs need a single process. rehearse starts the ranks itself, as processes on one node.
    if [[ $verb == check && $((SLURM_NNODES * RANKS_PER_NODE)) -gt 1 && " $*" != *" --world-size"* ]]; then
      arguments+=("--world-size=$((SLURM_NNODES * RANKS_PER_NODE))")
    fi
    export LAUNCHER=srun
    ranks="1 process"
    step+=(--nodes=1 --ntasks=1 --ntasks-per-node=1)
    ;;
  *)
    case $LAUNCHER in
      srun) step+=("--ntasks-per-node=$RANKS_PER_NODE") ;;
      torchrun) step+=("--ntasks-per-node=1" "--ntasks=$SLURM_NNODES") ;;
      *) refuse "LAUNCHER=$LAUNCHER: must be srun or torchrun" ;;
    esac
    ;;
esac
case $CONTAINER in
  none | podman | docker | apptainer) ;;
  pyxis)
    # Without --container-env, variables that the image sets would take precedence over those of the job.
    source "$launch/variables.sh"
    passed=$(container_variables | grep -v '^SLURM_' | paste -sd,)
    step+=("--container-image=$IMAGE" "--container-mounts=$MOUNTS" "--container-workdir=$PWD" "--container-env=$passed")
    ;;
  *) refuse "CONTAINER=$CONTAINER: must be none, pyxis, podman, docker or apptainer" ;;
esac
if [[ -n ${LOG_DIR:-} ]]; then
  mkdir -p "$LOG_DIR" 2>/dev/null ||
    refuse "LOG_DIR=$LOG_DIR: cannot be created; set another directory in launch/site.env"
  step+=("--output=$LOG_DIR/dpo-engine-$SLURM_JOB_ID.%t.log" --open-mode=append --label)
fi
read -r -a more <<<"${SRUN_OPTIONS:-}"
step+=("${more[@]}")

echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $ranks, $verb under $LAUNCHER," \
  "container $CONTAINER, $MASTER_ADDR:$MASTER_PORT"
warn_of_short_limit
preflight
if [[ ${GPU_CHECK:-0} != 0 ]]; then check_gpus; fi
if [[ $warned == yes ]]; then interrupted no-progress; fi
if [[ ${EXCLUDE_ON_LOSS:-0} != 0 ]]; then trap on_termination TERM; fi
"${step[@]}" bash "$launch/task.sh" "$verb" "${arguments[@]}" &
child=$!
# The warning may have arrived after $warned was tested above.
if [[ $warned == yes ]]; then warn_ranks; fi
# A trapped signal interrupts `wait`, but the step is still running.
while step_runs; do wait "$child" || true; done
wait "$child" && code=0 || code=$?
if ((code == 0)); then
  rm -f "$idle_starts"
  exit 0
fi

# The first exit code in the file shows the cause; later codes are consequences. If the file is empty, or the first code
# is 6 (another rank was lost or hangs), a rank may have been killed, or its node may have been lost.
first='' progress=''
{ read -r first && read -r progress; } <"$DPO_EXIT_CODES" || true
if [[ -n $first && $first != 0 ]]; then code=$first; fi
if ((code == 138)) && [[ -z $first && $warned == yes ]]; then
  # The warning killed processes that could not handle signals yet.
  interrupted no-progress
fi
if ((code == 75)); then interrupted "$progress"; fi
rm -f "$idle_starts"
if [[ -z $first || $first == 6 ]]; then await_requeue_after_loss; fi
say "not requeued: exit code $code; a job is requeued after exit code 75 (interrupted)"
exit "$code"
