#!/usr/bin/env bash
# Builds an environment with the real QDQBERT and writes the golden files that the tests compare with.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${REFERENCE_VENV:-.venv-reference}
if [ ! -x "$venv/bin/python" ]; then
  python3 -m venv "$venv"
fi
"$venv/bin/pip" install --quiet torch==2.13.0
"$venv/bin/pip" install --quiet --requirement scripts/constraints-reference.txt
exec "$venv/bin/python" scripts/make_reference.py "${1:-tests/golden/reference}"
