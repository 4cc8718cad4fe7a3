# What dist_*.sh and slurm_*.sh share; they source it.
set -euo pipefail
tools=$(dirname "${BASH_SOURCE[0]}")

usage() { # VARIABLES ARGUMENTS
    echo "usage: $1 $0 $2" >&2
    exit 2
}

# Start processes on this machine: run_processes NUMBER PROGRAM ARGUMENTS...
run_processes() {
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    exec "${PYTHON:-python}" -m torch.distributed.run \
        --nnodes="${NNODES:-1}" \
        --node_rank="${NODE_RANK:-0}" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" \
        --master_port="${PORT:-29500}" \
        --nproc_per_node="$1" \
        "$tools/$2" "${@:3}"
}

# Start tasks of Slurm: run_tasks PARTITION JOB_NAME PROGRAM ARGUMENTS...
run_tasks() {
    GPUS=${GPUS:-8}
    GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
    # srun's options come as words of one variable.
    # shellcheck disable=SC2086
    exec srun \
        --partition="$1" \
        --job-name="$2" \
        --gres="gpu:$GPUS_PER_NODE" \
        --ntasks="$GPUS" \
        --ntasks-per-node="$GPUS_PER_NODE" \
        --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 \
        ${SRUN_ARGS:-} \
        "${PYTHON:-python}" -u "$tools/$3" "${@:4}"
}
