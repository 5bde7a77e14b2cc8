#!/usr/bin/env bash
# Features and distances against the libraries that published numbers are computed with: timm,
# torch-fidelity, torchmetrics and scipy, laid over the environment of tests/run.sh. They ask for
# torchvision at their import and use nothing of it here, so it is not installed.
set -euo pipefail

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/environment.sh
source "$REPOSITORY/examples/environment.sh"
prepare_environment test,data,demo
cd "$REPOSITORY"

versions=$REPOSITORY/tests/evaluation_references.txt
# Another list gets another folder; one that is there is whole.
overlay=$(dirname "$(dirname "$PYTHON")")/references-$(cksum <"$versions" | cut -d ' ' -f 1)
if [ ! -d "$overlay" ]; then
    rm -rf "$overlay.partial"
    "$PYTHON" -m pip install --quiet --no-deps --target "$overlay.partial" -r "$versions"
    rm -rf "$overlay.partial/tests" # torch-fidelity's, which would hide this repository's
    mv "$overlay.partial" "$overlay"
fi
export PYTHONPATH=$overlay${PYTHONPATH:+:$PYTHONPATH} KOSMOSG_REQUIRE_REFERENCES=1
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "$PYTHON" -m pytest -q tests/parity/test_evaluation_references.py "$@"
