"""Where the tests and what they test lie."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = ROOT / "qdq_surgery"
SCRIPTS = ROOT / "scripts"
