#!/usr/bin/env bash
# TPU slices on a GKE cluster that xpk made: xpk.sh [--dry-run] RECIPE [OPTION OF brewjax run ...]
# From the environment, e.g.: CLUSTER=my-cluster NAME=brew-mini TPU_TYPE=v5p-128 IMAGE=... STORAGE=my-storage; SLICES (1)
# and RESTARTS (10) have defaults. STORAGE: of `xpk storage attach`, with --mount-point=/bucket and
# --mount-options=implicit-dirs,metadata-cache:ttl-secs:0, a bucket with a hierarchical namespace (BUCKET=its name: checked).
# Paths in the recipe are relative to it. Project and zone are gcloud's own (`gcloud config set ...`).
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
dry=no
[[ ${1:-} != --dry-run ]] || { dry=yes && shift; }
if [[ -z ${1:-} ]]; then
    echo "usage: CLUSTER=... NAME=... TPU_TYPE=... IMAGE=... STORAGE=... launch/xpk.sh [--dry-run] RECIPE [OPTION ...]" >&2
    exit 2
fi
for word in CLUSTER NAME TPU_TYPE IMAGE STORAGE; do
    [[ -n ${!word:-} ]] || fail "$word is not set; the top of launch/xpk.sh has an example"
done
check_name "$NAME"
# By itself xpk starts again after 42 and 127-255 only, and gives 30 seconds after SIGTERM. `exec`: for SIGTERM to come.
create=(
    xpk workload create "--cluster=$CLUSTER" "--workload=$NAME" "--tpu-type=$TPU_TYPE" "--num-slices=${SLICES:-1}"
    "--docker-image=$IMAGE" "--storage=$STORAGE" --env=BREWJAX_DISTRIBUTED=auto "--max-restarts=${RESTARTS:-10}"
    --restart-on-exit-codes=75 --termination-grace-period-seconds=300 "--command=cd /bucket && exec brewjax run ${*@Q}"
)
if [[ $dry == yes ]]; then
    echo "${create[@]@Q}"
    exit
fi
command -v xpk >/dev/null || fail "no xpk here: pip install xpk, or add --dry-run"
[[ -z ${BUCKET:-} ]] || check_bucket "$BUCKET"
log=$(mktemp)
code=0
"${create[@]}" 2>&1 | tee "$log" || code=$?
if ((code)); then
    echo "xpk.sh: exit code $code" >&2
    case $(<"$log") in
        *"while getting Storage"*) echo "STORAGE is not attached: \`xpk storage list --cluster=$CLUSTER\`" >&2 ;;
        *"not present on the cluster"* | *"cluster only contains"*) echo "TPU_TYPE or SLICES is not what it has: \`xpk cluster describe --cluster=$CLUSTER\`" >&2 ;;
        *uota*) echo "Quota is used up: ask for more in the console, or take a smaller TPU_TYPE" >&2 ;;
        *"ot found"* | *NOT_FOUND*) echo "No cluster '$CLUSTER' there: \`xpk cluster list\`, \`gcloud config list\`" >&2 ;;
    esac
    exit "$code"
fi
echo "a workload that stays Pending has no free capacity: xpk workload list --cluster=$CLUSTER --filter-by-job=$NAME"
