#!/usr/bin/env bash
# From nothing to a page that shows what the model learnt: installs, makes the toy world, trains
# the three stages on two local processes, draws held-out prompts, judges them, writes report.html.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash examples/quickstart.sh [--output FOLDER] [--fast] [--ablations] [--seed N] [--fresh]

  --output FOLDER  for everything that is made (default: runs/quickstart in the repository)
  --fast           every step with few iterations (minutes); no quality thresholds
  --ablations      also train the variants of the paper's Table 2 (much longer)
  --seed N         of all trainings (0): other initial weights, order and noise on the same data
  --fresh          repeat all steps instead of reusing what is done

Uses the active virtual environment, or makes .venv in the repository (about 2 GB on a machine
without an NVIDIA GPU). Ctrl-C is safe: the same command continues where it was.
Exit codes: 0 done; 1 failed; 2 wrong arguments; 3 a quality threshold is missed; 130 interrupted.
END
}

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/environment.sh
source "$REPOSITORY/examples/environment.sh"

# Arguments that cannot be used: 2, as of every command (megatron_kosmosg/exit_codes.py).
wrong() {
    echo "error: $*; --help says what can be given" >&2
    exit 2
}

out=$REPOSITORY/runs/quickstart
options=()
while [ $# -gt 0 ]; do
    case $1 in
        --out=*) set -- --out "${1#*=}" "${@:2}" && continue ;;
        --output | --out)
            if [ $# -lt 2 ] || [ -z "$2" ]; then
                wrong "$1 needs a folder"
            fi
            [ "$1" = --output ] || echo "note: --out is called --output today" >&2
            out=$2
            shift
            ;;
        --output=?*) out=${1#*=} ;;
        --seed)
            [[ ${2:-} =~ ^[0-9]+$ ]] || wrong "--seed needs a number from 0, not '${2:-}'"
            options+=("$1" "$2")
            shift
            ;;
        --seed=*)
            set -- --seed "${1#*=}" "${@:2}"
            continue
            ;;
        --fast | --ablations | --fresh) options+=("$1") ;;
        -h | --help)
            usage
            exit 0
            ;;
        *)
            wrong "unknown option: $1"
            ;;
    esac
    shift
done

mkdir -p "$out" 2>/dev/null || wrong "cannot make the folder $out; choose another with --output"
out=$(cd "$out" && pwd)
[ -w "$out" ] || wrong "cannot write to $out; choose another folder with --output"
require_free_space "$out" 1000 "the quickstart"

prepare_environment test,data,demo
export PYTHONPATH=$REPOSITORY/examples${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m quickstart --output "$out" ${options[@]+"${options[@]}"}
