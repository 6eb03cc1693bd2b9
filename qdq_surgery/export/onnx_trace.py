"""From the model to an ONNX graph: torch.export, then torch's own exporter, with a node for each quantizer.

transformers has an exporter of its own (``transformers.exporters``). It is left aside: it exists in the latest releases
of version 5 only, it replaces functions of torch for the whole process while it traces, and what its patches are for
is not needed here: every architecture that can be converted traces without them.
"""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from qdq_surgery.errors import ExportError, ModelError, QdqSurgeryError
from qdq_surgery.export.decompositions import decomposed_in_place
from qdq_surgery.hf.config_facts import without_ffn_chunking
from qdq_surgery.quantize.export_node import tagged
from qdq_surgery.safety.torch_private import ONNX_EXPORTER_LOG
from qdq_surgery.surgery.model_state import quantizers

__all__ = ["Traced", "trace"]

#: How much a message holds of what torch says, in characters: the reason stands in the second or third line.
_LONGEST = 400


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
        ModelError: The model does not take the inputs.
        ExportError: torch cannot export the model; says what it said.
    """
    names: dict[nn.Module, str] = {each: name for name, each in quantizers(qmodel).items()}
    # The file has its own precision, whatever the caller's block casts to.
    with torch.no_grad(), torch.autocast("cpu", enabled=False), _quiet(), without_ffn_chunking(qmodel):
        returned = _tensors_of(_called(qmodel, inputs))
        fields = _fields(returned, type(qmodel).__name__)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        shapes = {name: _open_axes(name, value, inputs) for name, value in tensors.items()} if dynamic else None
        try:
            with tagged(names), _bound(qmodel, tensors, inputs):
                graph = _torch_graph(qmodel, tensors, shapes, opset, fields)
        except Exception as error:  # whatever torch.export makes of a model's code
            raise ExportError(f"{type(qmodel).__name__} cannot be traced: {_cause(error)}") from error
    graph.graph.name = type(qmodel).__name__
    if dynamic:
        _name_axes(graph.graph, inputs)
    output_class = type(returned)
    return Traced(graph, f"{output_class.__module__}.{output_class.__qualname__}", tuple(fields))


def _torch_graph(
    qmodel: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    shapes: dict[str, Any] | None,
    opset: int,
    fields: list[str],
) -> ir.Model:
    """What torch makes of the model: seconds, where all the rest of an export takes a tenth of one."""
    program = torch.export.export(qmodel, (), dict(tensors), dynamic_shapes=shapes, strict=False)
    made = torch.onnx.export(decomposed_in_place(program), (), opset_version=opset, output_names=fields, verbose=False)
    assert made is not None
    return made.model


def _called(qmodel: PreTrainedModel, inputs: Mapping[str, Any]) -> Any:
    """What the model returns. Also records a kind of call that is new to it, which cannot happen while it is traced."""
    try:
        return qmodel(**inputs)
    except QdqSurgeryError:
        raise
    except Exception as error:
        raise ModelError(
            f"{type(qmodel).__name__} does not run on the example inputs ({', '.join(inputs)}): "
            f"{type(error).__name__}: {error}; pass example_inputs= that it takes"
        ) from error


def _tensors_of(returned: Any) -> Any:
    """An output without the whole outputs in it: those of the towers of a model of two, whose embeddings stay."""
    if not isinstance(returned, ModelOutput) or not any(isinstance(each, ModelOutput) for each in returned.values()):
        return returned
    return type(returned)(**{name: each for name, each in returned.items() if not isinstance(each, ModelOutput)})


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


@contextmanager
def _bound(qmodel: PreTrainedModel, tensors: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Iterator[None]:
    """While it holds, the model's forward names exactly the tensors, and is called with the rest as it is.

    torch.export keeps no shape open of what goes through ``**kwargs``, as ``output_attentions`` does in transformers,
    nor of a tensor beside it.
    """
    forward = qmodel.forward
    rest = {name: value for name, value in inputs.items() if name not in tensors}

    def bound(**given: Tensor) -> Any:
        return _tensors_of(forward(**given, **rest))

    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in tensors]
    bound.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    own = "forward" in vars(qmodel)
    qmodel.forward = bound
    try:
        yield
    finally:
        if own:
            qmodel.forward = forward
        else:
            del qmodel.forward


def _open_axes(name: str, value: Tensor, inputs: Mapping[str, Any]) -> dict[int, Any]:
    """Which axes stay open."""
    # An axis of 1 is one that broadcasts, such as the first of position_ids (1, tokens).
    axes = [axis for axis, size in enumerate(value.shape) if size > 1]
    # Of an image the channels and the size are the model's.
    if value.ndim == 4 and value.is_floating_point() and "mask" not in name:
        axes = [axis for axis in axes if axis == 0]
    if _has_width(name, value, inputs):
        axes = [axis for axis in axes if axis < value.ndim - 1]
    return dict.fromkeys(axes, torch.export.Dim.DYNAMIC)


def _has_width(name: str, value: Tensor, inputs: Mapping[str, Any]) -> bool:
    """Whether the last axis holds what belongs to one token: its states, the corners of its box."""
    if value.is_floating_point() and value.ndim > 2 and "mask" not in name:
        return True
    ids = inputs.get("input_ids")
    return isinstance(ids, Tensor) and value.ndim > 2 and value.shape[:-1] == ids.shape


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
            last = axis == len(value.shape) - (2 if _has_width(str(value.name), example, inputs) else 1)
            name = "batch" if axis == 0 else "sequence" if last else "choices"
            # A mask is looked up row by row, so that torch does not see that it has as many rows as there are texts.
            while name in names.values() and last:
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


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:  # torch.onnx wraps what happened several times
        error = error.__cause__
    words = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {words[:_LONGEST]}{'...' if len(words) > _LONGEST else ''}"


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about torchvision, which is not needed, and about names of axes."""
    log = logging.getLogger(ONNX_EXPORTER_LOG)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
