#!/usr/bin/env bash
# Sets up the environment and runs the tests. Arguments go to pytest.
source "$(dirname "$0")/setup.sh" dev
exec "$python" -m pytest -n 2 --dist worksteal "$@"
