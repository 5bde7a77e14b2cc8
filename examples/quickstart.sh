#!/usr/bin/env bash
# From nothing to a page that shows what the model learnt: installs, makes the toy world, trains
# the three stages on two local processes, draws held-out prompts, judges them, writes report.html.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash examples/quickstart.sh [--out DIR] [--fast] [--ablations] [--fresh]

  --out DIR     folder for everything that is made (default: runs/quickstart in the repository)
  --fast        every step with few iterations (minutes); no quality thresholds
  --ablations   also train the variants of the paper's Table 2 (much longer)
  --fresh       repeat all steps instead of reusing what is done

Uses the active virtual environment, or makes .venv in the repository (about 2 GB on a machine
without an NVIDIA GPU). Ctrl-C is safe: the same command continues where it was.
Exit codes: 0 done; 1 failed; 2 wrong arguments; 3 a quality threshold is missed; 130 interrupted.
END
}

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/environment.sh
source "$REPOSITORY/examples/environment.sh"

out=$REPOSITORY/runs/quickstart
options=()
while [ $# -gt 0 ]; do
    case $1 in
        --out)
            if [ $# -lt 2 ] || [ -z "$2" ]; then
                usage >&2
                echo "--out needs a folder" >&2
                exit 2
            fi
            out=$2
            shift
            ;;
        --out=?*) out=${1#--out=} ;;
        --fast | --ablations | --fresh) options+=("$1") ;;
        -h | --help)
            usage
            exit 0
            ;;
        *)
            usage >&2
            echo "unknown option: $1" >&2
            exit 2
            ;;
    esac
    shift
done

mkdir -p "$out" 2>/dev/null || die "cannot make the folder $out; choose another with --out"
out=$(cd "$out" && pwd)
[ -w "$out" ] || die "cannot write to $out; choose another folder with --out"
require_free_space "$out" 1000 "the quickstart"

prepare_environment test,data,demo
export PYTHONPATH=$REPOSITORY/examples${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m quickstart --out "$out" ${options[@]+"${options[@]}"}
