#!/usr/bin/env bash
# TPU slices on GKE as a JobSet: gke.sh [--dry-run] RECIPE [OPTION OF brewjax run ...]
# From the environment, e.g.: NAME=brew-mini ACCELERATOR=tpu-v5p-slice TOPOLOGY=4x4x4 IMAGE=... BUCKET=my-bucket;
# SLICES (1), CHIPS (4, those of a host) and RESTARTS (10) have defaults. Paths in the recipe are relative to the bucket.
set -euo pipefail
dry=no
[[ ${1:-} != --dry-run ]] || { dry=yes && shift; }
if [[ -z ${1:-} ]]; then
    echo "usage: NAME=... ACCELERATOR=... TOPOLOGY=... IMAGE=... BUCKET=... launch/gke.sh [--dry-run] RECIPE [OPTION ...]" >&2
    exit 2
fi
for word in NAME ACCELERATOR TOPOLOGY IMAGE BUCKET; do
    [[ -n ${!word:-} ]] || { echo "gke.sh: $word is not set; the top of launch/gke.sh has an example" >&2 && exit 2; }
done
SLICES=${SLICES:-1} CHIPS=${CHIPS:-4} RESTARTS=${RESTARTS:-10}
[[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+)+$ ]] || { echo "gke.sh: TOPOLOGY is '$TOPOLOGY'; it looks like 4x4x4 or 16x16" >&2 && exit 2; }
all=$((${TOPOLOGY//x/*}))
((all % CHIPS == 0)) || { echo "gke.sh: $TOPOLOGY has $all chips, no multiple of the $CHIPS of a host (CHIPS)" >&2 && exit 2; }
# shellcheck disable=SC2034  # used by its name below
HOSTS=$((all / CHIPS))
ARGUMENTS=
for argument in "$@"; do
    argument=${argument//\\/\\\\}
    ARGUMENTS+="${ARGUMENTS:+, }\"${argument//\"/\\\"}\""
done
ARGUMENTS="[$ARGUMENTS]"
text=$(<"$(dirname "$0")/jobset.yaml")
for word in NAME RESTARTS SLICES HOSTS ACCELERATOR TOPOLOGY IMAGE ARGUMENTS CHIPS BUCKET; do
    text=${text//"\${$word}"/"${!word}"}
done
if [[ $dry == yes ]]; then
    echo "$text"
    exit
fi
command -v kubectl >/dev/null || { echo "gke.sh: no kubectl here; install it, or add --dry-run" >&2 && exit 2; }
if ! said=$(kubectl apply -f - 2>&1 <<<"$text"); then
    echo "gke.sh: the cluster refused: $said" >&2
    case $said in
        *"no matches for kind"*) echo "JobSet is not installed: https://jobset.sigs.k8s.io/docs/installation" >&2 ;;
        *orbidden*) echo "Not allowed in this namespace: \`kubectl auth can-i create jobsets\`" >&2 ;;
        *quota*) echo "The namespace's quota is used up: \`kubectl describe quota\`" >&2 ;;
    esac
    exit 2
fi
echo "$said
logs: kubectl logs -f --prefix --max-log-requests=1000 -l jobset.sigs.k8s.io/jobset-name=$NAME
pods that stay Pending: no node pool has $ACCELERATOR $TOPOLOGY, or no capacity: kubectl describe pod -l jobset.sigs.k8s.io/jobset-name=$NAME
a pod that cannot mount the bucket: it names $BUCKET, which the pod's service account must be able to write"
