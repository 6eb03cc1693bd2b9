#!/usr/bin/env bash
# Sets up the environment and runs the demo on the real all-MiniLM-L6-v2. Arguments go to qdq-surgery demo.
source "$(dirname "$0")/setup.sh" demo
exec "$python" -m qdq_surgery demo "$@"
