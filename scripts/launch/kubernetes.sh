#!/bin/bash
# Trains on pods of a Kubernetes cluster with JobSet, one process a pod.
#
#   NAME=run1 PODS=4 IMAGE=registry/effattn:1 WORKDIR=gs://bucket/run1 \
#     scripts/launch/kubernetes.sh [--dry-run] -- train --config=...
#
# IMAGE: a container with this package. WORKDIR: a bucket, or a folder of the volume claim CLAIM,
# which is mounted at /runs. RESTARTS (0): how often all pods are started again after the loss or the
# preemption of one (exit codes 76, 75); exit codes 1 and 2 end the job at once. RESOURCE and COUNT:
# what a pod asks for, nvidia.com/gpu and 8. For TPU pods RESOURCE=google.com/tpu, with
# TPU=tpu-v5-lite-podslice and TOPOLOGY=16x16, the labels of GKE. --dry-run prints the manifest.
#
# JobSet: jobset.sigs.k8s.io, github.com/kubernetes-sigs/jobset (api/jobset/v1alpha2); the policy on
# exit codes: kubernetes.io/docs/tasks/job/pod-failure-policy
set -euo pipefail

apply=(kubectl apply -f -)
if [ "${1:-}" = --dry-run ]; then
    apply=(cat)
    shift
fi
if [ "${1:-}" != -- ] || [ $# -lt 2 ]; then
    echo "kubernetes.sh: expected -- train --config=... (see the head of $0)" >&2
    exit 2
fi
shift
name=${NAME:?kubernetes.sh: the name of the job and of the run}
pods=${PODS:?kubernetes.sh: the number of pods}
image=${IMAGE:?kubernetes.sh: a container with effattn}
workdir=${WORKDIR:?kubernetes.sh: where the run is kept, gs://bucket/run1 or /runs/run1}
resource=${RESOURCE:-nvidia.com/gpu}
count=${COUNT:-8}

quoted() { # as a string of YAML: single quotes, doubled inside
    printf "'%s'" "${1//\'/\'\'}"
}

words() {
    local word
    for word in effattn "$@" "--workdir=$workdir"; do
        echo "              - $(quoted "$word")"
    done
}

nodes() {
    [ -n "${TPU:-}" ] || return 0
    echo "            nodeSelector:"
    echo "              cloud.google.com/gke-tpu-accelerator: $(quoted "$TPU")"
    echo "              cloud.google.com/gke-tpu-topology: $(quoted "${TOPOLOGY:?with TPU}")"
}

mounts() {
    [ -n "${CLAIM:-}" ] || return 0
    echo "              volumeMounts:"
    echo "              - {name: runs, mountPath: /runs}"
}

volumes() {
    [ -n "${CLAIM:-}" ] || return 0
    echo "            volumes:"
    echo "            - {name: runs, persistentVolumeClaim: {claimName: $(quoted "$CLAIM")}}"
}

manifest() {
    cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-0}
    rules:
    - name: mistakes
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: workers
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        completions: $pods
        parallelism: $pods
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: effattn, operator: In, values: [1, 2]}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
END
    nodes
    cat <<END
            containers:
            - name: effattn
              image: $(quoted "$image")
              command:
END
    words "$@"
    cat <<END
              env:
              - {name: EFFATTN_COORDINATOR, value: '$name-workers-0-0.$name:12355'}
              - {name: EFFATTN_NUM_PROCESSES, value: '$pods'}
              - name: EFFATTN_PROCESS_ID
                valueFrom:
                  fieldRef:
                    fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
              - {name: JAX_COMPILATION_CACHE_DIR, value: $(quoted "$workdir/compile_cache")}
              ports:
              - containerPort: 12355
              resources:
                limits: {$(quoted "$resource"): $count}
END
    mounts
    volumes
}

manifest "$@" | "${apply[@]}"
