# shellcheck shell=bash
# Sourced by the tests whose packages only they need, after `prepare_environment`: newcomers, who
# install the extra `test`, are spared them.

# lay_over NAME PACKAGES: puts PACKAGES (a|b|c), at the versions of the constraints, into a folder
# NAME-... beside that environment and before it on PYTHONPATH. Another list gets another folder;
# one that is there is whole.
lay_over() {
    local versions overlay
    mapfile -t versions < <(grep -E "^($2)==" "$REPOSITORY/constraints.txt")
    overlay=$(dirname "$(dirname "$PYTHON")")/$1-$(printf '%s\n' "${versions[@]}" | cksum | cut -d ' ' -f 1)
    if [ ! -d "$overlay" ]; then
        rm -rf "$overlay.partial"
        "$PYTHON" -m pip install --quiet --no-deps --target "$overlay.partial" "${versions[@]}"
        mv "$overlay.partial" "$overlay"
    fi
    export PYTHONPATH=$overlay${PYTHONPATH:+:$PYTHONPATH}
}
