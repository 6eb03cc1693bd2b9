"""The newcomer's way, as the README says it: its own commands, run by a shell in a fresh virtual environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest
from pages import blocks, commands
from repository import ROOT

from qdq_surgery.cli.demo.files import checkpoint
from qdq_surgery.errors import ModelError

#: Seconds for all commands, on whatever machine: a hang is an end, too. By hand it is minutes, most of them pip's.
_LIMIT = 900

#: So many of the texts are enough to see that the way leads there.
_TEXTS = 30


def journey() -> list[str]:
    """The commands of the first block that quantizes."""
    return commands(next(block for block in blocks("README.md") if "qdq-surgery quantize" in block.text))


def newcomer(folder: Path) -> dict[str, str]:
    """An environment without this package.

    What it depends on is that of the tests, which pip finds in place of downloading it: torch alone takes a minute.
    """
    venv.create(folder, with_pip=False)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "of_the_tests.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = folder / "bin" / "pip"
    pip.write_text(
        f"#!{folder / 'bin' / 'python'}\nfrom pip._internal.cli.main import main\nraise SystemExit(main())\n"
    )
    pip.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PYTHONWARNINGS": "ignore"}  # (0: without isolation)
    kept["OMP_NUM_THREADS"] = "1"  # other tests want the cores
    return {**kept, **offline, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the commands are a POSIX shell's")
def test_the_readme_leads_to_a_measured_file_of_the_real_model(tmp_path: Path) -> None:
    for package in ("onnxruntime", "bokeh"):
        pytest.importorskip(package)
    try:
        checkpoint()
    except ModelError as error:
        pytest.skip(str(error))
    lines, environment = journey(), newcomer(tmp_path / "venv")
    assert len(lines) <= 5
    end = time.monotonic() + _LIMIT
    for line in lines:
        home = ROOT if line.startswith("pip install") else tmp_path  # the clone stays as it is
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            timeout=end - time.monotonic(),
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        texts = tmp_path / "minilm" / "texts.txt"
        if texts.is_file():
            some = texts.read_text(encoding="utf-8").splitlines()[:_TEXTS]
            texts.write_text("\n".join(some) + "\n", encoding="utf-8")
    it_is_there(tmp_path, done.stdout)


def it_is_there(folder: Path, printed: str) -> None:
    """The package of the fresh environment, the file, its loss on the runtime, and the page with both."""
    assert list(folder.glob("venv/lib/python*/site-packages/qdq_surgery/cli/quantize.py"))
    made = json.loads((folder / "minilm-int8" / "qdq_report.json").read_text())
    figures = made["evaluation"]["figures"]
    assert made["evaluation"]["rows"] == _TEXTS // 5
    assert 0 < 1 - figures["text_cosine"] < 0.02
    assert "written to minilm-int8; the loss is that on ONNX Runtime" in printed
    assert made["receipt"]["shares"]["linear"] == 1.0
    assert 23e6 < (folder / "minilm-int8" / "onnx" / "model_quantized.onnx").stat().st_size < 26e6
    page = (folder / "minilm.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert re.search(rf"{made['evaluation']['loss']:.3g}\s*</strong>\s*<span>mse against float", page)
