"""An environment for each row of the matrix: one with torch for all rows that share it, and one on top for the rest.

A row's environment sees the packages of the one below through a .pth file, and pip takes them for installed. So ten
rows take the disk of a few.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HERE", "ROOT", "Environments", "MissingError", "Row", "listed_rows", "run"]

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

#: What takes long to install, and no row asks for a version of.
_SHARED = ("numpy", "scipy", "pytorch-quantization>=2.1.3,<2.2", "onnx", "onnxscript", "onnxruntime")

#: How much a program may say about its failure in one line.
_MOST = 160


class MissingError(Exception):
    """What a row needs cannot be had on this machine; the message is one line."""


@dataclass(frozen=True)
class Row:
    """One environment of the matrix."""

    python: str
    torch: str
    transformers: str

    @property
    def name(self) -> str:
        """What its folders are called."""
        return f"{self.base}-{self.transformers}"

    @property
    def base(self) -> str:
        """What the environment with its torch is called."""
        return f"{self.python}-{self.torch}"


def listed_rows() -> list[Row]:
    """The rows of ``rows.json``: the first one writes what all others read."""
    return [Row(**row) for row in json.loads((HERE / "rows.json").read_text())]


def run(command: list[str | Path], **environment: str) -> str:
    """What a program prints.

    Raises:
        MissingError: It fails, with the last line that it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise MissingError(f"{Path(command[0]).name} ended with {done.returncode}: {' '.join(said[-1:])[:_MOST]}")
    return done.stdout


@dataclass(frozen=True)
class Environments:
    """The environments in a folder."""

    folder: Path

    def python(self, row: Row) -> Path:
        """The interpreter of a row's environment."""
        return self.folder / row.name / "bin" / "python"

    def make(self, row: Row) -> None:
        """Make what is not there yet.

        Raises:
            MissingError: There is no such Python, or pip cannot install what the row asks for.
        """
        interpreter = _interpreter(row.python)
        below = self.folder / f"base-{row.base}"
        shared = (f"torch=={row.torch}", *_SHARED)
        self._install(below, interpreter, row, shared, None)
        wanted = (f"transformers=={row.transformers}", f"torch=={row.torch}", "--editable", f"{ROOT}[onnx]")
        self._install(self.folder / row.name, interpreter, row, wanted, below)

    def _install(self, home: Path, interpreter: str, row: Row, wanted: tuple[str, ...], below: Path | None) -> None:
        stamp = home / ".installed"
        asked = "\n".join([*wanted, (ROOT / "pyproject.toml").read_text() if below else ""])
        if stamp.exists() and stamp.read_text() == asked:
            return
        if not (home / "bin" / "python").exists():
            run([interpreter, "-m", "venv", home])
        packages = Path("lib", f"python{row.python}", "site-packages")
        if below is not None:
            (home / packages / "below.pth").write_text(f"{below / packages}\n")
        # torch stays the row's, whatever else is installed after it, and whatever this machine's pip is told.
        pins = self.folder / f"{row.base}.txt"
        pins.write_text(f"torch=={row.torch}\n")
        run(
            [home / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-cache-dir", "--no-compile", *wanted],
            PIP_CONSTRAINT=str(pins),
            PIP_DISABLE_PIP_VERSION_CHECK="1",
        )
        stamp.write_text(asked)

    def discard(self, row: Row, kept: list[Row]) -> None:
        """Remove a row's environment, and the one below it if none of the rows ``kept`` stands on it."""
        shutil.rmtree(self.folder / row.name, ignore_errors=True)
        if all(each.base != row.base for each in kept):
            shutil.rmtree(self.folder / f"base-{row.base}", ignore_errors=True)


def _interpreter(version: str) -> str:
    """A Python of that version: on the path, or one of pyenv's."""
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for candidate in (f"python{version}", *map(str, sorted(home.glob(f"{version}.*/bin/python{version}")))):
        path = shutil.which(candidate)
        # (A shim of pyenv is on the path for every version that it has, and fails for those that are not switched on.)
        if path is not None and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            return path
    raise MissingError(f"no python{version} on the path or under pyenv")
