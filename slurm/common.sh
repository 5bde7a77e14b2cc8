# shellcheck shell=bash
# Sourced by the job scripts of this folder, with $home set to the project's folder: arguments,
# Python (bare venv or container), srun steps that pass signals on, requeueing and its limit.
# The environment variables that it reads are listed in slurm/README.md.
# Long, because signals, steps and requeueing share state; checks.sh has what comes before training.

script=$(realpath "$0") || exit 2
home=$(cd "$home" && pwd) || exit 2
cd "$home" || exit 2
export KOSMOSG_HOME=$home PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}

# As in megatron_kosmosg/exit_codes.py.
EXIT_FAILURE=1 EXIT_BAD_INPUT=2 EXIT_MISSED=3
EXIT_STOPPED=85 # of training: state is saved, start again

# digits VALUE ELSE: VALUE if it is digits alone, without leading zeros; otherwise ELSE. What comes
# from a file or the environment goes through it before bash's arithmetic, which runs commands that
# it finds in a value.
digits() {
    if [[ $1 =~ ^0*([0-9]{1,15})$ ]]; then echo "${BASH_REMATCH[1]}"; else echo "$2"; fi
}
MAX_STALLED_STARTS=$(digits "${KOSMOSG_MAX_STALLED_STARTS:-3}" 3)

# shellcheck source=slurm/checks.sh
source "$home/slurm/checks.sh"
# shellcheck source=slurm/limits.sh
source "$home/slurm/limits.sh"

say() { printf '%(%Y-%m-%d %H:%M:%S)T slurm: %s\n' -1 "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit "$EXIT_BAD_INPUT"
}

# ---- arguments ----------------------------------------------------------------------------------

