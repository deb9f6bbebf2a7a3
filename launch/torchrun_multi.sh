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

nodes="" rdzv="" id=longctx local_addr=""
nproc=$(default_processes)
parse_options "nodes=number nproc=number rdzv=value id=value local-addr=value" "$@"
[ -n "$nodes" ] || fail "say how many machines take part: --nodes N"
[[ "$rdzv" =~ .+:[0-9]+$ ]] || fail "say where the machines meet: --rdzv HOST:PORT"
address=()
if [ -n "$local_addr" ]; then address=(--local-addr "$local_addr"); fi

launch torchrun --nnodes "$nodes" --nproc-per-node "$nproc" --rdzv-backend c10d --rdzv-endpoint "$rdzv" \
    --rdzv-id "$id" "${address[@]}" -m longctx train "${config[@]}"
