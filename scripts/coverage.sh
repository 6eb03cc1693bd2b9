#!/usr/bin/env bash
# What of the package the tests run, lines and branches; fails below the floor in pyproject.toml. Arguments go to pytest:
# with some of the tests only, add --cov-fail-under=0.
source "$(dirname "$0")/setup.sh" dev
"$python" -c "import pytest_cov" 2>/dev/null || PIP_CONSTRAINT=$PWD/scripts/constraints.txt \
  "$python" -m pip install --quiet --disable-pip-version-check --editable ".[coverage]"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
exec "$python" -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered "$@"
