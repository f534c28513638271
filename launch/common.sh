# shellcheck shell=bash
# What several launchers check before they submit anything; sourced by them.

# fail MESSAGE: to stderr, with the launcher's name; exit code 2, which no launcher restarts.
fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# fill FILE WORD ...: a file beside the launchers, with the value of each variable in place of its ${WORD}.
fill() {
    local text word
    text=$(<"$(dirname "$0")/$1")
    for word in "${@:2}"; do
        text=${text//"\${$word}"/"${!word}"}
    done
    echo "$text"
}

# check_name NAME: becomes part of the names of pods and services, labels of at most 63 characters.
check_name() {
    [[ $1 =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ && ${#1} -le 40 ]] ||
        fail "NAME is '$1'; Kubernetes takes at most 40 of a-z, 0-9 and -, beginning with a letter and not ending in -"
}

# chips_per_host ACCELERATOR TOPOLOGY: of GKE's machine types (ct5lp-hightpu-8t, ct6e-standard-4t, ..). 2x4 also exists
# as two hosts of 4: CHIPS=4.
chips_per_host() {
    local sides
    case $1 in
        tpu-v5-lite-podslice | tpu-v6e-slice) sides=2 ;;
        tpu-v4-podslice | tpu-v5p-slice | tpu7x) sides=3 ;;
        *) fail "ACCELERATOR is '$1'; known: tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, tpu7x" ;;
    esac
    [[ $2 =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || fail "TOPOLOGY is '$2'; it looks like 4x4x4 or 16x16"
    local crosses=${2//[^x]/}
    ((${#crosses} + 1 == sides)) || fail "TOPOLOGY is '$2'; chips of $1 lie in shapes of $sides sides, such as $( ((sides == 2)) && echo 4x4 || echo 4x4x4)"
    case $2 in
        1x1 | 1x1x1) echo 1 ;;
        2x4) echo 8 ;;
        *) echo 4 ;;
    esac
}

# check_bucket BUCKET: Orbax renames folders when a checkpoint is complete. A bucket with a flat namespace cannot.
check_bucket() {
    command -v gcloud >/dev/null || return 0
    local namespace
    if ! namespace=$(gcloud storage buckets describe "gs://$1" --format='value(hierarchical_namespace.enabled)' 2>&1); then
        echo "$(basename "$0"): gs://$1 could not be looked at (${namespace%%$'\n'*}); it must have a hierarchical namespace" >&2
        return 0
    fi
    [[ $namespace == True ]] ||
        fail "gs://$1 has a flat namespace, in which folders cannot be renamed; make one by \`gcloud storage buckets create gs://.. --enable-hierarchical-namespace --uniform-bucket-level-access\`"
}
