#!/usr/bin/env bash
# Train with the deepspeed launcher: on this machine, or over ssh on the machines of a hostfile.
#
#   bash launch/deepspeed.sh [--hostfile FILE] [--nproc N] [--port PORT] [--dry-run] CONFIG [section.key=value ...]
#
#   --hostfile FILE  one line per machine: "host slots=8"; needs password-less ssh and the same paths everywhere
#   --nproc N        processes per machine (default: the hostfile's slots; without one the GPUs of this machine, else 1)
#   --port PORT      port of the first process (default: 29500; without a hostfile a free one)
#   --dry-run        print the command instead of running it
#
# The launcher gives each process RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, like torchrun.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

hostfile="" nproc="" port=""
parse_options "hostfile=value nproc=number port=number" "$@"

options=()
if [ -n "$hostfile" ]; then
    [ -r "$hostfile" ] || fail "the hostfile $hostfile cannot be read"
    options+=(--hostfile "$hostfile")
else
    # A hostfile lying in deepspeed's default place must not turn a local run into a distributed one.
    options+=(--hostfile /dev/null --master_addr 127.0.0.1)
    nproc=${nproc:-$(default_processes)}
    port=${port:-$(free_port)}
fi
options+=(--master_port "${port:-29500}")
if [ -n "$nproc" ]; then options+=(--num_gpus "$nproc"); fi

launch deepspeed "${options[@]}" --no_local_rank --module longctx train "${config[@]}"
