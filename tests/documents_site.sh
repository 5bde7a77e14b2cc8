#!/usr/bin/env bash
# The documents as a site, built strictly (mkdocs-material): a page that is in no menu, a link or an
# anchor that leads nowhere ends it. `--keep FOLDER` leaves the site there.
set -euo pipefail

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case "${1:-}" in
    "") site=$(mktemp -d) && trap 'rm -rf "$site"' EXIT ;;
    --keep) site=${2:?--keep needs a folder} && mkdir -p "$site" && site=$(cd "$site" && pwd) ;;
    *) echo "error: $1 is no option; --keep FOLDER" >&2 && exit 2 ;;
esac
cd "$REPOSITORY"
# An environment of its own: none of the package is needed.
environment=${KOSMOSG_VENV:-$REPOSITORY/.venv}-documents
if [ ! -x "$environment/bin/mkdocs" ]; then
    rm -rf "$environment"
    "$(command -v python3.11 || command -v python3)" -m venv "$environment"
    "$environment/bin/pip" install --quiet -c constraints.txt mkdocs-material
fi
NO_MKDOCS_2_WARNING=1 "$environment/bin/mkdocs" build --strict --quiet --site-dir "$site"
echo "documents: $(find "$site" -name '*.html' | wc -l) pages, no broken link"
