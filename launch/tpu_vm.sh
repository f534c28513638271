#!/usr/bin/env bash
# A slice of TPU VMs by gcloud: tpu_vm.sh [--dry-run] NAME ZONE RECIPE [OPTION OF brewjax run ...]
# Every VM has brewjax in ~/brewjax/.venv and a bucket with data and runs mounted at the same path, one with a hierarchical
# namespace (BUCKET=its name: checked): `gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 BUCKET FOLDER`. With
# TYPE=v5p-128 VERSION=v2-alpha-tpuv5 the slice is created first. Each VM's log: ~/brewjax/run.log there; all come back.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
dry=no
[[ ${1:-} != --dry-run ]] || { dry=yes && shift; }
if [[ -z ${1:-} || -z ${2:-} || -z ${3:-} ]]; then
    echo "usage: launch/tpu_vm.sh [--dry-run] NAME ZONE RECIPE [OPTION OF brewjax run ...]" >&2
    exit 2
fi
name=$1 zone=$2
shift 2
remote="cd ~/brewjax && set -o pipefail && BREWJAX_DISTRIBUTED=auto RESTARTS=${RESTARTS:-10} PATH=~/brewjax/.venv/bin:\$PATH \
launch/again.sh brewjax run ${*@Q} 2>&1 | tee -a run.log"
ssh=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$remote")
create=()
[[ -z ${TYPE:-} ]] || create=(
    gcloud compute tpus tpu-vm create "$name" "--zone=$zone" "--accelerator-type=$TYPE" "--version=${VERSION:?is to be set with TYPE}"
)
if [[ $dry == yes ]]; then
    ((${#create[@]} == 0)) || echo "${create[@]@Q}"
    echo "${ssh[@]@Q}"
    exit
fi
command -v gcloud >/dev/null || fail "no gcloud here: https://cloud.google.com/sdk, or add --dry-run"
[[ -z ${BUCKET:-} ]] || check_bucket "$BUCKET"
log=$(mktemp)
code=0
{ ((${#create[@]} == 0)) || "${create[@]}"; } 2>&1 | tee "$log" || code=$?
if ((code)) && [[ $(<"$log") == *ALREADY_EXISTS* ]]; then
    code=0
fi
((code)) || "${ssh[@]}" 2>&1 | tee "$log" || code=$?
if ((code)); then
    echo "tpu_vm.sh: exit code $code" >&2
    case $(<"$log") in
        *uota*) echo "Quota is used up: ask for more in the console (Cloud TPU API), or take a smaller TYPE" >&2 ;;
        *RESOURCE_EXHAUSTED* | *"no more capacity"*) echo "No capacity in $zone now: another zone, or \`gcloud compute tpus queued-resources create\`" >&2 ;;
        *INVALID_ARGUMENT*) echo "Wrong TYPE or VERSION: \`gcloud compute tpus accelerator-types list --zone=$zone\`, \`.. versions list\`" >&2 ;;
        *NOT_FOUND*) echo "No TPU '$name' in $zone: \`gcloud compute tpus tpu-vm list --zone=$zone\`, or set TYPE and VERSION" >&2 ;;
        *PERMISSION_DENIED*) echo "Not allowed: \`gcloud auth login\`, or the role roles/tpu.admin on the project" >&2 ;;
        *"Transport endpoint is not connected"*) echo "The bucket is not mounted on every VM: run gcsfuse there" >&2 ;;
    esac
fi
exit "$code"
