#!/bin/bash
# Trains on nodes of a Slurm cluster, one process a node, which takes all of the node's GPUs.
#
#   WORKDIR=/shared/run1 sbatch --nodes=4 --gpus-per-node=8 scripts/launch/slurm.sh train --config=...
#
# Submit from the root of this repository; WORKDIR and .venv must be on a disk that all nodes see.
# `bash scripts/launch/slurm.sh --dry-run train ...` prints what the job would run. RESTARTS (0): how
# often the job is put back into the queue after exit code 75 or 76, or the loss of a process. PORT
# (12355): where the first node listens.
#
# Slurm's flags: slurm.schedmd.com/sbatch.html and slurm.schedmd.com/srun.html
#SBATCH --job-name=effattn
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the time limit the processes are told to save and end.
#SBATCH --signal=TERM@120
set -euo pipefail

dry=
if [ "${1:-}" = --dry-run ]; then
    dry=1
    shift
fi
if [ $# -eq 0 ]; then
    echo "slurm.sh: expected train --config=... (see the head of $0)" >&2
    exit 2
fi
workdir=${WORKDIR:?slurm.sh: where the run is kept, on a disk that all nodes see}
export JAX_COMPILATION_CACHE_DIR=$workdir/compile_cache
if [ -n "$dry" ]; then
    first=FIRST_NODE
else
    # Names like node[01,05-07] are left to Slurm to take apart.
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
export EFFATTN_COORDINATOR=$first:${PORT:-12355}

# Numbers are known inside of each task only. One that dies does not kill the others: they end by
# themselves, with a message, within 100 s.
# shellcheck disable=SC2016
each='EFFATTN_NUM_PROCESSES=$SLURM_NTASKS EFFATTN_PROCESS_ID=$SLURM_PROCID exec "$@"'
task=(srun --kill-on-bad-exit=0 --wait=100 --label bash -c "$each" effattn
    .venv/bin/effattn "$@" "--workdir=$workdir")
if [ -n "$dry" ]; then
    for variable in EFFATTN_COORDINATOR JAX_COMPILATION_CACHE_DIR; do
        printf '%s=%q ' "$variable" "${!variable}"
    done
    printf '%q ' "${task[@]}"
    echo
    exit
fi

code=0
"${task[@]}" || code=$? # the highest of the tasks
[ "$code" -lt 129 ] || code=76
if { [ "$code" -eq 75 ] || [ "$code" -eq 76 ]; } &&
    [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-0}" ]; then
    echo "slurm.sh: exit code $code, back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
