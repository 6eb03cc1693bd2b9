"""What a new process tells that has just imported the package: one for all tests of it, as an import takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from kept import kept

__all__ = ["Told", "fresh_import"]

_CODE = """
import json, logging, sys
import torch, transformers
def state(): return [len(logging.root.handlers), logging.root.level, logging.getLoggerClass().__name__]
before = state()
import qdq_surgery, qdq_surgery.cli
after = state()
modules = list(sys.modules)
logging.basicConfig(level=logging.INFO)
logging.getLogger("mine").info("heard")
print(json.dumps([before, after, modules]))
"""


@dataclass(frozen=True)
class Told:
    """The state of logging before and after the import, what was in ``sys.modules`` then, and what was logged."""

    before: list[object]
    after: list[object]
    modules: frozenset[str]
    logged: str


def fresh_import() -> Told:
    """Warnings are no errors there: what others warn of is theirs."""
    return kept(_told, "fresh import")


def _told(_: Path) -> Told:
    options = ["-W", "ignore", "-W", "error:`torch.jit.script`"]  # which pytorch-quantization makes torch say
    done = subprocess.run([sys.executable, *options, "-c", _CODE], capture_output=True, text=True, check=True)
    before, after, modules = json.loads(done.stdout)
    return Told(before, after, frozenset(modules), done.stderr)
