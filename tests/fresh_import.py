"""What a new process tells that has just imported the package, and what it did before: one for all tests of that.

An import takes seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ecosystem import calibrated
from kept import kept

__all__ = ["Told", "fresh_import"]

_CODE = """
import json, logging, sys
import torch, transformers
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
alone = [type(model.bert.encoder.layer[0].output.dense).__name__, len(model.state_dict()), "qdq_surgery" in sys.modules]
def state(): return [len(logging.root.handlers), logging.root.level, logging.getLoggerClass().__name__]
before = state()
import qdq_surgery, qdq_surgery.cli
after = state()
modules = list(sys.modules)
logging.basicConfig(level=logging.INFO)
logging.getLogger("mine").info("heard")
print(json.dumps([alone, before, after, modules]))
"""


@dataclass(frozen=True)
class Told:
    """What a new process tells.

    Attributes:
        alone: What transformers made of a converted model's folder before: the class of a linear, the number of
            tensors, and whether that imported the package.
        before: The state of logging before the import.
        after: And after it.
        modules: What was in ``sys.modules`` then.
        logged: All that was logged.
    """

    alone: list[object]
    before: list[object]
    after: list[object]
    modules: frozenset[str]
    logged: str


def fresh_import() -> Told:
    """Warnings are no errors there: what others warn of is theirs."""
    return kept(_told, "fresh import")


def _told(folder: Path) -> Told:
    calibrated().save_pretrained(folder)
    options = ["-W", "ignore", "-W", "error:`torch.jit.script`"]  # which pytorch-quantization makes torch say
    done = subprocess.run(
        [sys.executable, *options, "-c", _CODE, str(folder)], capture_output=True, text=True, check=True
    )
    alone, before, after, modules = json.loads(done.stdout)
    return Told(alone, before, after, frozenset(modules), done.stderr)
