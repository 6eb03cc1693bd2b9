"""The matrix of versions: its page shows the rows that the script runs, and the smoke set runs on what is installed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT
from transformers.utils import logging

import smoke_versions
from versions.environments import Environments, MissingError, Row, listed_rows
from versions.table import COLUMNS, document, failures, printed

PAGE = (ROOT / "docs" / "versions.md").read_text()

ROWS = [Row("3.11", "2.13.0", "5.23.0"), Row("3.10", "2.8.0", "5.0.0")]

RIGHT: dict[str, Any] = {"versions": {}, "steps": {column: {"bert": "ok", "albert": "ok"} for column in COLUMNS}}


def test_the_page_has_the_rows_that_the_script_runs() -> None:
    found = re.findall(r"^\| (\d+\.\d+) \| ([\d.]+) \| ([\d.]+) \|", PAGE, re.MULTILINE)
    assert found == [(row.python, row.torch, row.transformers) for row in listed_rows()]


def test_no_row_stands_twice() -> None:
    names = [row.name for row in listed_rows()]
    assert len(set(names)) == len(names)


def test_the_installed_versions_are_a_row() -> None:
    pins = dict(re.findall(r"^(\w+)==(\S+)$", (ROOT / "scripts" / "constraints.txt").read_text(), re.MULTILINE))
    assert (pins["torch"], pins["transformers"]) in [(row.torch, row.transformers) for row in listed_rows()]


def test_the_lower_bounds_are_rows() -> None:
    """What pyproject.toml allows at least has been run."""
    project = (ROOT / "pyproject.toml").read_text()
    rows = listed_rows()

    def lowest(pattern: str) -> tuple[int, ...]:
        found = re.search(pattern, project)
        assert found is not None
        return tuple(map(int, found[1].split(".")))

    def least(versions: list[str]) -> tuple[int, ...]:
        return min(tuple(map(int, version.split(".")[:2])) for version in versions)

    assert least([row.python for row in rows]) == lowest(r'requires-python = ">=([\d.]+)"')
    assert least([row.torch for row in rows]) == lowest(r'\n  "torch>=([\d.]+)"')
    assert least([row.transformers for row in rows])[0] == lowest(r'"transformers>=([\d.]+)')[0]


def test_the_readme_names_the_lowest_and_the_highest() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = listed_rows()

    def ends(versions: list[str]) -> tuple[str, str]:
        ordered = sorted(versions, key=lambda version: tuple(map(int, version.split("."))))
        return ordered[0], ordered[-1]

    for name, (low, high) in {
        "transformers": ends([row.transformers for row in rows]),
        "torch": ends([row.torch for row in rows]),
        "Python": ends([row.python for row in rows]),
    }.items():
        assert f"{name} {low} to {high}" in readme


def test_a_failure_is_a_line_of_its_own() -> None:
    broken = {**RIGHT["steps"], "convert": {"bert": "ok", "albert": "MatchError: 3"}, "exact": {"albert": "-"}}
    outcomes: dict[str, Any] = {ROWS[0].name: {"versions": {}, "steps": broken}, ROWS[1].name: "not run: no python3.10"}
    assert failures(ROWS, outcomes) == [
        ("3.11-2.13.0-5.23.0", "convert albert: MatchError: 3"),
        ("3.10-2.8.0-5.0.0", "not run: no python3.10"),
    ]
    lines = printed(ROWS, outcomes).splitlines()
    assert lines[1].split()[:5] == ["3.11", "2.13.0", "5.23.0", "2", "1"]
    assert lines[-1] == "3.10-2.8.0-5.0.0: not run: no python3.10"
    assert "- 3.11-2.13.0-5.23.0: convert albert: MatchError: 3" in document(ROWS, outcomes).splitlines()


def test_a_page_of_rows_that_are_right_tells_of_no_failure() -> None:
    page = document(ROWS, {row.name: RIGHT for row in ROWS})
    assert "was not run" not in page
    assert page.count("| 2 |") >= 2


def test_a_python_that_is_not_there_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no python9\.9 on the path or under pyenv"):
        Environments(tmp_path).make(Row("9.9", "2.13.0", "5.23.0"))


@pytest.fixture
def one_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(smoke_versions, "MODELS", {"bert": {**smoke_versions.MODELS["bert"], "num_hidden_layers": 1}})
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.mark.slow
@pytest.mark.usefixtures("one_model")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_smoke_set_runs_on_what_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    result = tmp_path / "result.json"
    assert smoke_versions.main([str(result), str(tmp_path), "--read", str(tmp_path)]) == 0
    steps = json.loads(result.read_text())["steps"]
    assert set(steps) == set(COLUMNS)
    assert all(cell == "ok" for step in steps.values() for cell in step.values())


@pytest.mark.usefixtures("one_model")
def test_a_model_that_does_not_load_fails_the_row(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    assert smoke_versions.main([str(result), "--read", str(tmp_path), "--only-read"]) == 1
    assert "saved nothing to load" in json.loads(result.read_text())["steps"]["across"]["bert"]
