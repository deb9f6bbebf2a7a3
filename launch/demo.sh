#!/usr/bin/env bash
# From a fresh clone to a trained, evaluated, exported model on this machine: sets up .venv, then runs `longctx demo`.
#
#   bash launch/demo.sh [ARGUMENT OF longctx demo...]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/tools/setup_env.sh"
export PATH="$root/.venv/bin:$PATH" # the demo starts torchrun
cd "$root"
exec longctx demo "$@"
