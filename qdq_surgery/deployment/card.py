"""The card of a deployed folder, as model hubs show it: what the file is, what it loses, and how it is run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qdq_surgery.sensitivity.evaluate import Evaluation
from qdq_surgery.targets.registry import DEFAULT, TARGETS
from qdq_surgery.version import __version__

__all__ = ["Deployed", "base_name", "card"]

#: Runtimes that open no files here.
_BUILT = tuple(name for name, target in TARGETS.items() if target.session is None)


@dataclass(frozen=True)
class Deployed:
    """What the card tells.

    Attributes:
        base: The float model's name.
        target: The runtime's name.
        rules: Names of the rules that placed the quantizers.
        files: Name and size in bytes of each model file.
        float_bytes: Size of the float model's weights.
        loss: Against float, on texts that were not calibrated on.
        judged: What was compared with the float model, in words.
        linear_share: Of the linears' multiply-adds, how much the runtime computes in INT8; ``None`` if not asked.
        calibrated: Texts that the ranges were found from.
    """

    base: str
    target: str
    rules: str
    files: Sequence[tuple[str, int]]
    float_bytes: int
    loss: Evaluation
    judged: str
    linear_share: float | None
    calibrated: int


def card(made: Deployed) -> str:
    """Markdown under YAML that hubs read."""
    runtime = "" if made.target in (DEFAULT, *_BUILT) else f', "{made.target}"'
    figures = "\n".join(f"| {name} | {value:.4g} |" for name, value in made.loss.figures.items())
    files = "\n".join(f"| `{name}` | {size / 1e6:.1f} MB |" for name, size in made.files)
    share = (
        ""
        if made.linear_share is None
        else f"\n{100 * made.linear_share:.1f} % of the linears' multiply-adds run in INT8 there.\n"
    )
    return f"""---
base_model: {json.dumps(made.base)}
base_model_relation: quantized
tags: [onnx, int8, quantized, qdq-surgery, {made.target}]
---

# {made.base}, in INT8 for {made.target}

Static INT8 with Q/DQ pairs, written by qdq_surgery {__version__} with the rules `{made.rules}`;
ranges from {made.calibrated} texts.
{share}
| file | size |
|---|--:|
{files}
| the float model's weights | {made.float_bytes / 1e6:.1f} MB |

What it loses against the float model, on {made.loss.rows} held-out texts ({made.judged}):

| figure | value |
|---|--:|
{figures}

```python
import qdq_surgery as qs

model = qs.load_onnx("{made.files[0][0]}"{runtime})  # takes what the tokenizer gives, returns Hugging Face's outputs
```
"""


def base_name(folder: str | Path) -> str:
    """What the float model is called: the name on the Hub of a folder in its cache, else that of the folder."""
    path = Path(os.path.realpath(folder))
    cached = next((each.name for each in path.parents if each.name.startswith("models--")), None)
    return path.name or "model" if cached is None else cached.removeprefix("models--").replace("--", "/")
