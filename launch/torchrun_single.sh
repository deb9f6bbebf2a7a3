#!/usr/bin/env bash
# Train on the GPUs (or CPU cores) of one machine, started by torchrun.
#
#   bash launch/torchrun_single.sh [--nproc N] [--dry-run] CONFIG [section.key=value ...]
#
#   --nproc N    processes, one per GPU (default: the GPUs of this machine, else 1)
#   --dry-run    print the command instead of running it
#
# torchrun gives each process RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; --standalone picks a free port.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nproc=$(default_processes)
parse_options "nproc=number" "$@"

launch torchrun --standalone --nproc-per-node "$nproc" -m longctx train "${config[@]}"
