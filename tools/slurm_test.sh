#!/usr/bin/env bash
# Evaluate through Slurm: one task for each GPU.
#
#   tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]
#
# GPUS=8, GPUS_PER_NODE (as many, at most 8), CPUS_PER_TASK=5 and SRUN_ARGS, more options for srun, can be set.
. "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

[[ $# -ge 4 ]] ||
    usage '[GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS=...]' 'PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]'
run_tasks "$1" "$2" test.py "$3" "$4" --launcher=slurm "${@:5}"
