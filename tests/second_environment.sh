#!/usr/bin/env bash
# What must hold with the other supported pair of Python and megatron-core: in an environment of its
# own, made from nothing and kept, the tests that the core can break, one stage of the quickstart,
# the stages on its TransformerEngine, and runs that cross from one core to the other and back.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash tests/second_environment.sh

Python 3.11 takes megatron-core 0.16.1, Python 3.12 takes 0.19.2. The first environment is the
active one or .venv (tests/run.sh makes it); this runs with the other Python, found as python3.12
(python3.11) or through pyenv or uv, in .venv-3.12 (.venv-3.11) of the repository. Without such a
Python it says "not run" and succeeds; with KOSMOSG_REQUIRE_SECOND_ENVIRONMENT=1 it fails.
END
}

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/environment.sh
source "$REPOSITORY/examples/environment.sh"
cd "$REPOSITORY"

case ${1:-} in
    "") ;;
    -h | --help)
        usage
        exit 0
        ;;
    *)
        echo "error: unknown argument $1; --help says what can be given" >&2
        exit 2
        ;;
esac

# is_python VERSION COMMAND: a version manager's python3.12 may exist and not start.
is_python() {
    "$2" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null
}

find_python() {
    local wanted=$1 found version
    if is_python "$wanted" "python$wanted"; then
        command -v "python$wanted"
        return
    fi
    for version in $(pyenv versions --bare 2>/dev/null | grep "^$wanted\." | sort -rV); do
        found=$(pyenv prefix "$version" 2>/dev/null)/bin/python
        if is_python "$wanted" "$found"; then
            echo "$found"
            return
        fi
    done
    found=$(uv python find "$wanted" 2>/dev/null) && is_python "$wanted" "$found" && echo "$found"
}

first=${VIRTUAL_ENV:-${KOSMOSG_VENV:-$REPOSITORY/.venv}}/bin/python
[ -x "$first" ] || die "there is no first environment; run bash tests/run.sh, which makes .venv"
wanted=3.12
if is_python 3.12 "$first"; then wanted=3.11; fi

if ! base=$(find_python "$wanted"); then
    echo "not run: no Python $wanted environment"
    [ "${KOSMOSG_REQUIRE_SECOND_ENVIRONMENT:-0}" != 1 ]
    exit
fi

unset VIRTUAL_ENV
export KOSMOSG_VENV=$REPOSITORY/.venv-$wanted
[ -x "$KOSMOSG_VENV/bin/python" ] || "$base" -m venv "$KOSMOSG_VENV"
prepare_environment test,data,demo
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
"$PYTHON" -m megatron_kosmosg --version

SECONDS=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()

# Left to the first environment: what is ours alone (which rank waits for which, pictures, counts of
# the rehearsal), and of the table of layouts all but the stage with most parts in the layouts that meet most of the core.
ours="test_overlap or test_evaluation_references or held_out_images or score_placement or bounds_of_low_precision"
simpler="ten_iterations and (pretrain or align or instruct-tp2] or selective or pp2_full or pp3_v2])"
"$PYTHON" -m pytest -m "not slow" -k "not ($ours)" -n 2 --dist loadfile --durations=10 \
    tests/unit/test_cpu_shim.py tests/unit/test_fused_adam.py tests/parity \
    tests/rehearsal/test_{stand_ins,every_stage}.py || failed+=("tests of one process")
"$PYTHON" -m pytest -m "not slow" -k "not ($ours) and not ($simpler)" --durations=10 \
    tests/distributed || failed+=("tests of several ranks")

KOSMOSG_OTHER_PYTHON=$first "$PYTHON" -m pytest tests/integration/test_core_crossing.py \
    tests/integration/test_fixtures_of_the_past.py -k "core or goes_on or checkpoint" || failed+=("checkpoints across cores")

# The toy world, its datasets and the first stage.
PYTHONPATH=$REPOSITORY/examples "$PYTHON" - "$work" <<'END' || failed+=("quickstart, pretrain")
import sys
from pathlib import Path

from quickstart.runner import Runner
from quickstart.steps import plan

out, repository = Path(sys.argv[1]) / "quickstart", Path.cwd()
steps = plan(repository, out, fast=True, ablations=False)
last = [step.name for step in steps].index("pretrain")
Runner(steps[: last + 1], out, repository, "fast").run()
END

bash tests/transformer_engine.sh || failed+=("TransformerEngine's layers")

echo
echo "Second environment, Python $wanted ($((SECONDS / 60)) min $((SECONDS % 60)) s after its install)"
if [ ${#failed[@]} -eq 0 ]; then
    echo "  passed"
else
    printf '  FAILED: %s\n' "${failed[@]}"
    exit 1
fi
