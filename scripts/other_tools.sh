#!/usr/bin/env bash
# Loads deployed folders with sentence-transformers, optimum-onnx, optimum-intel, fastembed and Transformers.js, each in an
# environment of its own (some 4 GB in all, where pip has torch for the CPU), and holds their numbers against ours.
# Arguments go to scripts/other_tools.py.
source "$(dirname "$0")/setup.sh" dev
exec "$python" -W ignore scripts/other_tools.py "$@"
