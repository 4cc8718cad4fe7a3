#!/usr/bin/env bash
# Train through Slurm: one task for each GPU.
#
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]
#
# GPUS=8, GPUS_PER_NODE (as many, at most 8), CPUS_PER_TASK=5 and SRUN_ARGS, more options for srun, can be set.
. "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

[[ $# -ge 4 ]] ||
    usage '[GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS=...]' 'PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]'
run_tasks "$1" "$2" train.py "$3" --work-dir="$4" --launcher=slurm "${@:5}"
