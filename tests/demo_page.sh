#!/usr/bin/env bash
# The page of `kosmosg demo` in a headless Chromium (Debian's, on the PATH) and through its REST
# client, and photographs from files to that page: gradio, playwright and scikit-image (for its
# photographs alone), laid over the environment of tests/run.sh. What is missing fails here.
set -euo pipefail

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/environment.sh
source "$REPOSITORY/examples/environment.sh"
# shellcheck source=tests/overlay.sh
source "$REPOSITORY/tests/overlay.sh"
prepare_environment test,data,demo
cd "$REPOSITORY"

# All that gradio and playwright need beyond it.
names='brotli|fastapi|gradio|gradio_client|greenlet|groovy|hf-gradio|httpcore|httpx'
names+='|opentelemetry-api|orjson|pandas|playwright|pydub|python-multipart|pytz|safehttpx'
names+='|scikit-image|semantic-version|starlette|tomlkit|uvicorn'
lay_over page "$names"
export KOSMOSG_REQUIRE_BROWSER=1
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "$PYTHON" -m pytest -q tests/integration/test_{demo_browser,photographs}.py "$@"
