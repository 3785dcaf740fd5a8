#!/bin/bash
# A study on Slurm: a Ray on the nodes of one job, which requeues itself at its time limit and then resumes.
#
#     sbatch cluster/slurm.sh RECIPE STUDY     start; what follows STUDY goes to `carft-ray search`
#     carft-ray status STUDY --watch           watch, where STUDY is seen; the log is carft-JOBID.out
#     carft-ray stop STUDY                     stop: checkpoints are written, nothing is requeued
#     sbatch cluster/slurm.sh RECIPE STUDY     resume, after a stop, a scancel or the end of Ray on a node
#
# Activate the environment that has carft-ray before sbatch; it and the images lie at the same place on all nodes. STUDY is
# a folder on a disk that all nodes see, or in a bucket (s3://...; then the folder of sbatch is on such a disk): it must
# be there when the job is requeued, on other nodes perhaps.
# What your site asks for comes from the command line: sbatch --partition=... --account=... --time=... cluster/slurm.sh
# As it stands: 4 nodes with 64 CPUs and 8 GPUs each, 4 trials of search_spaces/cluster.yaml at a time. All nodes of a
# job end together, so the first one runs the head and takes trials as the others do.
#
#SBATCH --job-name=carft-ray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=carft-%j.out
set -uo pipefail

GRACE_S=240 # for the checkpoints, of the 300 above; what has none by then resumes from the one before
LAST_S=600  # a TERM so shortly before the limit is the limit, whatever signal the site sends; others end for good

say() { echo "$(date '+%F %T') slurm.sh: $*"; }

if [ -z "${SLURM_JOB_ID:-}" ] || [ $# -lt 2 ]; then
    echo "start it as: sbatch cluster/slurm.sh RECIPE STUDY [OPTION ...]" >&2
    exit 2
fi
if ! command -v carft-ray >/dev/null || ! command -v ray >/dev/null; then
    echo "carft-ray and ray must be in PATH: activate their environment before sbatch" >&2
    exit 2
fi
recipe=$1 study=$2
shift 2
case $study in
    *://*) place=${SLURM_SUBMIT_DIR:-.} ;; # a bucket
    *) place=$(dirname "$study") ;;
esac
mkdir -p "$place" || exit 5

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) # this script runs there
port=$((20000 + SLURM_JOB_ID % 4000 * 3))                          # and the two after it: jobs may share a node
address=$first:$port
temp=/tmp/r$SLURM_JOB_ID # on each node: Ray's sockets need a short path on a local disk

# only this job knows the token; a file, as what stands in the environment is shown by many tools
unset RAY_AUTH_TOKEN RAY_ADDRESS
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH
RAY_AUTH_TOKEN_PATH=$(realpath "$place")/.ray-token-$SLURM_JOB_ID # on a disk that all nodes see
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH") || exit 5

ray_head="" workers="" current="" lost="" stopping="" stopped_at=0

# shellcheck disable=SC2329 # called by the traps
stop() { # the search writes checkpoints and ends; a second signal changes nothing
    if [ -z "$stopping" ]; then
        stopping=$1 stopped_at=$SECONDS
        say "$1: stopping the search"
        [ -z "$current" ] || kill -TERM "$current" 2>/dev/null
    fi
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

end() { # ends what this script has started, by process id: `ray stop` would end every Ray of the node
    trap '' USR1 TERM
    for process in $current $workers $ray_head; do
        kill -TERM "$process" 2>/dev/null
        wait "$process" 2>/dev/null
    done
    rm -rf "$temp" "$RAY_AUTH_TOKEN_PATH"
}
trap end EXIT

follow() { # runs a command until it ends; returns its exit code. Signals are taken meanwhile
    "$@" &
    current=$!
    while kill -0 "$current" 2>/dev/null; do
        for process in $ray_head $workers; do
            if [ -z "$stopping$lost" ] && ! kill -0 "$process" 2>/dev/null; then
                lost=1
                say "a part of Ray has ended: stopping the search; its messages stand above"
                kill -TERM "$current"
            fi
        done
        if [ -n "$stopping" ] && [ $((SECONDS - stopped_at)) -gt "$GRACE_S" ]; then
            say "no end within $GRACE_S s"
            kill -KILL "$current"
        fi
        sleep 0.5 &
        wait $!
    done
    wait "$current"
    local code=$?
    current=""
    return $code
}

node=(--num-cpus "$SLURM_CPUS_PER_TASK" --temp-dir "$temp" --object-store-memory 134217728 --disable-usage-stats)
node+=(--dashboard-agent-listen-port 0 --min-worker-port 0 --max-worker-port 0 --block)
say "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_JOB_NUM_NODES nodes, head on $first"
say "dashboard: ssh -L 8265:127.0.0.1:$((port + 1)) $first; its token is in $RAY_AUTH_TOKEN_PATH"
ray start --head --port "$port" --dashboard-host 127.0.0.1 --dashboard-port $((port + 1)) \
    --ray-client-server-port $((port + 2)) "${node[@]}" &
ray_head=$!
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    others=$((SLURM_JOB_NUM_NODES - 1))
    # shellcheck disable=SC2016 # expanded on the nodes
    on_node='ray start --address "$@" & ray=$!; trap "kill -TERM $ray" TERM
        while kill -0 $ray 2>/dev/null; do wait $ray; done; rm -rf "$0"'
    srun --nodes="$others" --ntasks="$others" --exclude="$first" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        bash -c "$on_node" "$temp" "$address" "${node[@]}" &
    workers=$!
fi

code=130
if [ -z "$stopping$lost" ]; then
    # waits for the head, and takes further nodes as they join
    follow carft-ray search "$recipe" --study "$study" --address "$address" --set resources.wait_for_nodes=10m "$@"
    code=$?
fi
[ -z "$lost" ] || code=5
say "the search has ended with exit code $code"

left=$((${SLURM_JOB_END_TIME:-0} - $(date +%s))) # seconds; negative where this Slurm does not tell
if [ -n "$stopping" ] && [ $code -ne 0 ]; then
    if [ "$stopping" = USR1 ] || { [ $left -gt 0 ] && [ $left -lt $LAST_S ]; }; then
        end
        trap - EXIT
        say "requeued: the same study resumes"
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit $code
