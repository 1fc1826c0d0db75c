# shellcheck shell=bash disable=SC2154  # job.sh sets the variables that are not set here
# Functions for launch/job.sh about Slurm: the time limit and its warning, requeues, and lost nodes. A busy controller
# answers a command with an error, or does not answer, so every command that must succeed is tried again.

child='' warned='' alarm='' began='' limit='' record='' excluded='' guessed=''
printf -v began '%(%s)T' -1

say() { echo "$*" >&2; }

refuse() { # message
  say "$1"
  exit 2
}

step_runs() { [[ -n $child ]] && kill -0 "$child" 2>/dev/null; }

# The script must not end while its step runs, because the ranks may still be saving.
on_exit() {
  while step_runs; do wait "$child" || true; done
  rm -f "${DPO_EXIT_CODES:-}"
  if [[ -n $alarm ]]; then kill "$alarm" 2>/dev/null || true; fi
}

# If the command does not end in time, timeout ends it with KILL. TERM would have no effect, because this script and its
# children ignore TERM while the job is requeued.
ask() { timeout --signal=KILL "${patience_s:-30}" "$@"; }

read_record() { record=$(ask scontrol show job "$this_job" 2>/dev/null) || record=; }

fact() { sed -n "/\b$1=/{s/.*\b$1=\([^ ]*\).*/\1/p;q}" <<<"$record"; } # name of a field in the job's record

seconds_left() { # until the time limit; prints nothing if there is no limit, or if it is unknown
  local end now
  read_record
  end=$(fact EndTime)
  end=$(date -d "${end:-unknown}" +%s 2>/dev/null) || end=${SLURM_JOB_END_TIME:-}
  printf -v now '%(%s)T' -1
  if [[ $end =~ ^[0-9]+$ ]]; then echo $((end - now)); fi
}

# Prints the number of seconds between Slurm's warning and the time limit. The number may be wrong if `sbatch --signal`
# was given on the command line, because Slurm does not report the value of this option.
warning_s() {
  local asked
  asked=${SBATCH_SIGNAL:-$(sed -n 's/^#SBATCH --signal=//p' "$0" 2>/dev/null)} || asked=
  if [[ $asked =~ @([0-9]+)$ ]]; then echo "${BASH_REMATCH[1]}"; else echo 300; fi
}

# Prints the number of seconds to reserve for the save if Slurm warns the job too early. This is a third of the limit,
# but at least a minute. If half of the limit is less than a minute, the minimum is half of the limit.
reserve_s() {
  local least=$((limit / 2 < 60 ? limit / 2 : 60))
  echo $((limit / 3 > least ? limit / 3 : least))
}

idle_count() { if [[ -f $idle_starts ]]; then wc -l <"$idle_starts"; else echo 0; fi; }

read_limit() { limit=$(patience_s=10 seconds_left); }

