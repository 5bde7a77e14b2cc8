# shellcheck shell=bash
# Sourced by common.sh: what is looked at before training starts, on a login node and in a job.
# shellcheck disable=SC2119,SC2120,SC2154

# asked NAME: the number in the last --NAME=... of --check's options, else of the script itself.
asked() {
    { grep "^#SBATCH --$1=" "$script" && printf '%s\n' ${options[@]+"${options[@]}"}; } |
        sed -n "s/^\(#SBATCH \)\{0,1\}--$1=\([0-9]*\).*/\2/p" | tail -n 1
}

# asked_text NAME: the same for what is no number.
asked_text() {
    { grep "^#SBATCH --$1=" "$script" && printf '%s\n' ${options[@]+"${options[@]}"}; } |
        sed -n "s/^\(#SBATCH \)\{0,1\}--$1=\([^ ]*\).*/\2/p" | tail -n 1
}

# The dry run of this config on the job's number of ranks; sets run_folder and save_folder from it.
dry_run() {
    local report status
    report=$(mktemp) || return
    "$@" "$python" -m megatron_kosmosg.train --config "$config" --dry-run ${files:+"$files"} \
        "parallel.world_size=$(num_tasks)" ${rest[@]+"${rest[@]}"} >"$report"
    status=$?
    cat "$report"
    if [ "$status" -eq 0 ]; then
        run_folder=$(sed -n "s/^  output_dir: //p" "$report" | tr -d "'\"")
        rank_gib=$(digits "$(sed -n "s/^the machine's memory: at most \([0-9]*\) GiB a rank.*/\1/p" "$report")" 0)
        save_folder=$(sed -n "s/^  save: //p" "$report" | tr -d "'\"")
        if [ "$save_folder" = null ]; then save_folder=$run_folder/checkpoints; fi
    fi
    rm -f "$report"
    return "$status"
}

# Adds the settings of the fastest planned layout to those given. The plan is the same at every start.
take_fastest() {
    local report settings setting status
    report=$(mktemp) || return
    "$@" "$python" tools/plan.py --config "$config" --num-gpus "$(num_tasks)" \
        --gpu "${KOSMOSG_GPU:-h100-80}" --search --keep-targets ${rest[@]+"${rest[@]}"} >"$report"
    status=$?
    read -ra settings <<<"$(sed -n 's/^its settings: //p' "$report")"
    [ "$status" -eq 0 ] || cat "$report"
    rm -f "$report"
    [ "$status" -eq 0 ] || return "$status"
    for setting in "${settings[@]}"; do
        case $setting in
            data.latent_cache=*) ;; # stays as it was given
            *) rest+=("$setting") ;;
        esac
    done
    say "the fastest layout planned for $(num_tasks) x ${KOSMOSG_GPU:-h100-80}: ${settings[*]}"
}

# What `bash SCRIPT --check` does on a login node: dry run, plan, and sbatch's own opinion.
check_before_sbatch() {
    [ -z "${KOSMOSG_CONTAINER:-}" ] || python=${KOSMOSG_VENV:+$KOSMOSG_VENV/bin/}python3
    if [ -n "${config:-}" ]; then
        [ -z "$fastest" ] || take_fastest || exit
        dry_run || exit
        "$python" tools/plan.py --config "$config" --num-gpus "$(num_tasks)" \
            --gpu "${KOSMOSG_GPU:-h100-80}" ${rest[@]+"${rest[@]}"} || exit
    fi
    check_limit
    if command -v sbatch >/dev/null; then
        ask_sbatch "$script"
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
        *"configuration source"* | *"nable to contact"*)
            die "Slurm does not answer on this machine: look from a login node of the cluster" ;;
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
        --free-gib "${KOSMOSG_FREE_GIB:-100}" \
        --memory-gib "$((rank_gib * $(digits "${SLURM_NTASKS_PER_NODE:-1}" 1)))" || return
    step --distribution=block --kill-on-bad-exit=0 --wait=200 "$python" tools/preflight.py network
}
