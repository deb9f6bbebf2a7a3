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
while [ $# -gt 0 ]; do
    case $1 in
        --nproc) need_number "$@"; nproc=$2; shift 2 ;;
        --dry-run) dry_run=1; shift ;;
        -h | --help) show_help "$0"; exit ;;
        -*) fail "unknown option $1; see --help" ;;
        *) break ;;
    esac
done
[ $# -ge 1 ] || fail "give a config: bash launch/torchrun_single.sh CONFIG [section.key=value ...]"

launch torchrun --standalone --nproc-per-node "$nproc" -m longctx train "$@"
