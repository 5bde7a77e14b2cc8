#!/usr/bin/env bash
# What the tests of tests/run.sh leave out where its package is missing: a run in Weights & Biases
# (offline), the objects for Kubernetes against its schema, and shards behind a web server. wandb,
# kubernetes-validate and aiohttp, 200 MB, are laid over the environment of tests/run.sh. What is
# missing fails here.
set -euo pipefail

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/environment.sh
source "$REPOSITORY/examples/environment.sh"
# shellcheck source=tests/overlay.sh
source "$REPOSITORY/tests/overlay.sh"
prepare_environment test,data,demo
cd "$REPOSITORY"

# All that they need beyond it.
names='aiohappyeyeballs|aiohttp|aiosignal|frozenlist|multidict|propcache|yarl|attrs|cwevals|distro|googleapis-common-protos|httpcore|httpx|importlib_resources|jsonschema'
names+='|jsonschema-specifications|kubernetes-validate|opentelemetry-[a-z-]+|platformdirs|referencing'
names+='|rpds-py|sniffio|wandb|xxhash'
lay_over optional "$names"
export KOSMOSG_REQUIRE_WANDB=1 KOSMOSG_REQUIRE_KUBERNETES_VALIDATE=1 KOSMOSG_REQUIRE_AIOHTTP=1
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "$PYTHON" -m pytest -q tests/unit/test_{trackers,kubernetes,remote_shards,remote_web}.py "$@"
