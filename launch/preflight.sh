# shellcheck shell=bash disable=SC2154  # job.sh sets the variables that are not set here
# Functions for launch/job.sh that prepare and check the environment before the ranks start, so that a problem is
# reported in a single line, and not once by every rank.

# Run a site-specific command (`module load`, SITE_HOOK, or a file that defines `module`) without the shell options -e
# and -u. The command's code may then use unset variables, and continues after errors.
relaxed() {
  local code=0
  set +eu
  "$@"
  code=$?
  set -eu
  return "$code"
}

load_modules() {
  local file words
  if [[ -z ${MODULES:-} ]]; then return 0; fi
  for file in /etc/profile.d/{modules,lmod,z00_lmod}.sh "${MODULESHOME:-}/init/bash" "${LMOD_PKG:-}/init/bash"; do
    if ! type module &>/dev/null && [[ -f $file ]]; then relaxed source "$file" || true; fi
  done
  type module &>/dev/null || refuse \
    "MODULES=$MODULES: \`module\` does not exist on $MASTER_ADDR; in launch/site.env, source the file that defines it"
  read -r -a words <<<"$MODULES"
  relaxed module load "${words[@]}" ||
    refuse "MODULES=$MODULES: \`module load\` failed; list the modules of the nodes with \`module avail\`"
}

run_site_hook() {
  local file
  if [[ -z ${SITE_HOOK:-} ]]; then return 0; fi
  file=$SITE_HOOK
  if [[ $file != /* ]]; then file=${launch%/*}/$file; fi
  set -a
  if [[ $(type -t "$SITE_HOOK") == function ]]; then
    relaxed "$SITE_HOOK" || refuse "SITE_HOOK=$SITE_HOOK: the function failed with exit code $?"
  elif [[ -f $file ]]; then
    relaxed source "$file" || refuse "SITE_HOOK=$SITE_HOOK: the file failed with exit code $?"
  else
    refuse "SITE_HOOK=$SITE_HOOK: neither a function of launch/site.env nor a file; correct the name"
  fi
  set +a
}

# If there is no container, make the ranks run the engine of the clone that contains this script, whatever the working
# directory is.
use_clone() {
  local clone=${launch%/*}
  if [[ $CONTAINER != none ]]; then return 0; fi
  if [[ $PYTHON == */* && $PYTHON != /* ]]; then export PYTHON=$clone/$PYTHON; fi
  if [[ -d $clone/dpo_engine ]]; then
    export PYTHONPATH=$clone:$clone/kernels${PYTHONPATH:+:$PYTHONPATH}
  fi
}

preflight() {
  local said code=0 what=PYTHON=$PYTHON way_out
  way_out="set PYTHON in launch/site.env to the interpreter of an environment in which dpo-engine is installed"
  [[ -f $launch/task.sh ]] ||
    refuse "$launch/task.sh: does not exist; submit the script by its path in a complete clone"
  if [[ $CONTAINER != none ]]; then
    [[ -n $IMAGE ]] || refuse "IMAGE: must name the image when CONTAINER=$CONTAINER; set it in launch/site.env"
    if [[ $IMAGE == /* || $IMAGE == ./* || $IMAGE == *.sqsh || $IMAGE == *.sif ]] && [[ ! -e $IMAGE ]]; then
      refuse "IMAGE=$IMAGE: does not exist on $MASTER_ADDR; set IMAGE in launch/site.env to a file on shared storage"
    fi
    # With pyxis, only srun can start a container, and a test would import the image a second time.
    if [[ $CONTAINER == pyxis ]]; then return 0; fi
    type "$CONTAINER" &>/dev/null ||
      refuse "CONTAINER=$CONTAINER: is not a command on $MASTER_ADDR; set another CONTAINER in launch/site.env"
    what="IMAGE=$IMAGE, PYTHON=$PYTHON"
    way_out="in launch/site.env, set IMAGE to an image in which dpo-engine is installed, and PYTHON to the image's"
    way_out+=" interpreter"
  elif ! type "$PYTHON" &>/dev/null; then
    refuse "$what: does not exist on $MASTER_ADDR; $way_out"
  fi
  # Start the engine as a task does, but without GPUs, and with a verb that reads no files.
  said=$(DPO_EXIT_CODES='' LAUNCHER=srun SLURM_PROCID=0 SLURM_GPUS_ON_NODE=0 timeout 1800 bash "$launch/task.sh" config 2>&1 >/dev/null) || code=$?
  if ((code)); then
    said=$(grep -v '^[[:space:]]*$' <<<"$said" | tail -n 1) || said=
    refuse "$what: cannot start the engine on $MASTER_ADDR (${said:-exit code $code}); $way_out"
  fi
}

# Check the GPUs of every node. End the script if a node does not answer, or if launch/gpu_check.sh finds a problem.
check_gpus() {
  local said node line bad=()
  [[ -z $guessed ]] ||
    refuse "GPU_CHECK=1: \`scontrol show hostnames\` does not answer; submit the job again, or set GPU_CHECK=0"
  said=$(timeout --kill-after=10 "${GPU_CHECK_S:-120}" srun --overlap --kill-on-bad-exit=0 --ntasks-per-node=1 \
    "--ntasks=$SLURM_NNODES" bash "$launch/gpu_check.sh") || true
  for node in "${hosts[@]}"; do
    line=$(awk -v start="$node: " 'index($0, start) == 1' <<<"$said" | grep .) || line="$node: no answer within ${GPU_CHECK_S:-120} s"
    if [[ $line != "$node: ok" ]]; then
      say "GPU check: $line"
      bad+=("$node")
    fi
  done
  if ((${#bad[@]} == 0)); then return 0; fi
  if [[ ${EXCLUDE_ON_LOSS:-0} != 0 ]] && restartable; then
    requeue "these nodes failed the GPU check: ${bad[*]}" "the job starts on other nodes" "${bad[@]}"
  fi
  node=$(printf '%s,' "${bad[@]}")
  say "not requeued: these nodes failed the GPU check: ${bad[*]}; exclude them (sbatch --exclude=${node%,}), or set" \
    "EXCLUDE_ON_LOSS=1 in launch/site.env"
  exit 6
}
