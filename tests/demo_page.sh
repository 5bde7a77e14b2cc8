#!/usr/bin/env bash
# The page of `kosmosg demo` in a headless Chromium (Debian's, on the PATH) and through its REST
# client, and photographs from files to that page: gradio, playwright and scikit-image (for its
# photographs alone), laid over the environment of tests/run.sh. What is missing fails here.
set -euo pipefail

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/environment.sh
source "$REPOSITORY/examples/environment.sh"
prepare_environment test,data,demo
cd "$REPOSITORY"

# All that gradio and playwright need beyond it, at the versions of the constraints.
names='brotli|fastapi|gradio|gradio_client|greenlet|groovy|hf-gradio|httpcore|httpx'
names+='|opentelemetry-api|orjson|pandas|playwright|pydub|python-multipart|pytz|safehttpx'
names+='|scikit-image|semantic-version|starlette|tomlkit|uvicorn'
mapfile -t versions < <(grep -E "^($names)==" constraints.txt)
# Another list gets another folder; one that is there is whole.
overlay=$(dirname "$(dirname "$PYTHON")")/page-$(printf '%s\n' "${versions[@]}" | cksum | cut -d ' ' -f 1)
if [ ! -d "$overlay" ]; then
    rm -rf "$overlay.partial"
    "$PYTHON" -m pip install --quiet --no-deps --target "$overlay.partial" "${versions[@]}"
    mv "$overlay.partial" "$overlay"
fi
export PYTHONPATH=$overlay${PYTHONPATH:+:$PYTHONPATH} KOSMOSG_REQUIRE_BROWSER=1
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "$PYTHON" -m pytest -q tests/integration/test_{demo_browser,photographs}.py "$@"
