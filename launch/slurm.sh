#!/usr/bin/env bash
# GPU nodes under SLURM, a process for each GPU: slurm.sh [--dry-run] NODES GPUS_PER_NODE RECIPE [OPTION OF brewjax run ...]
# To be run where the recipe's paths are right, on a file system that all nodes share, with brewjax on the PATH.
# SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT and the like are sbatch's own variables. Logs: logs/.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
dry=no
[[ ${1:-} != --dry-run ]] || { dry=yes && shift; }
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ || ! ${2:-} =~ ^[1-9][0-9]*$ || -z ${3:-} ]]; then
    echo "usage: launch/slurm.sh [--dry-run] NODES GPUS_PER_NODE RECIPE [OPTION OF brewjax run ...]" >&2
    exit 2
fi
nodes=$1 gpus=$2
shift 2
# SLURM sends SIGTERM two minutes before the time is over: a checkpoint is saved, and the job queues again on 75.
# With --kill-on-bad-exit a lost process ends all, which then start again together.
script=$(
    cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=brewjax
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.log
export BREWJAX_DISTRIBUTED=auto
code=0
srun --kill-on-bad-exit=1 --output=logs/%x-%j-%t.log --open-mode=append brewjax run ${*@Q} || code=\$?
if (( (code == 75 || code > 128) && \${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-10} )); then
    scontrol requeue "\$SLURM_JOB_ID"
fi
exit \$code
END
)
if [[ $dry == yes ]]; then
    echo "$script"
    exit
fi
command -v sbatch >/dev/null || fail "no sbatch here; run this on a login node, or add --dry-run"
mkdir -p logs
if ! reply=$(sbatch 2>&1 <<<"$script"); then
    echo "slurm.sh: sbatch refused: $reply" >&2
    case $reply in
        *partition*) echo "Name one of \`sinfo -s\`: export SBATCH_PARTITION=..." >&2 ;;
        *ccount* | *QOS* | *olicy*) echo "Your limits: \`sacctmgr show assoc user=$USER\`; export SBATCH_ACCOUNT=..." >&2 ;;
        *"node configuration"* | *"not available"*) echo "No node has $gpus GPUs, or there are not $nodes: \`sinfo -o '%P %D %G'\`" >&2 ;;
    esac
    exit 2
fi
echo "$reply; logs/ has a file for each process
while it waits, \`squeue --me -o '%i %r'\` says why: Resources or Priority is capacity, Assoc.. or QOS.. is quota"
