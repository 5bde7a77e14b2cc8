#!/usr/bin/env bash
# Export, pipeline and preprocess with the oldest transformers, diffusers, accelerate and Pillow that
# setup.py allows, laid over the environment of tests/run.sh. torch stays as it is: there is no older
# build for CPUs to be had, so its lower bound is not run.
set -euo pipefail

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/environment.sh
source "$REPOSITORY/examples/environment.sh"
prepare_environment test,data,demo
cd "$REPOSITORY"

versions=$REPOSITORY/tests/oldest_versions.txt
# Another list gets another folder; one that is there is whole.
overlay=$(dirname "$(dirname "$PYTHON")")/oldest-$(cksum <"$versions" | cut -d ' ' -f 1)
if [ ! -d "$overlay" ]; then
    rm -rf "$overlay.partial"
    "$PYTHON" -m pip install --quiet --no-deps --target "$overlay.partial" -r "$versions"
    mv "$overlay.partial" "$overlay"
fi
# Tests that start a Python without this repository give it the second name.
export PYTHONPATH=$overlay${PYTHONPATH:+:$PYTHONPATH} KOSMOSG_OVERLAY=$overlay
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

"$PYTHON" - "$versions" <<'END'
import importlib.metadata
import sys

for line in open(sys.argv[1], encoding="utf-8"):
    if "==" in line:
        name, wanted = line.strip().split("==")
        found = importlib.metadata.version(name)
        if found != wanted:
            sys.exit(f"error: {name} {found} is imported, {wanted} is to be tested")
        print(f"{name} {found}")
print("torch", importlib.metadata.version("torch"), "(its lower bound: not run)")
END
exec "$PYTHON" -m pytest -q \
    tests/unit/test_conversion_hf_tokenizer.py \
    tests/unit/test_caption_example.py \
    tests/unit/test_transparency.py \
    tests/integration/test_hf_conversion.py \
    tests/integration/test_pipeline.py \
    tests/integration/test_pipeline_as_diffusers.py \
    tests/integration/test_pipeline_ecosystem.py \
    tests/integration/test_pipeline_loads.py \
    tests/integration/test_preprocess_tool.py "$@"
