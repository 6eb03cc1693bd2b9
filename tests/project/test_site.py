"""The site builds without a warning, links included, and the reference has the docstrings of all public names."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import pytest
from repository import ROOT

import qdq_surgery as qs

pytest.importorskip("sphinx", reason="the site is built with Sphinx: pip install '.[docs]'")
for package in ("myst_parser", "furo", "sphinxcontrib.mermaid"):
    pytest.importorskip(package, reason="pip install '.[docs]'")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def built(docs: Path, site: Path) -> tuple[int, str]:
    """The exit code of Sphinx, and what it says; a warning is an error, as in scripts/docs.sh."""
    from sphinx.cmd.build import build_main

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = build_main(["--fail-on-warning", "--keep-going", "--quiet", "--jobs", "1", str(docs), str(site)])
    return code, said.getvalue()


def test_the_script_builds_it_so() -> None:
    script = (ROOT / "scripts" / "docs.sh").read_text(encoding="utf-8")
    assert "sphinx --fail-on-warning --keep-going --quiet --jobs 1" in script


def test_it_builds(tmp_path: Path) -> None:
    code, said = built(ROOT / "docs", tmp_path)
    assert code == 0, said
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    names = {*qs.__all__, "trainer.QATTrainer"} - {"__version__"}
    assert not [name for name in names if f'id="qdq_surgery.{name}"' not in reference]
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= {path.stem for path in tmp_path.glob("*.html")}


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "docs" / "conf.py", docs)
    (docs / "index.md").write_text("# A page\n\n[this](other.md) [that](other.md#no-such-heading)\n", encoding="utf-8")
    (docs / "other.md").write_text("# Another\n", encoding="utf-8")
    code, said = built(docs, tmp_path / "site")
    assert code == 1
    assert said.count("WARNING") == 1
    assert "no-such-heading" in said
