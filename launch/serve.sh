#!/usr/bin/env bash
# Servers of a model on Kubernetes: serve.sh [--dry-run]
# From the environment, e.g.: NAME=ranker IMAGE=... CLAIM=models MODEL=demo/turbo/model SECRET=ranker-token. CLAIM is a
# PersistentVolumeClaim that holds the model's folder, SECRET has the callers' token under the key `token`.
# With defaults: REPLICAS (2), MAX_REPLICAS (10), RESOURCES of a server ("cpu: 4, memory: 8Gi"; with "nvidia.com/gpu: 1" or
# "google.com/tpu: 4" behind it), MAX_QUEUED_TOKENS (200000), of which a server refuses more, and QUEUED_TOKENS (a quarter of
# that), above which servers are added.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
dry=no
[[ ${1:-} != --dry-run ]] || { dry=yes && shift; }
[[ $# == 0 ]] || fail "'$1': all settings are variables; the top of launch/serve.sh has an example"
for word in NAME IMAGE CLAIM MODEL SECRET; do
    [[ -n ${!word:-} ]] || fail "$word is not set; the top of launch/serve.sh has an example"
done
check_name "$NAME"
REPLICAS=${REPLICAS:-2} MAX_REPLICAS=${MAX_REPLICAS:-10} RESOURCES=${RESOURCES:-cpu: 4, memory: 8Gi}
MAX_QUEUED_TOKENS=${MAX_QUEUED_TOKENS:-200000}
# shellcheck disable=SC2034  # used by its name below
QUEUED_TOKENS=${QUEUED_TOKENS:-$((MAX_QUEUED_TOKENS / 4))}
((REPLICAS <= MAX_REPLICAS)) || fail "REPLICAS is $REPLICAS, more than MAX_REPLICAS, $MAX_REPLICAS"
text=$(fill serve.yaml NAME IMAGE CLAIM MODEL SECRET REPLICAS MAX_REPLICAS RESOURCES MAX_QUEUED_TOKENS QUEUED_TOKENS)
if [[ $dry == yes ]]; then
    echo "$text"
    exit
fi
command -v kubectl >/dev/null || fail "no kubectl here; install it, or add --dry-run"
kubectl apply -f - <<<"$text"
echo "ready: kubectl rollout status deployment/$NAME"
