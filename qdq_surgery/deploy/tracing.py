"""From the model to an ONNX graph: torch.export, then torch's own exporter, with a node for each quantizer.

transformers has an exporter of its own (``transformers.exporters``). It is left aside: it exists in the latest releases
of version 5 only, it replaces functions of torch for the whole process while it traces, and what its patches are for
is not needed here: every architecture that can be converted traces without them.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdq_surgery.convert import quantizers
from qdq_surgery.errors import ExportError
from qdq_surgery.tagging import tagged

__all__ = ["Traced", "trace"]

_EXPORTER = "torch.onnx._internal.exporter"


@dataclass(frozen=True)
class Traced:
    """A graph with ``qdq_surgery::FakeQuant`` nodes, and what the model returns.

    Attributes:
        model: The graph; parameters are its initializers, under their names in the model.
        output_class: Qualified name of the Hugging Face output class.
        outputs: Names of the outputs: the fields of that class, ``hidden_states.0`` for the first of a tuple.
    """

    model: ir.Model
    output_class: str
    outputs: tuple[str, ...]


def trace(qmodel: PreTrainedModel, inputs: Mapping[str, Any], opset: int, dynamic: bool) -> Traced:
    """Trace ``qmodel``, in eval mode.

    Args:
        inputs: Keyword arguments of its forward; the tensors become the graph's inputs.
        dynamic: Keep batch and sequence open. Otherwise the file takes tensors of these shapes only.

    Raises:
        ExportError: torch cannot export the model; says what it said.
    """
    names = {each: name for name, each in quantizers(qmodel).items()}
    with torch.no_grad(), _quiet():
        # Also records a kind of call that is new to a converted model, which cannot happen while it is traced.
        returned = qmodel(**inputs)
        fields = _fields(returned, type(qmodel).__name__)
        shapes = {name: _open_axes(value) if dynamic else None for name, value in inputs.items()}
        try:
            with tagged(names):
                program = torch.export.export(qmodel, (), dict(inputs), dynamic_shapes=shapes, strict=False)
            made = torch.onnx.export(program, (), opset_version=opset, output_names=fields, verbose=False)
        except Exception as error:  # whatever torch.export makes of a model's code
            raise ExportError(f"{type(qmodel).__name__} cannot be traced: {_first_line(error)}") from error
    assert made is not None
    graph = made.model
    graph.graph.name = type(qmodel).__name__
    if dynamic:
        _name_axes(graph.graph, inputs)
    output_class = type(returned)
    return Traced(graph, f"{output_class.__module__}.{output_class.__qualname__}", tuple(fields))


def _fields(returned: Any, model: str) -> list[str]:
    if not hasattr(returned, "items"):
        raise ExportError(f"{model} returned a {type(returned).__name__}, no Hugging Face output; set return_dict=True")
    return [name for key, value in returned.items() for name in _flat(key, value, model)]


def _flat(name: str, value: Any, model: str) -> Iterator[str]:
    if isinstance(value, Tensor):
        yield name
    elif isinstance(value, (tuple, list)):
        for at, each in enumerate(value):
            yield from _flat(f"{name}.{at}", each, model)
    elif value is not None:
        raise ExportError(f"{model} returned '{name}', a {type(value).__name__}; call it with use_cache=False")


def _open_axes(value: Any) -> dict[int, Any] | None:
    if not isinstance(value, Tensor):
        return None
    # The last axis of states is the width of the model.
    axes = value.ndim - 1 if value.is_floating_point() and value.ndim > 2 else value.ndim
    return {axis: torch.export.Dim.DYNAMIC for axis in range(axes)}


def _name_axes(graph: ir.Graph, inputs: Mapping[str, Any]) -> None:
    """``batch`` and ``sequence`` for the tracer's numbered symbols, everywhere."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        example = inputs.get(value.name or "")
        if value.shape is None or not isinstance(example, Tensor):
            continue
        for axis, size in enumerate(value.shape):
            if not isinstance(size, ir.SymbolicDim) or size.value is None or size.value in names:
                continue
            last = axis == len(value.shape) - (2 if example.is_floating_point() and example.ndim > 2 else 1)
            name = "batch" if axis == 0 else "sequence" if last else "choices"
            while name in names.values():
                name = f"{name}_of_{value.name}"
            names[size.value] = name
    pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names) or r"(?!)")
    values = [*graph.inputs, *graph.outputs, *(out for node in graph.all_nodes() for out in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    pattern.sub(lambda found: names[found[0]], size.value)
                    if isinstance(size, ir.SymbolicDim) and size.value is not None
                    else size
                    for size in value.shape
                ]
            )


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # torch.onnx wraps what happened several times
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns about torchvision, which is not needed, and about names of axes."""
    log = logging.getLogger(_EXPORTER)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
