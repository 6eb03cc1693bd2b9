"""Why a part of a converted model is as it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn

from qdq_surgery.errors import ModelError
from qdq_surgery.match.plan import Refusal
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.surgery.model_state import plan_of, quantizers
from qdq_surgery.text.view import Line, Part, Result, line

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True, repr=False)
class Explanation(Result):
    """Quantizers and refusals at and below one module.

    Attributes:
        path: That of the module; empty for the whole model.
        found: The quantizers by qualified name.
        refusals: What got none, and why.
    """

    path: str
    found: dict[str, TensorQuantizer]
    refusals: tuple[Refusal, ...]

    def _title(self) -> Line:
        return line((self.path or "the whole model", "bold"))

    def _parts(self) -> Iterable[Part]:
        for name, quantizer in self.found.items():
            origin = quantizer.provenance
            yield from (line((f"+ {name}", "green")), f"    {quantizer.extra_repr()}")
            if origin is not None:
                declared = f", {origin.declared}" if origin.declared else ""
                yield f"    {origin.operand} at {origin.source}, by rule {origin.rule} of {origin.rules}{declared}"
                yield f"    because: {origin.why}"
        for refusal in self.refusals:
            place = f" at {refusal.source}" if refusal.source else ""
            yield line((f"- {refusal.path}: {refusal.operator}{place}", "yellow"))
            yield f"    because: {refusal.reason}"
        if not self.found and not self.refusals:
            yield "  nothing here: no operator that a rule is about"

    def to_json(self) -> dict[str, Any]:
        """The same as plain data; ``schema`` is the version of this form."""
        return {
            "schema": 1,
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
    if not isinstance(path, str):
        raise ModelError(f"the path is a {type(path).__name__}; give a text, such as 'encoder.layer.0'")
    paths = [name for name, _ in qmodel.named_modules()]
    if path not in paths:
        close = get_close_matches(path, paths, n=3)
        raise ModelError(
            f"there is no module '{path}'; {'near it' if close else 'at the top there are'}: "
            f"{', '.join(close or [name for name, _ in qmodel.named_children()])}"
        )
    found = {
        name: q for name, q in quantizers(qmodel).items() if not path or name == path or name.startswith(path + ".")
    }
    refusals = tuple(item for item in made.under(path) if isinstance(item, Refusal))
    return Explanation(path, found, refusals)
