#!/usr/bin/env bash
# All tests that a machine without a GPU can run: lint, format, pytest. Ends with a summary.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash tests/run.sh [--full [--count N]] [PYTEST ARGUMENTS...]

  --full       also the tests marked slow (long counts, seeds of the moment). It may be interrupted:
               the same command leaves out what has passed on this state of the checkout and goes
               on; every half minute it says how many tests are left and for how long. What has
               passed is in .pytest_cache/d/counts, by commit and count.
  --count N    with --full, the count to go on with (1): another number starts from nothing. A count
               is clean where its summary says "no failure on the way".

Other arguments go to pytest, e.g. `bash tests/run.sh tests/unit -k packing`. Uses the active
virtual environment, or makes .venv in the repository. Exit code 0: everything passed.
END
}

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/environment.sh
source "$REPOSITORY/examples/environment.sh"

refuse() {
    echo "error: $*" >&2
    exit 2
}

selection=(-m "not slow")
full=false
count=
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --full) full=true ;;
        --count)
            count=${2:-}
            [[ $count =~ ^[1-9][0-9]*$ ]] || refuse "--count needs a number from 1, not '$count'"
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

if $full; then
    selection=(-p tests.support.counted_tests --count "${count:-1}")
elif [ -n "$count" ]; then
    refuse "--count is for --full; add --full"
fi

prepare_environment test,data,demo
cd "$REPOSITORY"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

SECONDS=0
failed=()
"$PYTHON" -m ruff check . || failed+=("ruff check")
"$PYTHON" -m ruff format --check --quiet . ||
    failed+=("ruff format (run: $PYTHON -m ruff format .)")
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# run_pytest NAME ARGUMENTS...
run_pytest() {
    local name=$1
    shift
    "$PYTHON" -m pytest --durations=10 ${selection[@]+"${selection[@]}"} "$@" 2>&1 |
        tee -a "$log" || failed+=("$name")
}
if [ ${#arguments[@]} -gt 0 ]; then
    run_pytest pytest "${arguments[@]}"
else
    # The cheap tests first, so that a plain mistake shows before the spawned ranks start, then those
    # that are one busy process each, both several at a time: the ranks of the others take all cores
    # themselves.
    # nproc counts threads where OMP_NUM_THREADS is set.
    workers=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1)
    several=(-n "$((workers > 4 ? 4 : workers))" --dist loadfile)
    run_pytest "pytest tests/unit tests/cases" "${several[@]}" tests/unit tests/cases
    run_pytest "pytest tests/parity tests/rehearsal" "${several[@]}" tests/parity tests/rehearsal
    run_pytest "pytest, the other folders" tests/{distributed,integration,gpu}
fi

echo
echo "Summary ($((SECONDS / 60)) min $((SECONDS % 60)) s)"
if [ ${#failed[@]} -eq 0 ]; then
    echo "  lint, format and tests: passed"
else
    printf '  FAILED: %s\n' "${failed[@]}"
fi
# pytest's own closing lines, last.
grep -E '^=+ .* in [0-9.]+s.* =+$' "$log" || echo "pytest did not finish"
[ ${#failed[@]} -eq 0 ]