# Sets the array `hosts` to the job's nodes.
read_hosts() {
  local pause
  for pause in 1 5 0; do
    mapfile -t hosts < <(patience_s=10 ask scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null)
    if ((${#hosts[@]} > 0)); then return 0; fi
    sleep "$pause"
  done
  say "scontrol show hostnames: no answer; this node is assumed to be the job's first node"
  # shellcheck disable=SC2034
  guessed=yes
  hosts=("${SLURMD_NODENAME:-$(hostname)}") # this script runs on the first node
}

warn_of_short_limit() {
  local early
  early=$(warning_s)
  if saves && [[ -n $limit ]] && ((limit <= early + 30)); then # Slurm checks the limit every 30 s
    say "warning: the time limit leaves $limit s, but Slurm warns $early s before the limit, that is, at the" \
      "start; the ranks will be warned $(reserve_s) s before the limit; request more time (sbatch --time), or a later" \
      "warning (sbatch --signal)"
  fi
}

# If a job's limit is not longer than the warning time, Slurm warns the job as soon as it starts. If this warning were
# passed on at once, it would stop every start before the first step.
too_early() { # sets $left
  local now
  printf -v now '%(%s)T' -1
  # Late in the job, do not wait for an answer from the controller, which may be busy.
  if [[ -n $limit ]] && ((now - began > limit / 2)); then return 1; fi
  left=$(seconds_left)
  if [[ -z $left ]]; then return 1; fi
  limit=${limit:-$((left + now - began))}
  if ((left <= limit / 2 || left <= $(reserve_s))); then return 1; fi
  ((left <= $(warning_s) + 60 || ($(idle_count) > 0 && now - began < 90)))
}

saves() { [[ $verb == train || $verb == reference ]]; }

# Slurm sends a signal before the time limit and, if so configured, before preemption. Only the batch shell receives it.
on_warning() {
  local left wait_s
  if ! saves; then
    say "warned by Slurm: $verb has nothing to save, so it continues"
    return 0
  fi
  if [[ -z $warned ]]; then
    if too_early; then
      warned=deferred
      wait_s=$((left - $(reserve_s)))
      say "warned by Slurm $left s before the time limit: the ranks will be warned in $wait_s s"
      # A background subshell signals this shell. The subshell waits with `read`, because a sleep process would outlive
      # the job.
      { read -rt "$wait_s" <> <(:) || kill -USR1 $$; } &>/dev/null &
      alarm=$!
      return 0
    fi
  fi
  if [[ $warned != yes ]]; then
    warned=yes
    if step_runs; then warn_ranks; fi
  fi
}

warn_ranks() {
  local said pause again rest
  for pause in 1 2 4 8 15 30 60 0; do
    if said=$(patience_s=10 ask scancel --signal=USR1 "$this_job" 2>&1); then
      say "warned by Slurm: the ranks finish their step and save"
      return 0
    fi
    if ! step_runs; then return 0; fi
    again=""
    if ((pause)); then again="; scancel is tried again in $pause s"; fi
    say "scancel: ${said:-no answer}; srun signals the ranks without the controller$again"
    # The ranks ignore all signals after the first, so they can be signaled in both ways.
    kill -USR1 "$child" 2>/dev/null || true
    for ((rest = pause; rest > 0; rest--)); do
      if step_runs; then sleep 1; fi
    done
  done
}

submit_again() {
  local words
  printf -v words '%q ' "$launch/run.sbatch" "$verb" "${arguments[@]}"
  echo "to continue, submit the job again with the same options: sbatch --nodes=$SLURM_NNODES" \
    "--ntasks-per-node=$RANKS_PER_NODE ... ${words% }"
}

# Ends the script after an interruption: requeues the job, or logs why the job is not requeued.
interrupted() { # "no-progress" if nothing was saved since this start
  local what="interrupted and saved" how starts
  how=$(next_start)
  if [[ ${1:-} == no-progress ]]; then
    what="interrupted before any progress" how="the job starts again"
    echo "start $((${SLURM_RESTART_COUNT:-0} + 1))" >>"$idle_starts"
  else
    rm -f "$idle_starts"
  fi
  starts=$(idle_count)
  if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_RESTARTS:-50})); then
    rm -f "$idle_starts"
    say "not requeued: $what, but the number of restarts is already ${SLURM_RESTART_COUNT:-0} (MAX_RESTARTS); $(submit_again)"
    exit 75
  fi
  if ((starts >= ${MAX_IDLE_STARTS:-3})); then
    rm -f "$idle_starts"
    say "not requeued: the number of consecutive starts without progress is already $starts (MAX_IDLE_STARTS);" \
      "request more time (sbatch --time), or a later warning (sbatch --signal=B:USR1@SECONDS); $(submit_again)"
    exit 75
  fi
  requeue "$what" "$how"
}

# A job that was requeued is COMPLETING until all of its processes have ended, and then PENDING.
was_requeued() {
  local restarts
  restarts=$(fact Restarts)
  [[ $(fact JobState) == PENDING ]] || ((${restarts:-0} > ${SLURM_RESTART_COUNT:-0}))
}

# Prints how the job continues after a requeue.
next_start() {
  case $verb in
    train) echo "the job continues from its newest checkpoint" ;;
    reference) echo "the job continues where it stopped" ;;
    *) echo "the job starts again" ;;
  esac
}

