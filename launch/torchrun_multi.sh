#!/usr/bin/env bash
# Train on several machines, started by torchrun. Run this same command on every machine:
#
#   bash launch/torchrun_multi.sh --nodes N --rdzv HOST:PORT [--nproc N] [--id NAME] [--local-addr ADDRESS] [--dry-run]
#        CONFIG [section.key=value ...]
#
#   --nodes N             machines
#   --rdzv HOST:PORT      where they meet: one of the machines and a free port on it
#   --nproc N             processes per machine, one per GPU (default: the GPUs of this machine, else 1)
#   --id NAME             name of the run, when several runs meet at one place (default: longctx)
#   --local-addr ADDRESS  how the others reach this machine, if its host name does not resolve
#   --dry-run             print the command instead of running it
#
# torchrun orders the machines itself and gives each process RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes="" rdzv="" id=longctx address=()
nproc=$(default_processes)
while [ $# -gt 0 ]; do
    case $1 in
        --nodes) need_number "$@"; nodes=$2; shift 2 ;;
        --nproc) need_number "$@"; nproc=$2; shift 2 ;;
        --rdzv) need_value "$@"; rdzv=$2; shift 2 ;;
        --id) need_value "$@"; id=$2; shift 2 ;;
        --local-addr) need_value "$@"; address=(--local-addr "$2"); shift 2 ;;
        --dry-run) dry_run=1; shift ;;
        -h | --help) show_help "$0"; exit ;;
        -*) fail "unknown option $1; see --help" ;;
        *) break ;;
    esac
done
[ -n "$nodes" ] || fail "say how many machines take part: --nodes N"
[[ "$rdzv" =~ .+:[0-9]+$ ]] || fail "say where the machines meet: --rdzv HOST:PORT"
[ $# -ge 1 ] || fail "give a config: bash launch/torchrun_multi.sh --nodes N --rdzv HOST:PORT CONFIG [section.key=value ...]"

launch torchrun --nnodes "$nodes" --nproc-per-node "$nproc" --rdzv-backend c10d --rdzv-endpoint "$rdzv" \
    --rdzv-id "$id" "${address[@]}" -m longctx train "$@"
