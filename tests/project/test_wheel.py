"""The wheel: rule files travel in it, and it works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from repository import ROOT

import qdq_surgery as qs


@pytest.mark.slow
def test_the_wheel_carries_the_rules(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    [wheel] = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = archive.namelist()
    assert {f"qdq_surgery/rules/shipped/{name}.yaml" for name in qs.shipped_rules()} <= set(names)
    assert "qdq_surgery/py.typed" in names
    assert {f"qdq_surgery/html_report/assets/page.{kind}" for kind in ("css", "html.j2", "js")} <= set(names)
    assert not any(name.startswith(("tests", "scripts")) for name in names)
    code = (
        "import pathlib, sys, qdq_surgery as qs\n"
        "home = pathlib.Path(qs.__file__).resolve().parent\n"
        f"assert home == pathlib.Path({str(site)!r}).resolve() / 'qdq_surgery', home\n"
        "rules = qs.load_rules('qdqbert')\n"
        "assert rules.path.parent == home / 'rules' / 'shipped', rules.path\n"
        "print(len(rules.rules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(len(qs.load_rules("qdqbert").rules))
