#!/usr/bin/env bash
# Make .venv at the root and install everything into it. Does nothing when constraints.txt and pyproject.toml are unchanged.
set -euo pipefail
cd "$(dirname "$0")/.."

marker=".venv/.installed-$(cat constraints.txt pyproject.toml tools/setup.sh | sha256sum | cut -c1-16)"
[ -f "$marker" ] && exit 0

say() { echo "setup: $*"; }

find_python() {
  for candidate in python3.11 python3.12 python3.13 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  return 1
}

# pycosat, a dependency of reasoning-gym, is built from source: a C compiler and Python's headers are needed once.
needs=()
command -v cc >/dev/null || needs+=(gcc libc6-dev)
python=$(find_python) || needs+=(python3 python3-venv python3-dev)
if [ -n "${python:-}" ] && ! "$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'; then
  needs+=(python3-dev)
fi
if [ "${#needs[@]}" -gt 0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing Debian packages: ${needs[*]}"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${needs[@]}" >/dev/null
    python=$(find_python)
  else
    say "missing: ${needs[*]}. Install them with your package manager and run make again." >&2
    exit 1
  fi
fi

export UV_LINK_MODE="${UV_LINK_MODE:-copy}"
[ -x .venv/bin/python ] || "$python" -m venv .venv
[ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  say "a GPU is here: installing rljob with the ordinary vLLM wheel (about 5 GB, usually 3 to 10 minutes)"
  .venv/bin/uv pip install --quiet --python .venv/bin/python -e '.[operator,runtime,reasoning-gym,dev]'
else
  say "no GPU: installing the pinned CPU environment (2.6 GB to download, usually 1 to 4 minutes)"
  .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps -r constraints.txt
  .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .
fi
rm -f .venv/.installed-*
touch "$marker"
say "done"
