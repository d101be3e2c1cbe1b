#!/usr/bin/env bash
# A Slurm cluster of several nodes on this machine, for the tests: munged, slurmctld and a slurmd a node, from one folder.
#
#   tests/slurm-cluster.sh start FOLDER PORT [NODES=4] [GPUS=2]   uses PORT .. PORT+NODES; prints `export SLURM_CONF=...`
#   tests/slurm-cluster.sh stop FOLDER                            ends all of it, with every process of its jobs
#   tests/slurm-cluster.sh crash FOLDER NODE                      ends a node with all that runs on it, at once
#   tests/slurm-cluster.sh stop-after FOLDER PID                  the same, as soon as process PID has ended
#
# Needs root and: apt-get install --no-install-recommends slurm-wlm munge. The GPUs are device files that compute nothing.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C

command=${1:-} folder=${2:-}
[[ $command =~ ^(start|stop|stop-after|crash)$ && $folder = /* ]] || { sed -n '2,9p' "$0" >&2; exit 2; }
conf=$folder/slurm.conf
mark="# $conf"

# A node is slurmd in name, process and mount spaces of its own: `hostname` is the node's, and its end ends its jobs.
spaces=(unshare --uts --pid --mount --fork --kill-child --mount-proc)
"${spaces[@]}" true 2>/dev/null || spaces=()

fail() { echo "slurm-cluster: $*" >&2; exit 1; }
# a pid file holds the process and when it began, so that another one with its number is left alone
began() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
runs() {
  local pid time
  [ -s "$1" ] && read -r pid time <"$1" && [ -n "$time" ] && [ "$(began "$pid")" = "$time" ] &&
    ! grep -q '^State:.Z' "/proc/$pid/status" # nobody may be there to bury it
}
background() { # background NAME COMMAND...
  local name=$1; shift
  setsid "$@" </dev/null >>"$folder/log/$name" 2>&1 &
  echo "$! $(began $!)" >"$folder/run/$name.pid"
}

write_configuration() { # write_configuration PORT NODES GPUS
  local port=$1 nodes=$2 gpus=$3 i
  mkdir -p "$folder"/{run,log,spool,state,dev}
  chmod 755 "$folder" "$folder"/{run,log,spool}
  chmod 700 "$folder/state"
  (umask 077; head -c 128 /dev/urandom >"$folder/munge.key")
  for ((i = 0; i < gpus; i++)); do mknod -m 666 "$folder/dev/gpu$i" c 1 3; done
  echo "NodeName=n[1-$nodes] Name=gpu File=$folder/dev/gpu[0-$((gpus - 1))]" >"$folder/gres.conf"
  echo "CgroupPlugin=cgroup/v1" >"$folder/cgroup.conf"
  {
    # cred_expire is also what a requeued job must wait for
    cat <<CONF
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/run/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.own
SlurmdPidFile=$folder/run/slurmd.%n.own
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
KillWait=15
InactiveLimit=0
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=10
PartitionName=main Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE State=UP PriorityTier=10 GraceTime=5
PartitionName=short Nodes=n$nodes Default=NO MaxTime=01:00:00 State=UP
PartitionName=urgent Nodes=n[1-$nodes] Default=NO MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
CONF
    for ((i = 1; i <= nodes; i++)); do
      echo "NodeName=n$i NodeHostname=n$i NodeAddr=127.0.0.$((10 + i)) Port=$((port + i)) CPUs=8 RealMemory=16000 Gres=gpu:$gpus"
    done
  } >"$conf"
  for ((i = 1; i <= nodes; i++)); do echo "127.0.0.$((10 + i)) n$i $mark"; done >>/etc/hosts
}

start() { # start PORT NODES GPUS
  local nodes=$2 i up
  [ "$(id -u)" = 0 ] || fail "needs root"
  for i in munged slurmctld slurmd srun; do command -v $i >/dev/null || fail "no $i here: apt-get install slurm-wlm munge"; done
  [ ! -e "$conf" ] || fail "$folder is in use"
  for ((i = 0; i <= nodes; i++)); do
    ! (exec 3<>"/dev/tcp/127.0.0.1/$(($1 + i))") 2>/dev/null || fail "port $(($1 + i)) is taken"
  done
  write_configuration "$@"
  export SLURM_CONF=$conf
  background munged munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/run/munge.socket" \
    --pid-file="$folder/run/munged.own" --log-file="$folder/log/munged.log" --seed-file="$folder/run/munged.seed"
  for ((i = 0; i < 100; i++)); do munge -n -S "$folder/run/munge.socket" >/dev/null 2>&1 && break; sleep 0.1; done
  background slurmctld slurmctld -D -i -f "$conf"
  for ((i = 1; i <= nodes; i++)); do
    mkdir -p "$folder/spool/n$i"
    if [ ${#spaces[@]} = 0 ]; then
      background "n$i" slurmd -D -N "n$i" -f "$conf"
    else
      # shellcheck disable=SC2016 # for the inner shell
      background "n$i" "${spaces[@]}" bash -c 'hostname "$0"; slurmd -D -N "$0" -f "$SLURM_CONF" & wait $!' "n$i"
    fi
  done
  for ((i = 0; i < 300; i++)); do
    up=$(timeout 5 sinfo -h -N -p main -o %T 2>/dev/null | grep -cx idle || true)
    if [ "$up" = "$nodes" ]; then echo "export SLURM_CONF=$conf"; return; fi
    sleep 0.1
  done
  fail "only ${up:-0} of $nodes nodes came up within 30 s: see $folder/log"
}

stop() {
  local file pid i process rest
  for file in "$folder"/run/n*.pid "$folder"/run/slurmctld.pid "$folder"/run/munged.pid; do
    runs "$file" || continue
    read -r pid _ <"$file"
    # the end of a node's first process ends its jobs; the others end in order
    case $file in */n[0-9]*.pid) kill -KILL "$pid" 2>/dev/null || true ;; *) kill "$pid" 2>/dev/null || true ;; esac
    for ((i = 0; i < 50; i++)); do runs "$file" || break; sleep 0.1; done
    if runs "$file"; then kill -KILL "$pid" 2>/dev/null || true; fi
  done
  for process in /proc/[0-9]*; do # what is left where there were no spaces of their own
    [ "${process#/proc/}" = $$ ] || ! grep -zqxF "SLURM_CONF=$conf" "$process/environ" 2>/dev/null ||
      ! grep -zq "^SLURMD_NODENAME=" "$process/environ" 2>/dev/null || kill -KILL "${process#/proc/}" 2>/dev/null || true
  done
  if grep -qF "$mark" /etc/hosts; then # in place: it may be a mount
    rest=$(grep -vF "$mark" /etc/hosts || true)
    printf '%s\n' "$rest" >/etc/hosts
  fi
  rm -rf "$folder/run" "$folder/spool" "$folder/state" "${folder:?}/dev" "$conf"
}

case $command in
  start) start "${3:?port}" "${4:-4}" "${5:-2}" ;;
  stop) stop ;;
  crash)
    read -r pid _ <"$folder/run/${3:?node}.pid"
    kill -KILL "$pid"
    ;;
  stop-after)
    while kill -0 "${3:?pid}" 2>/dev/null; do sleep 1; done
    if [ -e "$conf" ]; then stop; rm -rf "$folder"; fi
    ;;
esac
