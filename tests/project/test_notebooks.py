"""The notebooks run, cell after cell, on a tiny model; and what they show is what their cells printed."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import furnish
from repository import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
NEEDED = ("onnxruntime", "openvino", "onnxscript")


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [each for each in json.loads(path.read_text(encoding="utf-8"))["cells"] if each["cell_type"] == kind]


def run(cell: str, scope: dict[str, Any]) -> None:
    """As a notebook does: what the last line is worth is shown."""
    tree = ast.parse(cell)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), scope)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), scope)
        if value is not None:
            assert "<" in value._repr_html_()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_cells_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        pytest.skip(f"{path.name} needs {', '.join(NEEDED)}")
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    scope: dict[str, Any] = {"__name__": "notebook"}
    for number, cell in enumerate(cells(path, "code")):
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                code = "".join(cell["source"])
                run(code, scope)
                if number == 0:  # fewer texts will do
                    scope["texts"], scope["held_out"] = scope["texts"][:24], scope["held_out"][:24]
            except Exception as error:
                raise AssertionError(f"{path.name}, cell {number}: {type(error).__name__}: {error}") from error
    assert isinstance(scope["cosines"], torch.Tensor)
    assert float(scope["cosines"].mean()) > 0.9


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_run_from_the_first_cell_to_the_last(path: Path) -> None:
    """``scripts/run_notebooks.py`` did; whoever changes a cell runs it again."""
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert kinds == {"stream", "execute_result"}
    assert path.stat().st_size < 400_000


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["convert_and_compare", "tune_and_deploy"]
    for path, other in zip(NOTEBOOKS, reversed(NOTEBOOKS), strict=True):
        assert any(other.name in "".join(cell["source"]) for cell in cells(path, "markdown"))
