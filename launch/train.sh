#!/usr/bin/env bash
# Trains: launch/train.sh recipe=gpt_debug [section.key=value ...]. Sets itself up when needed, except in a task of Slurm.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${SLURM_STEP_ID:-}" ]; then
  "$root/launch/setup.sh"
elif ! "$root/launch/setup.sh" check; then
  # compute nodes often have no network, and all tasks would install at once
  if [ "${SLURM_PROCID:-0}" != 0 ]; then
    sleep 5 # Slurm may end all tasks with the first that fails: the one that speaks goes first
  else
    echo "lm-train: no environment in $root/.venv, or one of an older checkout: run launch/setup.sh on the login node" >&2
    sleep 1 # for the line to reach srun before the step ends
  fi
  exit 2
fi
exec "$root/.venv/bin/python" -P -m lm_train train "$@"
