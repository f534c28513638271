#!/usr/bin/env bash
# again.sh COMMAND ...: runs it, and again when it asks for that (exit code 75) or was killed, at most $RESTARTS times.
# SIGTERM is passed on; then nothing is started again.
set -uo pipefail
ended=no
trap 'ended=yes; kill -TERM "$child" 2>/dev/null' TERM INT
for ((restart = 0; ; restart++)); do
    "$@" &
    child=$!
    wait "$child"
    code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, not the command
        wait "$child"
        code=$?
    done
    if [[ $ended == yes ]] || ((code != 75 && code <= 128 || restart >= ${RESTARTS:-10})); then
        exit "$code"
    fi
    echo "again.sh: exit code $code, restart $((restart + 1)) of at most ${RESTARTS:-10}: $*" >&2
    sleep 2
done
