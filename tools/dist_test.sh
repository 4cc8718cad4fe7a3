#!/usr/bin/env bash
# Evaluate in several processes on this machine: one for each GPU or, where there is none, on the CPU.
#
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]
#
# On several machines, run it on each with NNODES, NODE_RANK, MASTER_ADDR and PORT set.
. "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

[[ $# -ge 3 && $3 =~ ^[1-9][0-9]*$ ]] ||
    usage '[PORT=29500] [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1]' 'CONFIG CHECKPOINT GPUS [arguments of test.py]'
run_processes "$3" test.py "$1" "$2" --launcher pytorch "${@:4}"
