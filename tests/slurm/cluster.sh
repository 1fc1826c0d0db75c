#!/usr/bin/env bash
# Run a real Slurm cluster of two nodes on this machine, for tests. The cluster runs as root, needs neither systemd nor
# cgroups, and writes nothing to /etc.
#
#   cluster.sh install     install the necessary Debian packages
#   cluster.sh start       start the controller and the nodes, unless they are running; restart lost nodes
#   cluster.sh env         print a command that lets sbatch find the cluster; usage: eval "$(cluster.sh env)"
#   cluster.sh status      print one line for each daemon, and then Slurm's list of the nodes
#   cluster.sh lose NODE   kill all processes of the node at once, as in a power failure
#   cluster.sh stop        cancel all jobs, and end all processes that this script has started
#
# A node consists of namespaces (network, mount and host name) and has its own address, so MASTER_ADDR and ports behave
# as on two machines. The state of a cluster is in CLUSTER_DIR. Clusters in different directories can run at the same
# time. `start` exits with 77 if this machine cannot run a cluster, and with 78 if packages are missing.
set -euo pipefail

dir=${CLUSTER_DIR:-${TMPDIR:-/tmp}/dpo-engine-cluster}
nodes=(n1 n2)
programs=(slurmctld slurmd sbatch munged ip)
packages=(slurmctld slurmd slurm-client munge iproute2)

name=dpo$(($(cksum <<<"$dir" | cut -d ' ' -f 1) % 10000))
export SLURM_CONF=$dir/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

say() { printf '%s\n' "$*" >&2; }

give_up() { # exit code, reason
  say "no Slurm cluster: $2"
  exit "$1"
}

missing() {
  local program
  for program in "${programs[@]}"; do command -v "$program" >/dev/null || printf '%s ' "$program"; done
}

requirements() {
  [[ $(uname) == Linux ]] || give_up 77 "Linux is required"
  ((EUID == 0)) || give_up 77 "root is required to create the namespaces that act as nodes"
  local absent
  absent=$(missing)
  [[ -z $absent ]] || give_up 78 "not installed: ${absent}(to install: bash tests/slurm/cluster.sh install)"
  # shellcheck disable=SC2016
  unshare --net --mount --uts sh -c 'ip link add one type bridge && ip link add two type veth peer name three &&
    mount --bind /etc/hosts /etc/hosts && hostname node' 2>/dev/null ||
    give_up 77 "namespaces, bridges or mounts are not allowed here (CAP_SYS_ADMIN, CAP_NET_ADMIN)"
}

install() {
  [[ -n $(missing) ]] || return 0
  local root=()
  ((EUID == 0)) || root=(sudo -n)
  "${root[@]}" apt-get update -qq
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
}

alive() { [[ -s $1 ]] && kill -0 "$(<"$1")" 2>/dev/null; }

# 198.18/15 is reserved for network tests and is not routed. At its first start, a cluster chooses the first free
# subnet, which it also uses after restarts. The lock prevents two clusters from choosing the same subnet.
choose_addresses() {
  mkdir -p "$dir"
  local part=1 lock
  exec {lock}>"${TMPDIR:-/tmp}/dpo-engine-cluster.lock"
  flock "$lock"
  if [[ -s $dir/part ]]; then part=$(<"$dir/part"); else
    while [[ $(ip -oneline address) == *" 198.18.$part.1/"* ]]; do part=$((part + 1)); done
    echo "$part" >"$dir/part"
  fi
  subnet=198.18.$part
  controller_port=$((26000 + part))
  if ! ip link show "$name" >/dev/null 2>&1; then
    ip link add "$name" type bridge
    ip address add "$subnet.1/24" dev "$name"
    ip link set "$name" up
  fi
  exec {lock}>&-
}

write_files() {
  mkdir -p "$dir"/{state,log,run}
  chmod 755 "$dir" "$dir"/{state,log,run}
  [[ -s $dir/key ]] || (umask 077 && head -c 1024 /dev/urandom >"$dir/key")
  {
    echo "127.0.0.1 localhost"
    echo "$subnet.1 $(hostname -s)"
    local place
    for place in "${!nodes[@]}"; do echo "$subnet.$((11 + place)) ${nodes[place]}"; done
  } >"$dir/hosts"
  # Slurm counts each character device in this list as a GPU, although none of these devices is a GPU.
  printf 'Name=gpu File=/dev/%s\n' null zero full random >"$dir/gres.conf"
  # No loaded plugin uses this file, but without it, slurmd would look for a cgroup.conf in /etc.
  echo "ConstrainRAMSpace=no" >"$dir/cgroup.conf"
  {
    cat <<CONF
ClusterName=$name
SlurmctldHost=$(hostname -s)($subnet.1)
SlurmctldPort=$controller_port
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its old credential has expired. By default, a credential expires after two minutes.
AuthInfo=socket=$dir/run/munge,cred_expire=10
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdSpoolDir=$dir/run/%n
SlurmdPidFile=$dir/run/%n.pid
SlurmdLogFile=$dir/log/%n
# Without cgroups, Slurm finds the processes of a job by their parents. It neither binds them to CPUs nor measures them.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
# This allows the nodes to declare more resources than this machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Reject jobs that cannot run instead of letting them wait.
EnforcePartLimits=ALL
KillWait=20
SlurmdTimeout=15
MessageTimeout=15
ReturnToService=2
CompleteWait=0
PropagateResourceLimits=NONE
PartitionName=batch Nodes=ALL Default=YES DefaultTime=10 PriorityTier=1 State=UP
PartitionName=urgent Nodes=ALL DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP
CONF
    local place
    for place in "${!nodes[@]}"; do
      echo "NodeName=${nodes[place]} NodeAddr=$subnet.$((11 + place)) CPUs=8 RealMemory=8000 Gres=gpu:4"
    done
  } >"$SLURM_CONF"
}

