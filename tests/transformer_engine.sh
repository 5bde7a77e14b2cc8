#!/usr/bin/env bash
# The stages with TransformerEngine's own layers and optimizer, its kernels replaced: its Python is
# laid over the environment of tests/run.sh, and over the other one by tests/second_environment.sh.
# Python and megatron-core decide which version that is.
set -euo pipefail

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/environment.sh
source "$REPOSITORY/examples/environment.sh"
# shellcheck source=tests/overlay.sh
source "$REPOSITORY/tests/overlay.sh"
prepare_environment test,data,demo
cd "$REPOSITORY"

# A wheel of a megabyte, with all of its Python; its kernels, 276 MB more, need a GPU.
lay_over engine transformer-engine
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

# Without these the tests would be skipped.
"$PYTHON" -c 'import importlib.metadata as m
print(*(f"{name} {m.version(name)}" for name in ("transformer-engine", "megatron-core")), sep=", ")'
command -v g++ >/dev/null || die "g++ is needed to compile the stand-in for a CUDA driver; install it"
exec "$PYTHON" -m pytest -q --durations=5 tests/transformer_engine "$@"
