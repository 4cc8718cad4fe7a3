#!/usr/bin/env bash
# Train in several processes on this machine: one for each GPU or, where there is none, on the CPU.
#
#   tools/dist_train.sh CONFIG GPUS [arguments of train.py]
#
# On several machines, run it on each with NNODES, NODE_RANK, MASTER_ADDR and PORT set.
. "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

[[ $# -ge 2 && $2 =~ ^[1-9][0-9]*$ ]] ||
    usage '[PORT=29500] [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1]' 'CONFIG GPUS [arguments of train.py]'
run_processes "$2" train.py "$1" --launcher pytorch "${@:3}"
