#!/usr/bin/env bash
# Run the tests in .venv, which is made or reused.
#
#   bash tools/test.sh [--all] [PYTEST ARGUMENT...]
#
# Tier 1 by default; --all adds tier 2 (real launchers, fault injection, wide matrices). Works from any directory.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
tier=(-m "not tier2")
arguments=()
for argument in "$@"; do
    if [ "$argument" = "--all" ]; then tier=(); else arguments+=("$argument"); fi
done

bash tools/setup_env.sh test
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 # test workers share the cores; more threads each only make them slower
exec python -m pytest "${tier[@]}" "${arguments[@]}"
