"""Why a part of a converted model is as it is."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text
from torch import nn

from qdq_surgery.errors import ModelError
from qdq_surgery.match.plan import Refusal
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.surgery.model_state import plan_of, quantizers
from qdq_surgery.text.render import Rendered

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation(Rendered):
    """Quantizers and refusals at and below one module.

    Attributes:
        path: That of the module; empty for the whole model.
        found: The quantizers by qualified name.
        refusals: What got none, and why.
    """

    path: str
    found: dict[str, TensorQuantizer]
    refusals: tuple[Refusal, ...]

    def __rich__(self) -> RenderableType:
        lines = [Text(self.path or "the whole model", style="bold")]
        for name, quantizer in self.found.items():
            origin = quantizer.provenance
            lines.append(Text(f"+ {name}", style="green"))
            lines.append(Text(f"    {quantizer.extra_repr()}"))
            if origin is not None:
                declared = f", {origin.declared}" if origin.declared else ""
                lines.append(
                    Text(f"    {origin.operand} at {origin.source}, by rule {origin.rule} of {origin.rules}{declared}")
                )
                lines.append(Text(f"    because: {origin.why}"))
        for refusal in self.refusals:
            place = f" at {refusal.source}" if refusal.source else ""
            lines.append(Text(f"- {refusal.path}: {refusal.operator}{place}", style="yellow"))
            lines.append(Text(f"    because: {refusal.reason}"))
        if len(lines) == 1:
            lines.append(Text("  nothing here: no operator that a rule is about"))
        return Group(*lines)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "path": self.path,
            "quantizers": {
                name: None if quantizer.provenance is None else quantizer.provenance._asdict()
                for name, quantizer in self.found.items()
            },
            "refusals": [refusal.to_json() for refusal in self.refusals],
        }


def explain(qmodel: nn.Module, path: str = "") -> Explanation:
    """Which rule put what at and below ``path``, and what was refused there and why.

    Args:
        path: A module path such as ``encoder.layer.3.output``, or that of a quantizer.

    Raises:
        ModelError: The model is not converted, or has no such module.
    """
    made = plan_of(qmodel)
    paths = [name for name, _ in qmodel.named_modules()]
    if path not in paths:
        close = get_close_matches(path, paths, n=3)
        raise ModelError(
            f"there is no module '{path}'; {'near it: ' + ', '.join(close) if close else 'see named_modules()'}"
        )
    found = {
        name: q for name, q in quantizers(qmodel).items() if not path or name == path or name.startswith(path + ".")
    }
    refusals = tuple(item for item in made.under(path) if isinstance(item, Refusal))
    return Explanation(path, found, refusals)
