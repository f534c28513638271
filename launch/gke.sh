#!/usr/bin/env bash
# TPU slices on GKE as a JobSet: gke.sh [--dry-run] RECIPE [OPTION OF brewjax run ...]
# From the environment, e.g.: NAME=brew-mini ACCELERATOR=tpu-v5p-slice TOPOLOGY=4x4x4 IMAGE=... BUCKET=my-bucket.
# With defaults: SLICES (1), CHIPS of a host (by accelerator and topology), RESTARTS (10), SERVICE_ACCOUNT (default), QUEUE
# (of Kueue; none), EPHEMERAL_STORAGE of the container and of gcsfuse's own (50Gi each).
# Paths in the recipe are relative to the bucket, which needs a hierarchical namespace.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
dry=no
[[ ${1:-} != --dry-run ]] || { dry=yes && shift; }
if [[ -z ${1:-} ]]; then
    echo "usage: NAME=... ACCELERATOR=... TOPOLOGY=... IMAGE=... BUCKET=... launch/gke.sh [--dry-run] RECIPE [OPTION ...]" >&2
    exit 2
fi
for word in NAME ACCELERATOR TOPOLOGY IMAGE BUCKET; do
    [[ -n ${!word:-} ]] || fail "$word is not set; the top of launch/gke.sh has an example"
done
check_name "$NAME"
SLICES=${SLICES:-1} RESTARTS=${RESTARTS:-10} EPHEMERAL_STORAGE=${EPHEMERAL_STORAGE:-50Gi}
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}
of_host=$(chips_per_host "$ACCELERATOR" "$TOPOLOGY")
CHIPS=${CHIPS:-$of_host}
all=$((${TOPOLOGY//x/*}))
((all % CHIPS == 0)) || fail "$TOPOLOGY has $all chips, no multiple of the $CHIPS of a host (CHIPS)"
# shellcheck disable=SC2034  # these are used by their names below
HOSTS=$((all / CHIPS)) LABELS=${QUEUE:+kueue.x-k8s.io/queue-name: $QUEUE}
ARGUMENTS=
for argument in "$@"; do
    argument=${argument//\\/\\\\}
    ARGUMENTS+="${ARGUMENTS:+, }\"${argument//\"/\\\"}\""
done
ARGUMENTS="[$ARGUMENTS]"
text=$(fill jobset.yaml NAME LABELS RESTARTS SLICES HOSTS ACCELERATOR TOPOLOGY IMAGE ARGUMENTS CHIPS BUCKET SERVICE_ACCOUNT \
    EPHEMERAL_STORAGE)
if [[ $dry == yes ]]; then
    echo "$text"
    exit
fi
command -v kubectl >/dev/null || fail "no kubectl here; install it, or add --dry-run"
check_bucket "$BUCKET"
if ! reply=$(kubectl apply -f - 2>&1 <<<"$text"); then
    echo "gke.sh: the cluster refused: $reply" >&2
    case $reply in
        *"no matches for kind"*) echo "JobSet is not installed: https://jobset.sigs.k8s.io/docs/installation" >&2 ;;
        *orbidden*) echo "Not allowed in this namespace: \`kubectl auth can-i create jobsets\`" >&2 ;;
        *quota*) echo "The namespace's quota is used up: \`kubectl describe quota\`" >&2 ;;
    esac
    exit 2
fi
echo "$reply
logs: kubectl logs -f --prefix --max-log-requests=1000 -l jobset.sigs.k8s.io/jobset-name=$NAME
pods that stay Pending: no node pool has $ACCELERATOR $TOPOLOGY, or no capacity: kubectl describe pod -l jobset.sigs.k8s.io/jobset-name=$NAME
a pod that cannot mount the bucket: it names $BUCKET, which the service account '$SERVICE_ACCOUNT' must be able to write (SERVICE_ACCOUNT)"