usage() {
    sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//;p;}' "$script" # the head of the script
    cat <<'END'

sbatch [SBATCH OPTIONS] SCRIPT [OPTIONS] [-- SETTINGS (key=value) OR THE TOOL'S ARGUMENTS]
bash SCRIPT --check [SBATCH OPTIONS] [OPTIONS] [-- ...]

  --check         submit nothing: dry run, plan, and whether Slurm would take the job;
                  with sbatch: dry run on the nodes and one empty task for every GPU
  --fastest       the fastest layout that is planned for so many GPUs of kind KOSMOSG_GPU; images
                  or cached latents as the settings say
  --config FILE   train this config instead of the script's own
  --sweep FILE    in a job array: further settings, line N for array task N
  --help          this text

slurm/README.md has the rest: first steps, requeueing, containers, environment variables.
END
}

# read_sweep FILE NUMBER: `sweep` from that line, words as a shell reads them, nothing expanded.
read_sweep() {
    local line
    line=$(sed -n "$2p" "$1")
    mapfile -d '' sweep < <(xargs -r printf '%s\0' <<<"$line" 2>/dev/null)
    [ ${#sweep[@]} -gt 0 ] ||
        die "$1 has no line $2, or one whose quotes do not end"
}

check='' fastest='' early='' files='' options=() rest=() sweep=()
read_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
            --config=* | --sweep=*)
                set -- "${1%%=*}" "${1#*=}" "${@:2}"
                continue
                ;;
            --check) check=yes ;;
            --fastest) fastest=yes ;;
            -h | --help)
                usage
                exit 0
                ;;
            --config)
                [ $# -gt 1 ] || die "--config needs a file"
                config=$2
                shift
                ;;
            --sweep) # line N of FILE: further settings of task N of a job array
                [ -f "${2-}" ] || die "--sweep needs a file, one line of settings per array task"
                read_sweep "$2" "$(digits "${SLURM_ARRAY_TASK_ID:-1}" 1)"
                shift
                ;;
            --)
                shift
                rest=("$@")
                break
                ;;
            -*) options+=("$1") ;;
            *)
                [ ${#options[@]} -eq 0 ] || [ -n "${SLURM_JOB_ID:-}" ] ||
                    die "${options[*]: -1} $1: write an option of sbatch as one word, --name=value"
                die "$1: settings and tool arguments come after --, as in: sbatch SCRIPT -- $1"
                ;;
        esac
        shift
    done
    rest+=(${sweep[@]+"${sweep[@]}"})
    if [ ${#options[@]} -gt 0 ] && { [ -z "$check" ] || [ -n "${SLURM_JOB_ID:-}" ]; }; then
        die "${options[*]}: not an option of this script (--help shows them); options of sbatch" \
            "come before the script, as in: sbatch ${options[*]} SCRIPT"
    fi
    [ -n "${SLURM_JOB_ID:-}" ] || [ -n "$check" ] ||
        die "start this with sbatch, or look at it first with: bash $0 --check"
    choose_python
}

# ---- how a process is started --------------------------------------------------------------------

# SRUN_OPTIONS are for every step; a container image (pyxis) replaces the virtual environment.
read -ra srun_options <<<"${KOSMOSG_SRUN_OPTIONS:-}"
# Tasks of a tool work by themselves: one that fails does not end the others, whose exit code (that
# of TERM) would hide its own.
tool_options=(--kill-on-bad-exit=0)
choose_python() {
    if [ -n "${KOSMOSG_CONTAINER:-}" ]; then
        python=python
        srun_options+=(
            "--container-image=$KOSMOSG_CONTAINER"
            "--container-mounts=$home:$home${KOSMOSG_MOUNTS:+,$KOSMOSG_MOUNTS}"
            "--container-workdir=$home"
        )
        return
    fi
    python=${VIRTUAL_ENV:-${KOSMOSG_VENV:-$home/.venv}}/bin/python
    [ -x "$python" ] || die "$python does not exist: make the virtual environment (slurm/README.md," \
        "'From zero'), or export KOSMOSG_VENV=FOLDER of one on a file system that every node sees," \
        "or KOSMOSG_CONTAINER=IMAGE"
}

# The job's tasks; before there is a job, those that sbatch would be asked for.
num_tasks() {
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        local nodes each
        nodes=$(digits "${SLURM_JOB_NUM_NODES:-1}" 1) each=$(digits "${SLURM_NTASKS_PER_NODE:-1}" 1)
        echo "${SLURM_NTASKS:-$((nodes * each))}"
    else
        echo $(($(asked nodes) * $(asked ntasks-per-node)))
    fi
}

# Sites and users win: nothing that is already set is changed. slurm/README.md explains each.
set_defaults() {
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # Of every rank, at import; this project needs neither.
    export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore:Transformer Engine and Apex are not installed}
    export PYTHONUNBUFFERED=1
    # sbatch --export=NONE leaves a word for srun that would keep all of the above from the tasks.
    export SLURM_EXPORT_ENV=ALL
}

# step SRUN_OPTIONS... COMMAND...: one job step; its exit code. It runs in the background, so that a
# signal to this shell is acted on at once: USR1 (sbatch --signal=B:...) is passed on to the tasks.
# TERM comes when Slurm itself ends the job (time limit, scancel, pre-emption); tasks get it, too.
# After either no further step begins. (In $(...), signals are not heard.)
running='' told='' stop_asked='' ended_by_slurm=''
step() {
    local status
    [ -z "$stop_asked" ] || return "$EXIT_STOPPED"
    # srun does not take --cpus-per-task from the job since Slurm 22.05.
    srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
        ${srun_options[@]+"${srun_options[@]}"} "$@" &
    running=$!
    while :; do
        told=''
        wait "$running"
        status=$?
        [ -n "$told" ] || break # else `wait` was interrupted by a signal
    done
    running=''
    return $status
}
pass_on() {
    told=$1 stop_asked=yes
    say "signal $1"
    if [ "$1" = TERM ]; then ended_by_slurm=yes; fi
    if [ -n "$running" ]; then kill -USR1 "$running" 2>/dev/null; fi
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

# Whether a step's exit code is that of a stop request: 85, or what USR1 does to a program that does
# not listen for it yet. Not that of TERM: srun sends it to the tasks beside one that failed.
was_stopped() { [ "$1" -eq "$EXIT_STOPPED" ] || [ "$1" -eq 138 ]; }

# ---- starting again ------------------------------------------------------------------------------

newest_iteration() {
    local newest
    newest=$(printf '%s\n' "$save_folder"/iter_* | sed -n 's/.*iter_0*\([0-9][0-9]*\)$/\1/p' | sort -n | tail -n 1)
    echo "${newest:-0}"
}

# read_starts: `before` and `count` as an earlier start wrote them; the run folder may be shared.
read_starts() {
    local found='' number=''
    if [ -f "$run_folder/slurm_starts" ]; then
        read -r found number <"$run_folder/slurm_starts" || true
    fi
    before=$(digits "$found" '') count=$(digits "$number" 0)
}

# Counts starts since the last new checkpoint; fails when there were too many. A job that a person
# submits anew starts counting anew.
count_start() {
    local iteration before='' count=0
    iteration=$(newest_iteration)
    mkdir -p "$run_folder" || cannot_write "$run_folder"
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then read_starts; fi
    if [ "$iteration" = "$before" ]; then count=$((count + 1)); else count=0; fi
    printf '%s %s\n' "$iteration" "$count" >"$run_folder/slurm_starts" ||
        cannot_write "$run_folder/slurm_starts"
    if [ -n "$before" ] && [ "$iteration" != "$before" ]; then
        rm -f "$(early_starts)"
        count_early_start
    fi
    say "start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID from iteration $iteration"
    [ "$count" -le "$MAX_STALLED_STARTS" ] || stalled
}
# A disk that is full or read-only is so for the next start, too.
cannot_write() { die "$1 cannot be written (see above): make room there, or choose another folder" \
    "with logging.output_dir, then submit again"; }
stalled() {
    say "stopped: $MAX_STALLED_STARTS restarts in a row brought no new checkpoint after iteration" \
        "$(newest_iteration); see $run_folder/failure.txt, then submit again"
    return 1
}

# Ends the job after its last step: 0 done; requeued after a signal or a crash; else the step's code.
finish() {
    local status=$1 before='' count=0
    if [ "$status" -eq 0 ]; then
        rm -f "${run_folder:-/nonexistent}/slurm_starts" "$(early_starts)"
        say "done"
        exit 0
    fi
    if [ -n "$ended_by_slurm" ]; then
        rm -f "$(early_starts)"
        say "ended by Slurm (scancel, time limit or pre-emption); exit code $status"
        exit "$status"
    fi
    if [ -n "${run_folder:-}" ]; then
        if repeats_itself "$status"; then
            rm -f "$(early_starts)"
            say "not requeued: the same error would come again (exit code $status)"
            exit "$status"
        fi
        read_starts
        if was_stopped "$status" && [ "$(newest_iteration)" = "$before" ]; then
            end_if_too_short $((count + 1 > early ? count + 1 : early))
        else
            rm -f "$(early_starts)"
        fi
        if [ "$(newest_iteration)" = "$before" ] && [ "$count" -ge "$MAX_STALLED_STARTS" ]; then
            stalled
            exit "$EXIT_FAILURE"
        fi
    elif [ -n "$early" ] && was_stopped "$status"; then
        end_if_too_short "$early"
    elif ! was_stopped "$status" &&
        { [ "$status" -le 128 ] || [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_STALLED_STARTS" ]; }; then
        say "not requeued: exit code $status, start ${SLURM_RESTART_COUNT:-0}"
        exit "$status" # a tool's own error, or one that is killed (out of memory?) every time
    fi
    say "exit code $status: requeued"
    scontrol requeue "$SLURM_JOB_ID" || {
        say "Slurm refused to requeue; submit the same command again to go on"
        exit "$status"
    }
    exit 0
}
# Whether a run that ended with this exit code would end so again. A rank that is killed while
# others leave has the higher code, so the first error of the run counts as well.
repeats_itself() {
    case $1 in
        "$EXIT_STOPPED") return 1 ;;
        "$EXIT_BAD_INPUT" | "$EXIT_MISSED") return 0 ;;
    esac
    grep -qsE '^(megatron_kosmosg\.config\.errors\.ConfigError|FloatingPointError)' \
        "$run_folder/failure.txt"
}

# ---- what the scripts call -----------------------------------------------------------------------

# run_stage CONFIG "$@": a training stage.
run_stage() {
    config=$1
    shift
    read_arguments "$@"
    set_defaults
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        check_before_sbatch
        exit 0
    fi
    say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: $(num_tasks) tasks, project $home"
    if [ -z "$check" ]; then
        count_early_start
        warn_before_the_limit
    fi
    alone=(step --nodes=1 --ntasks=1 --ntasks-per-node=1)
    [ -z "$fastest" ] || take_fastest "${alone[@]}" || exit
    if [ -z "$check" ]; then files=--check-files; fi
    dry_run "${alone[@]}" || {
        status=$?
        was_stopped "$status" && finish "$EXIT_STOPPED"
        rm -f "$(early_starts)"
        exit "$status"
    }
    if [ -n "$check" ]; then
        check_tasks
        exit 0
    fi
    count_start || exit "$EXIT_FAILURE"
    if [ "${KOSMOSG_PREFLIGHT:-1}" != 0 ]; then
        preflight || {
            status=$?
            { [ "$status" -le 128 ] && ! was_stopped "$status"; } || finish "$EXIT_STOPPED"
            say "a node is not fit for the run (see above); submit again with --exclude=NODE"
            exit "$EXIT_FAILURE"
        }
    fi
    # Ranks that stop together do not end in the same moment: the first one's exit code (85) must not
    # get the others killed. After two minutes it does, so that a crash leaves nothing behind.
    step --distribution=block --kill-on-bad-exit=0 --wait=120 \
        "$python" -m megatron_kosmosg.train --config "$config" \
        "parallel.world_size=$(num_tasks)" ${rest[@]+"${rest[@]}"}
    finish $?
}

# run_tool TOOL "$@": a restartable program of tools/, with the arguments after `--`. tool_steps are
# the steps that it takes one after the other, each on all tasks; one that is whole takes a moment.
tool_steps=('')
run_tool() {
    local tool=$1
    shift
    read_arguments "$@"
    set_defaults
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        "$python" "$tool" --help >/dev/null || die "$python cannot start $tool"
        check_before_sbatch
        exit 0
    fi
    say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: $(num_tasks) tasks of $tool"
    if [ -n "$check" ]; then
        check_tasks
        exit 0
    fi
    warn_before_the_limit
    local each status=0
    for each in "${tool_steps[@]}"; do
        step --distribution=block "${tool_options[@]}" \
            "$python" "$tool" ${rest[@]+"${rest[@]}"} ${each:+--only "$each"}
        status=$?
        [ "$status" -eq 0 ] || break
    done
    finish "$status"
}
