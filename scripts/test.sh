#!/usr/bin/env bash
# Sets up the environment and runs the tests. Arguments go to pytest.
source "$(dirname "$0")/setup.sh" dev
# Three workers on two cores: one of them mostly waits for a process that a test started, or for what another one makes.
# A thread that waits is not to spin on a core that another one needs.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
exec "$python" -m pytest -n 3 --dist worksteal "$@"
