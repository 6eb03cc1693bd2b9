"""An environment for each tool, made once for each state of its requirements, and a tool's program run in it."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from tools.compared import Rows
from tools.tools import Tool
from versions.environments import MissingError, run

__all__ = ["HERE", "REQUIREMENTS", "made", "make", "pins", "rows_in"]

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements"

#: Nothing is fetched while a program runs: what it loads lies in the folder.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def made(tool: Tool, folder: Path) -> bool:
    """Whether the tool's environment is there as its requirements are."""
    stamp = folder / tool.environment / ".installed"
    return stamp.exists() and stamp.read_text(encoding="utf-8") == _requirements(tool).read_text(encoding="utf-8")


def make(tool: Tool, folder: Path) -> None:
    """Make the tool's environment in ``folder`` if it is not there.

    Raises:
        MissingError: There is no node, or the packages cannot be had.
    """
    if made(tool, folder):
        return
    home = folder / tool.environment
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    (_node_packages if _is_node(tool) else _python_packages)(home, _requirements(tool))
    shutil.copy(_requirements(tool), home / ".installed")


def rows_in(tool: Tool, folder: Path, deployed: Path, batches: Path, wanted: str) -> Rows:
    """What the tool makes of the texts in its own environment.

    Args:
        folder: That of the environments.
        deployed: The folder that it loads.
        batches: The texts, as ``given.py`` reads them.
        wanted: One of the tool's.

    Raises:
        MissingError: Its program fails; the message ends with the last line that it said.
    """
    home = folder / tool.environment
    output = folder / f"{tool.environment}-{Path(tool.program).stem}-{wanted}.json"
    output.unlink(missing_ok=True)
    interpreter = _node() if _is_node(tool) else home / "bin" / "python"
    command: list[str | Path] = [interpreter, HERE / tool.program, deployed, batches, wanted, output]
    run(command, **_OFFLINE, NODE_PATH=str(home / "node_modules"), PYTHONPATH="")
    return Rows.read(output)


def pins(tool: Tool) -> dict[str, str]:
    """The versions in a tool's requirements, by package."""
    text = _requirements(tool).read_text(encoding="utf-8")
    form = r'^ +"([@\w/-]+)": "([\d.]+)"' if _is_node(tool) else r"^([\w-]+)(?:\[\w+\])?==(\S+)$"
    return dict(re.findall(form, text, re.MULTILINE))


def _requirements(tool: Tool) -> Path:
    return REQUIREMENTS / f"{tool.environment}.{'json' if _is_node(tool) else 'txt'}"


def _is_node(tool: Tool) -> bool:
    return tool.program.endswith(".mjs")


def _node() -> str:
    found = shutil.which("node")
    if found is None:
        raise MissingError("no node on the path")
    return found


def _python_packages(home: Path, requirements: Path) -> None:
    run([sys.executable, "-m", "venv", home])
    pip: list[Any] = [home / "bin" / "python", "-m", "pip"]
    options = {"PIP_CONSTRAINT": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    torch = re.search(r"^torch==\S+$", requirements.read_text(encoding="utf-8"), re.MULTILINE)
    if torch is not None:  # first, by its exact version: so it is the CPU build where there is one
        run([*pip, "install", "--quiet", torch[0]], **options)
    run([*pip, "install", "--quiet", "--requirement", requirements], **options)
    if torch is not None:
        # optimum-intel declares it, texts do not need it, and beside the CPU build of torch the registry's build breaks
        # the import of transformers.
        run([*pip, "uninstall", "--quiet", "--yes", "torchvision"], **options)


def _node_packages(home: Path, requirements: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise MissingError("no npm on the path")
    _node()
    shutil.copy(requirements, home / "package.json")
    # (ONNX Runtime's package would fetch the files for CUDA.)
    run([npm, "install", "--no-audit", "--no-fund", "--prefix", home], ONNXRUNTIME_NODE_INSTALL="skip")
