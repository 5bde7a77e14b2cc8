# shellcheck shell=bash
# Sourced by the job scripts of this folder, with $home set to the project's folder: arguments,
# Python (bare venv or container), srun steps that pass signals on, requeueing and its limit.
# The environment variables that it reads are listed in slurm/README.md.

home=$(cd "$home" && pwd) || exit 2
cd "$home" || exit 2
export KOSMOSG_HOME=$home PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}

EXIT_STOPPED=85 # of megatron_kosmosg.train: state is saved, start again
MAX_STALLED_STARTS=${KOSMOSG_MAX_STALLED_STARTS:-3}

say() { printf '%(%H:%M:%S)T slurm: %s\n' -1 "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# ---- arguments: [--check] [--config FILE] [--sweep FILE] [SBATCH OPTIONS, with --check] [-- REST...]

check='' options=() rest=() sweep=()
read_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
            --check) check=yes ;;
            --config)
                [ $# -gt 1 ] || die "--config needs a file"
                config=$2
                shift
                ;;
            --sweep) # line N of FILE: further settings of task N of a job array
                [ -f "${2-}" ] || die "--sweep needs a file, one line of settings per array task"
                read -ra sweep <<<"$(sed -n "${SLURM_ARRAY_TASK_ID:-1}p" "$2")"
                [ ${#sweep[@]} -gt 0 ] || die "$2 has no line ${SLURM_ARRAY_TASK_ID:-1}"
                shift
                ;;
            --)
                shift
                rest=("$@")
                break
                ;;
            -*) options+=("$1") ;;
            *) die "$1: settings and tool arguments come after --, as in: sbatch SCRIPT -- $1" ;;
        esac
        shift
    done
    rest+=(${sweep[@]+"${sweep[@]}"})
    if [ -n "${SLURM_JOB_ID:-}" ] || [ -n "$check" ]; then
        if [ ${#options[@]} -gt 0 ] && { [ -z "$check" ] || [ -n "${SLURM_JOB_ID:-}" ]; }; then
            die "${options[*]}: options of sbatch come before the script, as in: sbatch ${options[*]} SCRIPT"
        fi
        return
    fi
    die "start this with sbatch, or look at it first with: bash $0 --check"
}

# ---- how a process is started --------------------------------------------------------------------

# SRUN_OPTIONS are for every step; a container image (pyxis) replaces the virtual environment.
read -ra srun_options <<<"${KOSMOSG_SRUN_OPTIONS:-}"
if [ -n "${KOSMOSG_CONTAINER:-}" ]; then
    python=python
    srun_options+=(
        "--container-image=$KOSMOSG_CONTAINER"
        "--container-mounts=$home:$home${KOSMOSG_MOUNTS:+,$KOSMOSG_MOUNTS}"
        "--container-workdir=$home"
    )
else
    python=${VIRTUAL_ENV:-${KOSMOSG_VENV:-$home/.venv}}/bin/python
    [ -x "$python" ] || die "$python does not exist: export KOSMOSG_VENV=FOLDER of a virtual" \
        "environment on a file system that every node sees, or KOSMOSG_CONTAINER=IMAGE"
fi

num_tasks() { echo "${SLURM_NTASKS:-$((${SLURM_JOB_NUM_NODES:-1} * ${SLURM_NTASKS_PER_NODE:-1}))}"; }

# Sites and users win: nothing that is already set is changed. slurm/README.md explains each.
set_defaults() {
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export PYTHONUNBUFFERED=1
}

# step SRUN_OPTIONS... COMMAND...: one job step; its exit code. It runs in the background, so that a
# signal to this shell is acted on at once: USR1 (sbatch --signal=B:...) is passed on to the tasks.
# TERM comes when Slurm itself ends the job (time limit, scancel, pre-emption); tasks get it, too.
running='' told='' ended_by_slurm=''
step() {
    local status
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
    told=$1
    say "signal $1"
    if [ "$1" = TERM ]; then ended_by_slurm=yes; fi
    if [ -n "$running" ]; then kill -USR1 "$running" 2>/dev/null; fi
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

# ---- checks --------------------------------------------------------------------------------------

# The dry run of this config on the job's number of ranks; sets run_folder and save_folder from it.
dry_run() {
    local report
    report=$("$@" "$python" -m megatron_kosmosg.train --config "$config" --dry-run \
        ${SLURM_JOB_ID:+"parallel.world_size=$(num_tasks)"} ${rest[@]+"${rest[@]}"}) || return 2
    printf '%s\n' "$report"
    run_folder=$(sed -n "s/^  output_dir: //p" <<<"$report" | tr -d "'\"")
    save_folder=$(sed -n "s/^  save: //p" <<<"$report" | tr -d "'\"")
    if [ "$save_folder" = null ]; then save_folder=$run_folder/checkpoints; fi
}

# What `bash SCRIPT --check` does on a login node: dry run, plan, and sbatch's own opinion.
check_before_sbatch() {
    [ -z "${KOSMOSG_CONTAINER:-}" ] || python=${KOSMOSG_VENV:+$KOSMOSG_VENV/bin/}python3
    if [ -n "${config:-}" ]; then
        dry_run || exit 2
        "$python" tools/plan.py --config "$config" --gpu "${KOSMOSG_GPU:-h100-80}" \
            ${rest[@]+"${rest[@]}"} || exit
    fi
    if command -v sbatch >/dev/null; then
        ask_sbatch "$0"
    else
        say "no sbatch on this machine: partition, account and sizes were not checked"
    fi
}

# Slurm's answer to the options of SCRIPT and those of --check, in words that name the repair.
ask_sbatch() {
    local answer
    if answer=$(sbatch --test-only ${options[@]+"${options[@]}"} "$1" 2>&1); then
        say "${answer#sbatch: }"
        return
    fi
    printf '%s\n' "$answer" >&2
    case $answer in
        *ccount*) die "choose an account with --account or SBATCH_ACCOUNT; sacctmgr show" \
            "associations user=$(id -un) lists yours" ;;
        *partition*) die "choose a partition with --partition or SBATCH_PARTITION:" \
            "$(sinfo -h -o '%R (%D nodes, %G)' | sort -u | paste -sd ';')" ;;
        *[Nn]ode* | *rocessors* | *"CPU count"*) die "the cluster cannot give this: ask for less" \
            "with --nodes, --gpus-per-node, --cpus-per-task; it has" \
            "$(sinfo -h -o '%D nodes of %c CPUs, %G in %R' | paste -sd ';')" ;;
        *) die "Slurm refuses the job" ;;
    esac
}