connect() {
  local place node
  for place in "${!nodes[@]}"; do
    node=${nodes[place]}
    if [[ ! -e /run/netns/$name-$node ]]; then
      ip netns add "$name-$node"
      ip link add "$name-$node" type veth peer name eth0 netns "$name-$node"
      ip link set "$name-$node" master "$name"
      ip -n "$name-$node" link set lo up
      ip -n "$name-$node" address add "$subnet.$((11 + place))/24" dev eth0
      ip -n "$name-$node" link set eth0 up
    fi
    ip link set "$name-$node" up
  done
}

disconnect() {
  local node
  for node in "${nodes[@]}"; do
    if [[ -e /run/netns/$name-$node ]]; then ip netns delete "$name-$node"; fi
    ip link delete "$name-$node" 2>/dev/null || true
  done
  ip link delete "$name" 2>/dev/null || true
}

start_node() { # starts slurmd in a new session, so that it keeps running after this shell ends
  # shellcheck disable=SC2016
  setsid nsenter --net="/run/netns/$name-$1" unshare --mount --uts --propagation private bash -c '
    hostname "$1"
    mount --bind "$2/hosts" /etc/hosts
    # Podman uses crun, which refuses to run if both cgroup versions are mounted, so unmount the unified hierarchy.
    if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
    exec slurmd -D -N "$1" -f "$2/slurm.conf"
  ' _ "$1" "$dir" </dev/null >>"$dir/log/$1.out" 2>&1 &
}

ready() { [[ $(sinfo -h -N -p batch -o %T 2>/dev/null | grep -cxE 'idle|mixed|allocated|completing') == "${#nodes[@]}" ]]; }

start() {
  requirements
  choose_addresses
  write_files
  if ! alive "$dir/run/munged.pid"; then
    rm -f "$dir/run/munge"
    munged --force --socket="$dir/run/munge" --key-file="$dir/key" --pid-file="$dir/run/munged.pid" \
      --log-file="$dir/log/munged" --seed-file="$dir/state/munge.seed" 2>>"$dir/log/munged.out"
  fi
  connect
  if ! alive "$dir/run/slurmctld.pid"; then
    setsid slurmctld -D -f "$SLURM_CONF" </dev/null >>"$dir/log/slurmctld.out" 2>&1 &
  fi
  local node waited
  for node in "${nodes[@]}"; do alive "$dir/run/$node.pid" || start_node "$node"; done
  for ((waited = 0; waited < 300; waited++)); do
    if ready; then return 0; fi
    sleep 0.2
  done
  say "the nodes did not become ready:"
  sinfo -N >&2 || true
  tail -n 20 "$dir"/log/* >&2
  stop
  return 1
}

lose() {
  local pid
  # A machine without power cannot close its connections, so take down the network first.
  ip link set "$name-$1" down
  for pid in $(ip netns pids "$name-$1"); do kill -KILL "$pid" 2>/dev/null || true; done
  rm -f "$dir/run/$1.pid"
}

end() { # pid file
  local pid waited
  alive "$1" || return 0
  pid=$(<"$1")
  kill -TERM "$pid" 2>/dev/null || return 0
  for ((waited = 0; waited < 100; waited++)); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL "$pid" 2>/dev/null || true
}

stop() {
  local node waited
  if alive "$dir/run/slurmctld.pid"; then
    timeout 15 scancel --state=PENDING --user=root || true
    timeout 15 scancel --user=root || true
    for ((waited = 0; waited < 300; waited++)); do
      if [[ -z $(timeout 5 squeue -h 2>/dev/null) ]]; then break; fi
      sleep 0.1
    done
  fi
  for node in "${nodes[@]}"; do if [[ -e /run/netns/$name-$node ]]; then lose "$node"; fi; done
  end "$dir/run/slurmctld.pid"
  end "$dir/run/munged.pid"
  disconnect
}

status() {
  local daemon
  for daemon in munged slurmctld "${nodes[@]}"; do
    if alive "$dir/run/$daemon.pid"; then echo "$daemon up, process $(<"$dir/run/$daemon.pid")"; else echo "$daemon down"; fi
  done
  if alive "$dir/run/slurmctld.pid"; then sinfo -N -o '%N %T %c CPUs %m MB %G'; fi
}

case ${1:-} in
  install | start | stop | status) "$1" ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  lose) lose "${2:?lose which node}" ;;
  *)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
esac
