#!/bin/bash
# Trains on a Cloud TPU slice: all of its hosts run the same command.
#
#   NAME=run1 ZONE=us-west4-a ACCELERATOR=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite \
#     WORKDIR=gs://bucket/run1 scripts/launch/tpu_pod.sh [--dry-run] ACTION
#
# ACTION, in this order:
#   create [FLAGS]           asks for the slice as a queued resource (FLAGS: --spot, --reserved, ...)
#   install                  clones SOURCE (a git address) on every host and installs it there
#   run -- train ARGUMENTS   trains; WORKDIR is kept, so that the same command goes on
#   delete                   gives the slice back
# --dry-run prints the commands. RESTARTS (0): how often `run` goes on by itself after exit code 75
# (preempted, saved) or 76 (a host was lost). Exit codes as those of `effattn train`.
#
# gcloud's flags: cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create and
# cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh
set -euo pipefail

usage() {
    echo "tpu_pod.sh: $1 (see the head of $0)" >&2
    exit 2
}

dry=
if [ "${1:-}" = --dry-run ]; then
    dry=1
    shift
fi
action=${1:-}
[ -n "$action" ] || usage "no action, expected create, install, run or delete"
shift
name=${NAME:?tpu_pod.sh: the name of the slice and of the run}
zone=${ZONE:?tpu_pod.sh: a zone, us-west4-a}

call() {
    if [ -n "$dry" ]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

everywhere() {
    call gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$1"
}

# The hosts' own codes: gcloud's exit code does not say which of them it is.
verdict() {
    local codes
    codes=$(sed -n 's/.*effattn exit code \([0-9]*\)$/\1/p' "$1" | sort -nu)
    [ -n "$codes" ] || { echo 76; return; } # no host came to its end: the slice has gone
    for code in $codes; do
        case $code in
            0 | 75 | 76) ;;
            129 | 1[3-9]?) ;; # ended by a signal: lost, as its peers say
            *) echo "$code"; return ;;
        esac
    done
    code=$(echo "$codes" | tail -n 1)
    if [ "$code" -gt 128 ]; then echo 76; else echo "$code"; fi
}

train() {
    local words log code attempt=0
    workdir=${WORKDIR:?tpu_pod.sh: where the run is kept, gs://bucket/run1}
    # jax finds the hosts of the slice by itself (--distributed).
    words="cd effattn && JAX_COMPILATION_CACHE_DIR=$(printf %q "$workdir/compile_cache")"
    words+=" .venv/bin/effattn $(printf '%q ' "$@")--distributed --workdir=$(printf %q "$workdir")"
    words+="; echo effattn exit code \$?"
    if [ -n "$dry" ]; then
        everywhere "$words"
        return
    fi
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    while true; do
        code=0
        everywhere "$words" 2>&1 | tee "$log" || true
        code=$(verdict "$log")
        case $code in
            75 | 76) ;;
            *) exit "$code" ;;
        esac
        [ "$attempt" -lt "${RESTARTS:-0}" ] || exit "$code"
        attempt=$((attempt + 1))
        echo "tpu_pod.sh: exit code $code, restart $attempt of $RESTARTS" >&2
        sleep 30
    done
}

case $action in
    create)
        call gcloud compute tpus queued-resources create "$name" "--node-id=$name" "--zone=$zone" \
            "--accelerator-type=${ACCELERATOR:?tpu_pod.sh: a kind of slice, v5litepod-256}" \
            "--runtime-version=${RUNTIME:?tpu_pod.sh: a runtime, v2-alpha-tpuv5-lite}" "$@"
        ;;
    install)
        source=$(printf %q "${SOURCE:?tpu_pod.sh: the git address of this repository}")
        words="git clone $source effattn && python3 -m venv effattn/.venv"
        everywhere "$words && effattn/.venv/bin/pip install -q -e 'effattn[tpu]'"
        ;;
    run)
        [ "${1:-}" = -- ] && [ $# -gt 1 ] || usage "run: expected -- train --config=... after it"
        shift
        train "$@"
        ;;
    delete)
        call gcloud compute tpus queued-resources delete "$name" "--zone=$zone" --force --quiet
        ;;
    *) usage "unknown action $action, expected create, install, run or delete" ;;
esac