# The job's tasks as training will see them: ranks in block order, GPUs visible to each.
check_tasks() {
    local seen
    # shellcheck disable=SC2016
    seen=$(step bash -c 'echo "$SLURM_PROCID $SLURM_NODEID $SLURM_LOCALID ${CUDA_VISIBLE_DEVICES:-none}"') ||
        die "srun could not start $(num_tasks) tasks"
    sort -n <<<"$seen" | awk -v wanted="$(num_tasks)" '
        $1 != NR - 1 { print "error: rank " NR - 1 " is missing"; bad = 1; exit }
        $2 < node { print "error: rank " $1 " goes back to node " $2; bad = 1; exit }
        { node = $2; gpus[$4 == "none" ? 0 : split($4, unused, ",")] = 1 }
        END {
            if (bad || NR != wanted) { print "error: " NR " of " wanted " tasks answered"; exit 1 }
            for (count in gpus) shown = shown (shown == "" ? "" : " or ") count
            print NR " tasks on " node + 1 " nodes, ranks in block order, " shown " GPUs visible to each"
        }' || exit 1
}

# Fails if a node is not fit for the run. All nodes speak before the step ends.
preflight() {
    step --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
        "$python" tools/preflight.py node --folder "$run_folder" \
        --gpus "${KOSMOSG_GPUS_PER_NODE:-${SLURM_GPUS_PER_NODE:-0}}" \
        --free-gib "${KOSMOSG_FREE_GIB:-100}" || return
    step --distribution=block "$python" tools/preflight.py network
}

