# shellcheck shell=bash
# Sourced by common.sh: the job's time limit. When tasks are warned before it, what happens to starts
# that it leaves no time, and what --check says of it.
# shellcheck disable=SC2154

# seconds_of LIMIT: of a time as sbatch takes it (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S); nothing else.
seconds_of() {
    local days=0 rest=$1 hours=0 minutes=0 seconds=0
    [[ $rest =~ ^([0-9]{1,5}-)?[0-9]{1,6}(:[0-9]{1,2}){0,2}$ ]] || return
    if [[ $rest = *-* ]]; then
        days=${rest%%-*}
        IFS=: read -r hours minutes seconds <<<"${rest#*-}"
    else
        case $rest in
            *:*:*) IFS=: read -r hours minutes seconds <<<"$rest" ;;
            *) IFS=: read -r minutes seconds <<<"$rest" ;;
        esac
    fi
    echo $((((10#$days * 24 + 10#$hours) * 60 + 10#${minutes:-0}) * 60 + 10#${seconds:-0}))
}

# warning_seconds LIMIT: how long before the end of so many seconds tasks are told to save: a tenth,
# at most ten minutes and at least one, or half of a limit of less than two.
warning_seconds() {
    local least=$(($1 / 2)) before=$(($1 / 10))
    if [ "$least" -gt 60 ]; then least=60; fi
    if [ "$before" -lt "$least" ]; then before=$least; fi
    if [ "$before" -gt 600 ]; then before=600; fi
    digits "${KOSMOSG_WARN_SECONDS:-}" "$before"
}

# Of the job, as Slurm says it now: somebody may change it.
seconds_left() {
    local end
    end=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')
    [ -n "$end" ] && end=$(date -d "$end" +%s 2>/dev/null) || return
    echo $((end - $(date +%s)))
}

# In the background: USR1 to this shell when so much is left, as from sbatch --signal=B:USR1.
warn_before_the_limit() {
    local left before shell=$$
    left=$(seconds_left)
    [ -n "$left" ] || return 0
    before=$(warning_seconds "$left")
    (
        while left=$(seconds_left) && [ -n "$left" ] && [ "$left" -gt "$before" ]; do
            pause=$((left - before))
            sleep "$((pause > 60 ? 60 : pause))"
        done
        [ -z "$left" ] || kill -USR1 "$shell"
    ) >/dev/null 2>&1 &
    watch=$!
    trap 'kill "$watch" 2>/dev/null' EXIT
}

# Starts in a row that are told to stop without a new checkpoint are counted beside the job's output,
# as the run's folder is not known yet in a dry run, or while Python is loaded.
early_starts() { echo "${SLURM_SUBMIT_DIR:-$home}/.slurm_starts.$SLURM_JOB_ID"; }
count_early_start() {
    local count=''
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -f "$(early_starts)" ]; then
        read -r count <"$(early_starts)" || true
    fi
    early=$(($(digits "$count" 0) + 1))
    echo "$early" >"$(early_starts)" || say "cannot write $(early_starts)"
}

# Ends the job when the limit has left its third start in a row no time for a new checkpoint.
# $1: such starts so far, this one included.
end_if_too_short() {
    [ "$1" -ge "$MAX_STALLED_STARTS" ] || return 0
    say "stopped: $1 starts in a row were told to stop before they had saved one iteration; the" \
        "time limit is too short for a start, one iteration and one save: submit with a longer" \
        "--time"
    rm -f "$(early_starts)"
    exit "$EXIT_FAILURE"
}

# What a limit leaves, for --check. LEAST seconds are what Python, the model and a first batch take
# on a large cluster, with one iteration and one save.
LEAST=300
check_limit() {
    local limit before
    limit=$(seconds_of "$(asked_text time)")
    [ -n "$limit" ] || return 0
    before=$(warning_seconds "$limit")
    if [ $((limit - before)) -lt "$LEAST" ]; then
        say "warning: the time limit of $limit s leaves a start $((limit - before)) s before it is" \
            "told to stop; Python on all nodes, the model, one iteration and one save may take" \
            "longer, and $MAX_STALLED_STARTS such starts in a row end the job: give a longer --time"
    else
        say "time limit $limit s: tasks are told to save $before s before its end"
    fi
}
