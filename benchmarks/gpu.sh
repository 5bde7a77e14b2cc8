#!/usr/bin/env bash
# What this machine's GPU does with the project, in one run: gpu.json and gpu.html.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash benchmarks/gpu.sh [--minutes N] [--parts PART,...] [--cpu-smoke] [--output DIR]

  --minutes N    stop after about N minutes (20); what there was no time for is a row "not run"
  --parts PART,...
                 these alone, of tests, unet, instruct, plain-loop, steps and data; rows that DIR has
                 of other parts stay, if commit, card and versions are the same
  --cpu-smoke    tiny models on the CPU, to see that every part runs; its figures mean nothing
  --output DIR   where gpu.json and gpu.html are written (runs/gpu)

Needs a checkout and no internet. Uses the active virtual environment, else .venv, else python3.
What is not installed, DALI or TransformerEngine say, is a row "not run" with the reason. Both files
are written anew after every part, so that an interrupted run leaves what it has. Exit code: 0 when
no part failed, 1 otherwise, 2 for wrong arguments.
END
}

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case " $* " in
*" -h "* | *" --help "*)
    usage
    exit 0
    ;;
esac

python=${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}
if [ -z "$python" ]; then
    python=$REPOSITORY/.venv/bin/python
    [ -x "$python" ] || python=$(command -v python3)
fi
export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" -W ignore -m benchmarks.gpu "$@"
