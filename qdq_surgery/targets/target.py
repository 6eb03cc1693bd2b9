"""What a target is: how a file for one runtime is written, what the runtime makes of it, and how it runs there.

The rule file of the same name says where quantizers go (``rules/onnxruntime.yaml``, ``rules/openvino.yaml``,
``rules/tensorrt.yaml``). Any converted model can be written for any target: what does not fit together is what the
placement linter tells.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import NDArray

from qdq_surgery.onnx_graph.executed import Executed
from qdq_surgery.onnx_graph.graph import OnnxGraph
from qdq_surgery.targets.session import Session

if TYPE_CHECKING:
    from qdq_surgery.targets.lint_rules import LintRules

__all__ = ["ACTIVATIONS", "PRECISIONS", "Layers", "OwnForm", "Target", "full_precision"]

ACTIVATIONS = ("int8", "uint8")
PRECISIONS = ("float32", "float16", "bfloat16")

#: OpenVINO's words, which ``load_onnx`` and ``receipt`` took in 0.1.0.
_SHORT = {"f32": "float32", "bf16": "bfloat16"}

#: What the inspector of an engine that was built elsewhere wrote: the path, or the data.
Layers = str | Path | Mapping[str, Any]


class OwnForm(NamedTuple):
    """A runtime's own form of a file.

    Attributes:
        path: Where tools look for it, in the folder of a model.
        write: From an ONNX file to it.
        run: Its outputs by name, from inputs by name.
    """

    path: str
    write: Callable[[Path, Path], None]
    run: Callable[[Path, Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class Target:
    """One runtime.

    Attributes:
        name: As it is asked for: ``onnxruntime``, ``openvino`` or ``tensorrt``.
        title: As its makers write it.
        opset: The version of ONNX's operators if none is asked for.
        opsets: The versions that can be asked for, first and last.
        activations: The integers that activations may become; the first is the usual one. ``uint8`` is the same grid
            as ``int8``, moved: its zero point is 128.
        lint: The module that has the lint ``Rules``; by its name, for it needs onnx_ir, which is optional.
        executed: Reads the graph that the runtime made of a file, given what :func:`~qdq_surgery.receipt` was given as
            ``precision`` and ``layers``.
        session: Opens a file; ``None`` if the runtime builds an engine elsewhere.
        unchecked: Why the certificate cannot ask a runtime without a session.
        precisions: What everything else is computed in; the first is the usual one.
        unsigned: Whether a quantizer with an unsigned grid (zero point 0, 255 steps) can be written.
        activation_axes: Whether an activation can have a scale for each entry of an axis.
        plain_bias: Keep the runtime from fusing a bias with a GELU behind it, or with the product before it, and from
            leaving a product in float for the sake of a ReLU behind it.
        plain_skip_norm: Keep the runtime from fusing a residual add and the LayerNorm behind it.
        scales_apart: Keep the runtime from fusions that drop an activation's scales, or an embedding's factor.
        int8_rows: Whether tables of embeddings can be stored as int8 rows, dequantized behind the lookup.
        own_form: What else a deployed folder has for tools that load no ONNX on this runtime; ``None``: nothing.
    """

    name: str
    title: str
    opset: int
    opsets: tuple[int, int]
    activations: tuple[str, ...]
    lint: str
    executed: Callable[[OnnxGraph, str | None, Layers | None], Executed]
    session: type[Session] | None = None
    unchecked: str = "which needs an engine"
    precisions: tuple[str, ...] = ("float32",)
    unsigned: bool = True
    activation_axes: bool = True
    plain_bias: bool = False
    plain_skip_norm: bool = False
    scales_apart: bool = False
    int8_rows: bool = True
    own_form: OwnForm | None = None

    def rules(self) -> type[LintRules]:
        """The lint rules."""
        found: type[LintRules] = importlib.import_module(self.lint).Rules
        return found


def full_precision(name: str) -> str:
    """One of :data:`PRECISIONS` for its short form; any other word as it is."""
    return _SHORT.get(name, name)
