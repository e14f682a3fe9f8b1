# Sourced by the scripts beside it: stop at the first error, run from the top folder, with the environment that `make` builds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
BIN=${BIN:-.venv/bin}
run() { echo "+ $*"; "$BIN/python" "$@"; }
