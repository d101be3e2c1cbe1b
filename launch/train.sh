#!/usr/bin/env bash
# Trains: launch/train.sh recipe=gpt_debug [section.key=value ...]. Sets itself up when needed.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/setup.sh"
exec "$root/.venv/bin/python" -m lm_train train "$@"
