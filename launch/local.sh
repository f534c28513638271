#!/usr/bin/env bash
# N processes on this machine: local.sh [--dry-run] N RECIPE [OPTION OF brewjax run ...]
# Logs: $LOGS/process-0.log and so on, logs/ by default. PORT: of the coordinator, 9871 by default.
set -euo pipefail
dry=no
[[ ${1:-} != --dry-run ]] || { dry=yes && shift; }
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ || -z ${2:-} ]]; then
    echo "usage: launch/local.sh [--dry-run] PROCESSES RECIPE [OPTION OF brewjax run ...]" >&2
    exit 2
fi
processes=$1 here=$(cd "$(dirname "$0")" && pwd) logs=${LOGS:-logs}
shift
export JAX_COORDINATOR_ADDRESS=localhost:${PORT:-9871} JAX_NUM_PROCESSES=$processes
if [[ $dry == yes ]]; then
    for ((i = 0; i < processes; i++)); do
        echo "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES=$processes JAX_PROCESS_ID=$i" \
            "$here/again.sh brewjax run $* >> $logs/process-$i.log 2>&1 &"
    done
    exit
fi
mkdir -p "$logs"
children=()
for ((i = 0; i < processes; i++)); do
    JAX_PROCESS_ID=$i "$here/again.sh" brewjax run "$@" >>"$logs/process-$i.log" 2>&1 &
    children+=($!)
done
trap 'kill -TERM "${children[@]}" 2>/dev/null || true' TERM INT
failed=0
for child in "${children[@]}"; do
    code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    ((code == 0 || failed)) || failed=$code
done
if ((failed)); then
    echo "local.sh: a process ended with exit code $failed; the last lines of each log:" >&2
    tail -n 5 "$logs"/process-*.log >&2
fi
exit "$failed"
