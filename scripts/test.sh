#!/usr/bin/env bash
# Sets up the environment and runs the tests. Arguments go to pytest.
source "$(dirname "$0")/setup.sh" dev
# Two workers with two threads each: a thread that waits is not to spin on a core that another one needs.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
exec "$python" -m pytest -n 2 --dist worksteal "$@"
