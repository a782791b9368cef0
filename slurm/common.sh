# Sourced by every job: how its processes meet, and what happens when it has to stop.
#
# training.main saves at a step boundary on USR1 and TERM and exits with 75; with 76 it says that the
# machine failed it. Such a task is put back into the queue, this task alone, and goes on where it
# was. Every other failure is final.
set -euo pipefail

set -a
source "${CLUSTER:-slurm/cluster.env}"
set +a
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 # see training.prefetch
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1

# The task's name. SLURM_JOB_ID alone may stand for the whole array: that of its last task does.
TASK=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
TASK=${TASK:-$SLURM_JOB_ID}

# Job ids differ, so ports do; they lie below those that the kernel hands out by itself.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))
# srun no longer takes this from sbatch by itself (SLURM 22.05)
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

say() {
    echo "$(date '+%F %T') | task $TASK | $*"
}

# run COMMAND...: one process per task; then leave, or get back into the queue.
run() {
    local code
    # not all of its flags: a source of shards may hold a password
    say "on $SLURM_JOB_NODELIST, port $MASTER_PORT, restart ${SLURM_RESTART_COUNT:-0}:" \
        "${*:1:3}${LINES_FILE:+, line ${SLURM_ARRAY_TASK_ID:-1} of $LINES_FILE}"
    # --wait: when a process has ended, the others get 30 s to do so. --kill-on-bad-exit would not
    # let them: the first exit with 75 would kill a rank that is still saving.
    srun --kill-on-bad-exit=0 --wait=30 "$@" &
    local child=$!
    trap 'kill -USR1 "$child" 2>/dev/null || true' USR1 USR2 TERM
    while :; do # wait returns early when a signal comes
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    trap '' USR1 USR2 TERM
    case $code in
        75 | 138 | 140 | 143) requeue "$code" ;; # saved; or USR1, USR2, TERM before it could listen
        76) requeue "$code" ;; # its device or network failed, not the program
        *) exit "$code" ;;
    esac
}

# requeue CODE: put this task alone back into the queue, unless someone cancelled it, SLURM, which
# pre-empted it, does so by itself, or it has begun again too often without saving more.
requeue() {
    local state
    state=$(patiently squeue --noheader --states=all --jobs="$TASK" --format='%T %r') || exit "$1"
    say "stopped with exit code $1, state $state"
    case $state in
        "RUNNING "* | *" TimeLimit") ;;
        *) exit "$1" ;;
    esac
    if (($(restarts_in_vain) >= MAX_RESTARTS)); then
        echo "error: task $TASK was restarted $MAX_RESTARTS times (MAX_RESTARTS) without saving" \
            "more: giving up" >&2
        exit 1
    fi
    patiently scontrol requeue "$TASK" || exit "$1"
    exit 0
}

# patiently COMMAND...: again, for some minutes, while it fails: SLURM's controller may be down.
patiently() {
    local try
    for try in {1..20}; do
        "$@" && return
        say "try $try of 20: ${*:1:2} failed" >&2
        sleep "${RETRY_SECONDS:-15}"
    done
    return 1
}

# restarts_in_vain: how many of this task's restarts there were since its newest checkpoint changed;
# all of them, if it writes none. That is kept in a file beside the task's flags.
restarts_in_vain() {
    local restarts=${SLURM_RESTART_COUNT:-0} since=0 before='' newest
    local file=${LINES_FILE%.lines}-$TASK.saved # of this submission alone
    if [ -n "$RUN" ]; then
        newest=$(cat "$RUN"/{,rdm/}checkpoints/latest.json 2>/dev/null | cksum) || true
        { read -r since before <"$file"; } 2>/dev/null || true
        if [ "$newest" != "$before" ]; then
            since=$restarts
            echo "$since $newest" >"$file"
        fi
    fi
    echo $((restarts - since))
}

# arguments FILE: the flags in this task's line of FILE, as the array `arguments`; and as RUN the
# directory of the run that they are of.
RUN='' LINES_FILE=''
arguments() {
    LINES_FILE=$1
    local line i name='' logs=''
    line=$(sed -n "${SLURM_ARRAY_TASK_ID:-1}p" "$1")
    [ -n "$line" ] || { echo "error: $1 has no line ${SLURM_ARRAY_TASK_ID:-1}" >&2; exit 2; }
    eval "arguments=($line)" # plan.py quoted it
    for ((i = 1; i < ${#arguments[@]}; i++)); do
        case ${arguments[i - 1]} in
            --name) name=${arguments[i]} ;;
            --logs) logs=${arguments[i]} ;;
        esac
    done
    RUN=${name:+$logs/$name}
}
