#!/usr/bin/env bash
# Runs the real QDQBERT and writes what it computes on this machine into a folder; scripts/make_reference.py says what lies
# in it. The tests do so by themselves. Usage: bash scripts/make_reference.sh FOLDER
set -euo pipefail
folder=$(realpath -m "${1:?name the folder to write into}")
source "$(dirname "$0")/setup.sh" dev
PYTHONPATH=$venv/reference exec "$python" -W ignore scripts/make_reference.py "$folder"
