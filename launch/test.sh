#!/usr/bin/env bash
# Runs the tests: launch/test.sh, or launch/test.sh slow for the full matrices too; further words go to pytest.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/setup.sh" dev
cd "$root"
marks=()
if [ "${1:-}" = slow ]; then
  shift
  marks=(-m "slow or not slow")
fi
exec .venv/bin/python -m pytest "${marks[@]}" "$@"
