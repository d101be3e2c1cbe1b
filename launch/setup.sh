#!/usr/bin/env bash
# Makes .venv and installs lm_train into it, once. Safe when many processes start at the same time: one installs under a
# lock, the others wait. With "dev" also the tools of the tests. "check" installs nothing and says by its exit code whether
# all is there. Says what it does on standard error.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
extra=${1:-}
case $extra in
  "" | dev) ;;
  check) extra= ;;
  *) echo "usage: launch/setup.sh [dev|check]" >&2; exit 2 ;;
esac

# The mark holds the checksums of what was installed from: another version of these files installs again.
wanted=$(cksum <"$root/pyproject.toml")-$(cksum <"$root/constraints.txt")
ready() {
  local mark=$venv/.ready${extra:+-$extra} found
  [ -x "$venv/bin/python" ] && [ -r "$mark" ] && read -r found <"$mark" && [ "$found" = "$wanted" ]
}

ready && exit 0
if [ "${1:-}" = check ]; then exit 1; fi

say() { echo "setup: $*" >&2; }

python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
  say "no $python here. Install it: apt-get install python3 python3-venv"
  exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  say "$("$python" --version) is too old, 3.11 is needed. Install it (apt-get install python3.11 python3.11-venv), then PYTHON=python3.11 launch/setup.sh"
  exit 2
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
  say "$python cannot make virtual environments. Install: apt-get install python3-venv"
  exit 2
fi
if ! command -v flock >/dev/null; then
  say "no flock here. Install it: apt-get install util-linux"
  exit 2
fi

exec 9>"$root/.setup.lock" || { say "$root cannot be written; run launch/setup.sh as its owner first"; exit 73; }
if ! flock -n 9; then
  say "another process is installing; waiting for it"
  flock 9
fi
ready && exit 0

say "installing into $venv (minutes the first time; torch alone is large)"
# an installation that was cut off leaves a venv without pip
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
torch=$(grep '^torch==' "$root/constraints.txt")
log=$venv/pip.log
: >"$log"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@" >>"$log" 2>&1; }
if ! { pip install --quiet "$torch" && pip install --quiet -c "$root/constraints.txt" -e "$root${extra:+[$extra]}"; }; then
  if grep -q 'NewConnectionError\|ConnectTimeout\|NameResolutionError' "$log"; then
    why="no package index can be reached from here; run launch/setup.sh where there is a network"
  else
    why=$(grep '^ERROR' "$log" | tail -n 1 || true)
  fi
  say "the installation failed: ${why:-pip ended without a word}. All of it: $log"
  exit 1
fi
echo "$wanted" >"$venv/.ready${extra:+-$extra}"
if [ -n "$extra" ]; then echo "$wanted" >"$venv/.ready"; fi
say "done"
