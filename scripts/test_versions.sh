#!/usr/bin/env bash
# Runs the smoke set under each combination of versions in scripts/versions/rows.json and prints the matrix. It makes the
# environments (several GB where pip has torch with CUDA alone). Arguments go to scripts/version_matrix.py.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/version_matrix.py" "$@"