# Requeues the job and ends the script. If the job cannot be requeued, the exit code is 75.
requeue() { # what happened, how the job continues, nodes to exclude from the next start
  local said state pause tries=0
  # Slurm terminates this script as soon as the job is requeued.
  trap '' TERM USR1
  while :; do
    read_record
    state=$(fact JobState)
    if was_requeued; then state=PENDING; fi
    case $state in
      PENDING | REQUEUED | REQUEUE_HOLD) # requeued by Slurm (preemption), or by an earlier try that got no answer
        say "requeued: $1; $2"
        exclude "${@:3}"
        exit 0
        ;;
      "" | RUNNING | SUSPENDED) ;;
      *)
        say "not requeued: $1, but the job is $state; $(submit_again)"
        exit 75
        ;;
    esac
    if [[ $(fact Requeue) == 0 ]]; then
      say "not requeued: $1, but Slurm must not requeue this job (--no-requeue, or JobRequeue=0 in slurm.conf);" \
        "$(submit_again)"
      exit 75
    fi
    if said=$(ask scontrol requeue "$this_job" 2>&1); then
      say "requeued: $1; $2"
      exclude "${@:3}"
      exit 0
    fi
    tries=$((tries + 1))
    if ((tries >= 20)) || [[ ${said,,} == *denied* || ${said,,} == *disabled* ]]; then
      say "not requeued: $1, but scontrol failed: ${said:-no answer}; $(submit_again)"
      exit 75
    fi
    pause=$((tries < 6 ? 1 << (tries - 1) : 30))
    say "$1; scontrol requeue: ${said:-no answer}; trying again in $pause s"
    sleep "$pause"
  done
}

# Adds nodes to the list of nodes that Slurm must not choose for this job. Slurm allows this only for a pending job.
exclude() { # nodes
  local said nodes try
  if (($# == 0)) || [[ $excluded == "$*" ]]; then return 0; fi
  read_record
  nodes=$(fact ExcNodeList)
  nodes=$(printf '%s,' "${nodes/#(null)/}" "$@" | sed 's/^,*//; s/,*$//')
  for try in 1 2 3 4 5; do
    if said=$(ask scontrol update "JobId=$this_job" "ExcNodeList=$nodes" 2>&1); then
      excluded=$*
      say "excluded from the next start: $*"
      return 0
    fi
    sleep "$try"
  done
  say "not excluded: $*; scontrol update: ${said:-no answer}"
}

restartable() { ((${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-50})); }

# If Slurm itself requeues the job, it sends SIGTERM to this script, and SIGKILL after KillWait seconds. Before SIGKILL,
# exclude the nodes that are down.
on_termination() {
  local lost
  read_record
  mapfile -t lost < <(down_nodes)
  if was_requeued; then exclude "${lost[@]}"; fi
}

# If a node is lost, Slurm requeues the job as soon as it notices the loss, but only if the job still exists. Therefore,
# this script must wait.
await_requeue_after_loss() {
  local lost=() probe
  timeout --signal=KILL 60 srun --overlap --ntasks-per-node=1 "--ntasks=$SLURM_NNODES" true &
  probe=$!
  while [[ ${EXCLUDE_ON_LOSS:-0} != 0 && ${#lost[@]} == 0 ]] && kill -0 "$probe" 2>/dev/null; do
    sleep 1 || true
    mapfile -t lost < <(down_nodes)
  done
  if ((${#lost[@]} > 0)); then
    kill "$probe" 2>/dev/null || true
  else
    if wait "$probe"; then return 0; fi
    if [[ ${EXCLUDE_ON_LOSS:-0} != 0 ]]; then mapfile -t lost < <(silent_nodes); fi
  fi
  # If no node answers, the cause is probably not a lost node.
  if ((${#lost[@]} > 0 && ${#lost[@]} < SLURM_NNODES)) && restartable; then
    requeue "these nodes did not answer: ${lost[*]}" "$(next_start)" "${lost[@]}"
  fi
  trap - TERM
  say "a node does not answer: waiting for Slurm to requeue the job"
  sleep "${NODE_LOSS_WAIT_S:-600}" &
  wait $!
}

down_nodes() { # according to Slurm; an asterisk after the state means that the node does not respond
  ask sinfo --noheader --Node "--nodes=$SLURM_JOB_NODELIST" --format="%N %t" 2>/dev/null |
    sed -n '/ .*\(down\|fail\|\*\)/s/ .*//p' | sort -u
}

answers() { # node
  timeout --signal=KILL 60 srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 "--nodelist=$1" true &>/dev/null
}

silent_nodes() { # prints the nodes that do not answer a job step
  local node started=0
  for node in "${hosts[@]}"; do
    { answers "$node" || echo "$node"; } &
    started=$((started + 1))
    if ((started % 64 == 0)); then wait; fi
  done
  wait
}
