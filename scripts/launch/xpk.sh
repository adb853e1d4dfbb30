#!/bin/bash
# Trains on slices of a GKE cluster that xpk has made.
#
#   NAME=run1 CLUSTER=c ZONE=us-west4-a TPU=v5litepod-256 IMAGE=gcr.io/project/effattn:1 \
#     WORKDIR=gs://bucket/run1 scripts/launch/xpk.sh [--dry-run] -- train --config=...
#
# IMAGE: a container with this package and jax[tpu]. SLICES (1). RESTARTS (0): how often the cluster
# starts the same command again, which goes on from the last checkpoint. DEVICE=h100-80gb-8 and
# NODES instead of TPU are for GPUs. --dry-run prints the command.
#
# xpk's flags: github.com/AI-Hypercomputer/xpk, src/xpk/parser/workload.py
set -euo pipefail

run=()
if [ "${1:-}" = --dry-run ]; then
    run=(printf '%q ')
    shift
fi
if [ "${1:-}" != -- ] || [ $# -lt 2 ]; then
    echo "xpk.sh: expected -- train --config=... (see the head of $0)" >&2
    exit 2
fi
shift
name=${NAME:?xpk.sh: the name of the workload and of the run}
workdir=${WORKDIR:?xpk.sh: where the run is kept, gs://bucket/run1}

if [ -n "${DEVICE:-}" ]; then
    machines=("--device-type=$DEVICE" "--num-nodes=${NODES:-1}")
else
    tpu=${TPU:?xpk.sh: a kind of slice, v5litepod-256, or DEVICE for GPUs}
    machines=("--tpu-type=$tpu" "--num-slices=${SLICES:-1}")
fi
command="effattn $(printf '%q ' "$@")--distributed --workdir=$(printf %q "$workdir")"
"${run[@]}" xpk workload create \
    "--workload=$name" \
    "--cluster=${CLUSTER:?xpk.sh: the name of the cluster}" \
    "--zone=${ZONE:?xpk.sh: a zone, us-west4-a}" \
    "${machines[@]}" \
    "--docker-image=${IMAGE:?xpk.sh: a container with effattn}" \
    "--env=JAX_COMPILATION_CACHE_DIR=$workdir/compile_cache" \
    "--max-restarts=${RESTARTS:-0}" --restart-on-user-code-failure \
    --termination-grace-period-seconds=120 \
    "--command=$command"
if [ ${#run[@]} -gt 0 ]; then echo; fi