# ---- starting again ------------------------------------------------------------------------------

newest_iteration() {
    local newest
    newest=$(printf '%s\n' "$save_folder"/iter_* | sed -n 's/.*iter_0*\([0-9][0-9]*\)$/\1/p' | sort -n | tail -n 1)
    echo "${newest:-0}"
}

# Counts starts since the last new checkpoint; fails when there were too many. A job that a person
# submits anew starts counting anew.
count_start() {
    local iteration before='' count=0
    iteration=$(newest_iteration)
    mkdir -p "$run_folder" || return 1
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -f "$run_folder/slurm_starts" ]; then
        read -r before count <"$run_folder/slurm_starts"
    fi
    if [ "$iteration" = "$before" ]; then count=$((count + 1)); else count=0; fi
    printf '%s %s\n' "$iteration" "$count" >"$run_folder/slurm_starts"
    say "start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID from iteration $iteration"
    [ "$count" -le "$MAX_STALLED_STARTS" ] || stalled
}
stalled() {
    say "stopped: $MAX_STALLED_STARTS restarts in a row brought no new checkpoint after iteration" \
        "$(newest_iteration); see $run_folder/failure.txt, then submit again"
    return 1
}

# Ends the job after its last step: 0 done; requeued after a signal or a crash; else the step's code.
finish() {
    local status=$1 before='' count=0
    if [ "$status" -eq 0 ]; then
        rm -f "${run_folder:-/nonexistent}/slurm_starts"
        say "done"
        exit 0
    fi
    if [ -n "$ended_by_slurm" ]; then
        say "ended by Slurm (scancel, time limit or pre-emption); exit code $status"
        exit "$status"
    fi
    if [ -n "${run_folder:-}" ]; then
        if [ "$status" -ne "$EXIT_STOPPED" ] && repeats_itself; then
            say "not requeued: the same error would come again (exit code $status)"
            exit "$status"
        fi
        read -r before count <"$run_folder/slurm_starts"
        if [ "$(newest_iteration)" = "$before" ] && [ "$count" -ge "$MAX_STALLED_STARTS" ]; then
            stalled
            exit 1
        fi
    elif [ "$status" -le 128 ] && [ "$status" -ne "$EXIT_STOPPED" ]; then
        exit "$status" # a tool's own error; only an interrupted tool is started again
    fi
    say "exit code $status: requeued"
    scontrol requeue "$SLURM_JOB_ID" || {
        say "Slurm refused to requeue; submit the same command again to go on"
        exit "$status"
    }
    exit 0
}
repeats_itself() {
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
    dry_run step --nodes=1 --ntasks=1 --ntasks-per-node=1 || exit 2
    if [ -n "$check" ]; then
        check_tasks
        exit 0
    fi
    count_start || exit 1
    if [ "${KOSMOSG_PREFLIGHT:-1}" != 0 ]; then
        preflight || {
            [ $? -le 128 ] || finish "$EXIT_STOPPED"
            die "a node is not fit for the run (see above); submit again with --exclude=NODE"
        }
    fi
    # Ranks that stop together do not end in the same moment: the first one's exit code (85) must not
    # get the others killed. After two minutes it does, so that a crash leaves nothing behind.
    step --distribution=block --kill-on-bad-exit=0 --wait=120 \
        "$python" -m megatron_kosmosg.train --config "$config" \
        "parallel.world_size=$(num_tasks)" ${rest[@]+"${rest[@]}"}
    finish $?
}

# run_tool TOOL "$@": a restartable program of tools/, with the arguments after `--`.
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
    step --distribution=block "$python" "$tool" ${rest[@]+"${rest[@]}"}
    finish $?
}
