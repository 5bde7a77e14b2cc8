# shellcheck shell=bash
# Sourced by examples/quickstart.sh and tests/run.sh: `prepare_environment EXTRAS` leaves a Python
# with this package and the tested versions in $PYTHON. The active virtual environment is used;
# without one, .venv in the repository (or $KOSMOSG_VENV) is made. Nothing is installed twice.

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

is_supported_python() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

find_base_python() {
    local candidate
    for candidate in python3.12 python3.11 python3 python; do
        if command -v "$candidate" >/dev/null && is_supported_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.11 or 3.12 is needed and neither python3.12 nor python3.11 was found;" \
        "install one or activate a virtual environment made with it"
}

# require_free_space FOLDER MIB PURPOSE: FOLDER may not exist yet.
require_free_space() {
    local folder=$1 free
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    free=$(df -Pm "$folder" | awk 'NR == 2 { print $4 }')
    if [ "$free" -lt "$2" ]; then
        die "$3 needs about $2 MiB in $folder, which has $free MiB free"
    fi
}

# run_logged LOG COMMAND...: output goes to LOG; a terminal sees its latest line, a failure its end.
run_logged() {
    local log=$1 line status=0
    shift
    printf '\n$ %s\n' "$*" >>"$log"
    if [ -t 1 ]; then
        "$@" 2>&1 | tee -a "$log" | while IFS= read -r line; do
            printf '\r\033[K    %.70s' "$line"
        done || status=$?
        printf '\r\033[K'
    else
        "$@" >>"$log" 2>&1 || status=$?
    fi
    return "$status"
}

# PyPI's Linux wheel of torch brings several GB of CUDA libraries. Without an NVIDIA GPU the CPU
# build is tried first: from the configured index (a local index may carry it; PyPI answers "no
# such version" at once), then from PyTorch's own index if it answers within seconds. The last
# resort, and the choice with a GPU or on macOS, is the index's default build.
install_torch() {
    local log=$1 version url=https://download.pytorch.org/whl/cpu
    version=$(sed -n 's/^torch==//p' "$REPOSITORY/constraints.txt")
    if "$PYTHON" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$version')" \
        2>/dev/null; then
        return
    fi
    if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then
        echo "  torch $version, CPU build (no NVIDIA GPU found)"
        if run_logged "$log" "$PYTHON" -m pip install "torch==$version+cpu"; then
            return
        fi
        if "$PYTHON" -c "import urllib.request as r; r.urlopen('$url/torch/', timeout=8)" \
            >/dev/null 2>&1 &&
            run_logged "$log" "$PYTHON" -m pip install --extra-index-url "$url" \
                "torch==$version+cpu"; then
            return
        fi
        echo "  the CPU build is not to be had; taking the default build (several GB)"
    else
        echo "  torch $version, default build"
    fi
    # 4.7 GB, and 1.6 GB of all else; of its wheels, 2.7 GB, pip keeps each until all are there.
    require_free_space "$(dirname "$log")" 6500 "an environment with the CUDA build of torch"
    require_free_space "${TMPDIR:-/tmp}" 3000 "downloading the CUDA build of torch"
    run_logged "$log" "$PYTHON" -m pip install "torch==$version"
}

install_failed() {
    tail -n 25 "$1" >&2
    die "the installation failed; its last lines are above, all of it is in $1"
}

# prepare_environment EXTRAS: e.g. test,data,demo. Sets PYTHON; REPOSITORY must be set.
prepare_environment() {
    local extras=$1 venv log stamp wanted
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        venv=$VIRTUAL_ENV
    else
        venv=${KOSMOSG_VENV:-$REPOSITORY/.venv}
        if [ ! -x "$venv/bin/python" ]; then
            local base
            base=$(find_base_python) || exit 1
            echo "Making a virtual environment in $venv"
            require_free_space "$venv" 3500 "the virtual environment"
            "$base" -m venv "$venv" || die "$base cannot make a virtual environment in $venv" \
                "(on Debian and Ubuntu: apt-get install python3-venv)"
        fi
    fi
    PYTHON=$venv/bin/python
    is_supported_python "$PYTHON" ||
        die "$PYTHON is not Python 3.11 or 3.12; deactivate that environment or make a new one"

    stamp=$venv/.megatron-kosmosg-installed
    wanted="$REPOSITORY [$extras] $(cat "$REPOSITORY/setup.py" "$REPOSITORY/constraints.txt" | cksum)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    log=$venv/install.log
    : >"$log" || die "cannot write to $venv; activate a virtual environment that you own"
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        echo "The virtual environment $venv is active, so this installs into it; deactivate it to have"
        echo "$REPOSITORY/.venv made instead (or the folder that KOSMOSG_VENV names)"
    fi
    echo "Installing into $venv (a few minutes; log: $log)"
    install_torch "$log" || install_failed "$log"
    echo "  megatron-core, diffusers, transformers and the extras [$extras]"
    run_logged "$log" "$PYTHON" -m pip install -c "$REPOSITORY/constraints.txt" \
        -e "${REPOSITORY}[$extras]" || install_failed "$log"
    printf '%s' "$wanted" >"$stamp"
    echo "  installed in $SECONDS s"
}
