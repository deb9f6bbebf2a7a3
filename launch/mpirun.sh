#!/usr/bin/env bash
# Train with Open MPI's mpirun starting the processes (they still talk over gloo or NCCL).
#
#   bash launch/mpirun.sh [--np N] [--hostfile FILE] [--port PORT] [--dry-run] CONFIG [section.key=value ...]
#
#   --np N           processes in all, one per GPU (default: the GPUs of this machine, else 1)
#   --hostfile FILE  one line per machine: "host slots=8"; the first one is the meeting point
#   --port PORT      port of the first process (default: 29500; without a hostfile a free one)
#   --dry-run        print the command instead of running it
#
# mpirun gives each process OMPI_COMM_WORLD_RANK, _SIZE and _LOCAL_RANK; this script adds MASTER_ADDR and MASTER_PORT
# (set MASTER_ADDR yourself where the machines know each other by other names than in the hostfile).
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

np=$(default_processes) hostfile="" port=""
parse_options "np=number hostfile=value port=number" "$@"

# --oversubscribe: on a CPU there may be fewer cores than processes. --bind-to none: torch manages its own threads.
options=(-np "$np" --oversubscribe --bind-to none)
if [ "$(id -u)" = 0 ]; then options+=(--allow-run-as-root); fi # containers run as root, mpirun refuses that unasked
if [ -n "$hostfile" ]; then
    [ -r "$hostfile" ] || fail "the hostfile $hostfile cannot be read"
    first=$(awk '!/^[[:space:]]*(#|$)/ {print $1; exit}' "$hostfile")
    options+=(--hostfile "$hostfile")
fi
address=${MASTER_ADDR:-${first:-127.0.0.1}}
if [ -z "$hostfile" ]; then port=${port:-$(free_port)}; fi
options+=(-x "MASTER_ADDR=$address" -x "MASTER_PORT=${port:-29500}" -x PATH)

launch mpirun "${options[@]}" python -m longctx train "${config[@]}"
