"""The wheel: what is no Python travels in it. That it works away from the checkout, test_journey.py sees."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from repository import ROOT

import qdq_surgery as qs


def test_the_wheel_carries_the_rules(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {f"qdq_surgery/rules/shipped/{name}.yaml" for name in qs.shipped_rules()} <= set(names)
    assert "qdq_surgery/py.typed" in names
    assert {f"qdq_surgery/html_report/assets/page.{kind}" for kind in ("css", "html.j2", "js")} <= set(names)
    assert not any(name.startswith(("tests", "scripts")) for name in names)
