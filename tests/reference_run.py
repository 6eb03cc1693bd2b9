"""What the real QDQBERT computes, run on the spot: float kernels round differently from one CPU to the next.

The reference runs in a process of its own, on the tests' own torch and under the tests' own environment variables: what
is compared was computed by the same kernels, and 0.0 means 0.0 on every CPU. It runs once; what it computed stays in
pytest's cache (``pytest --cache-clear`` forgets it) under a key of all that its numbers depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from repository import SCRIPTS

SCRIPT = SCRIPTS / "make_reference.py"
REQUIREMENTS = SCRIPTS / "requirements-reference.txt"
#: Beside the torch that it runs on.
PACKAGES = Path(sys.prefix) / "reference"
#: As torch found it: libraries that tests import later set variables, and torch's kernels are chosen by then.
ENVIRONMENT = dict(os.environ)

#: Whose names start so choose kernels or threads, or the libraries that they are in.
CHOOSE_KERNELS = tuple(
    "ATEN_ BLIS_ DNNL_ GLIBC_ GOMP_ KMP_ LD_ MKL_ MKLDNN_ NPY_ OMP_ ONEDNN_ OPENBLAS_ PYTORCH_ TORCH_".split()
)
ON_BOTH_SIDES = ("torch", "numpy", "scipy", "safetensors", "pytorch-quantization")


class NoReference(pytest.fail.Exception):
    """The real QDQBERT is not there, or did not run: tests that compare with it fail, with these words alone."""

    def __init__(self, said: str) -> None:
        super().__init__(said, pytrace=False)


def reference_in(cache: Path, packages: Path = PACKAGES, script: Path = SCRIPT) -> Path:
    """The folder with what the reference computes here: made if it is not in the cache yet.

    Raises:
        NoReference: The packages are missing or others, or the script fails.
    """
    check_packages(packages)
    folder = cache / key_of(kernels(ENVIRONMENT), packages, script)
    with FileLock(cache / f"{folder.name}.lock"):  # the others of pytest-xdist's workers wait
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix="part-") as part:
                run(script, Path(part) / "made", packages)
                (Path(part) / "made").rename(folder)
    return folder


def run(script: Path, folder: Path, packages: Path) -> None:
    # A thread that waits is not to spin: on a busy machine the run would take five times as long.
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join([str(packages), *inherited()]),
    }
    command = [sys.executable, "-W", "ignore", str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise NoReference(f"The real QDQBERT did not run: {' '.join(command)}\n{done.stderr[-2000:]}")


def inherited() -> list[str]:
    return [path for path in ENVIRONMENT.get("PYTHONPATH", "").split(os.pathsep) if path]


def pinned() -> dict[str, str]:
    return dict(line.split("==") for line in REQUIREMENTS.read_text().splitlines() if "==" in line)


def check_packages(packages: Path) -> None:
    """What is in the folder is what the requirements pin."""
    found = {one.name.lower().replace("_", "-"): one.version for one in metadata.distributions(path=[str(packages)])}
    wrong = [
        f"{name} {version} ({found.get(name, 'none')} found)"
        for name, version in pinned().items()
        if found.get(name) != version
    ]
    if wrong:
        raise NoReference(
            f"The tests compare with the real QDQBERT, which is not in {packages}: wanted {', '.join(wrong)}.\n"
            "`bash scripts/test.sh` installs it into .venv. For this environment:\n"
            f"  rm -rf {packages}; {sys.executable} -m pip install --no-deps --target {packages} -r {REQUIREMENTS}"
        )


def key_of(chosen: Mapping[str, str], packages: Path, script: Path) -> str:
    """Other numbers have another key: of the code, the packages, the CPU and the variables that choose kernels."""
    code = [path.read_text() for path in (script, SCRIPTS / "real_qdqbert.py", SCRIPTS / "reference_cases.py")]
    parts = {
        "code": [*code, REQUIREMENTS.read_text(), str(packages)],
        "versions": [sys.version, *map(metadata.version, ON_BOTH_SIDES), torch.__config__.show()],
        "machine": [platform.machine(), platform.libc_ver(), os.cpu_count(), cpu()],
        "variables": sorted(chosen.items()),
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def kernels(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(CHOOSE_KERNELS)}


def cpu() -> list[str]:
    """Model, features and cache of the first processor, where the system tells them."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return [platform.processor()]
    says = ("vendor_id", "cpu family", "model", "stepping", "cache size", "flags", "Features", "CPU ")
    return [line for line in first.splitlines() if line.startswith(says)]
