"""How many multiply-adds each product takes, from the shapes of one run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdq_surgery.errors import ModelError
from qdq_surgery.onnx_graph.graph import OnnxGraph
from qdq_surgery.onnx_graph.products import Product
from qdq_surgery.safety.untrusted import quoted
from qdq_surgery.targets.registry import REFERENCE
from qdq_surgery.text.optional_imports import require

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["count_multiply_adds"]

_PREFIX = "qdq_surgery.shape/"
#: How many choices a question has, in a model that takes several.
_CHOICES = 2
#: ONNX's types that a runtime can be fed with here: floats, integers and bools.
_TYPES = (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13)
#: Most elements of an input.
_LARGEST = 2**28

Shape = tuple[int, ...]


def count_multiply_adds(graph: OnnxGraph, shape: tuple[int, int]) -> tuple[dict[str, int], tuple[int, int]]:
    """Multiply-adds by the name of the product, and the batch and the tokens that they are for.

    The file is run once, on ONNX Runtime without optimizations, and tells its shapes on the way: shape inference stops
    at what DeBERTa computes its shapes with.

    Args:
        shape: Batch and tokens. A file with fixed axes is taken as it is.

    Raises:
        ModelError: The file cannot be run in that shape.
    """
    feed = {str(value.name): _input(graph, value, shape) for value in graph.graph.inputs}
    if not feed:
        raise ModelError(f"{graph.path} takes no inputs, so that nothing can be counted; export the model again")
    shapes = _run(graph, feed, shape)
    # Of ids the last axis are the tokens, after choices perhaps; of states it is the width.
    sizes = next((each.shape for each in feed.values() if each.dtype.kind != "f"), next(iter(feed.values())).shape[:2])
    if not sizes:
        raise ModelError(f"{graph.path} takes no tokens, so that nothing can be counted; export the model again")
    return {gemm.name: _counted(graph, gemm, shapes) for gemm in graph.products}, (sizes[0], sizes[-1])


def _input(graph: OnnxGraph, value: ir.Value, shape: tuple[int, int]) -> NDArray[Any]:
    sizes = [_size(axis, shape) for axis in value.shape or ()]
    if value.dtype is None or value.dtype not in _TYPES or min(sizes, default=1) < 1 or math.prod(sizes) > _LARGEST:
        raise ModelError(
            f"{graph.path} takes {quoted(value.name)} as {'x'.join(map(str, sizes))} of type {int(value.dtype or 0)}, "
            "which no file of qdq_surgery does; export the model again"
        )
    # No padding: a mask of zeros would be another model's run. Everything else may be zero.
    filler = np.ones if "mask" in str(value.name) else np.zeros
    return filler(sizes, dtype=value.dtype.numpy())


def _size(axis: int | ir.SymbolicDim, shape: tuple[int, int]) -> int:
    if isinstance(axis, int):
        return axis
    # As qdq_surgery.export.onnx_trace names them.
    name = (axis.value or "").partition("_of_")[0]
    return shape[0] if name == "batch" else _CHOICES if name == "choices" else shape[1]


def _run(graph: OnnxGraph, feed: Mapping[str, NDArray[Any]], shape: tuple[int, int]) -> dict[str, Shape]:
    """Shapes of all that is multiplied and of the results, by the value's name."""
    onnx = require("onnx", "a receipt")
    REFERENCE.package("a receipt")
    multiplied = (value for gemm in graph.products for value in (*gemm.factors, gemm.node.outputs[0]))
    values = list(dict.fromkeys(str(value.name) for value in multiplied))
    model = require("onnx_ir", "a receipt").to_proto(graph.file.model)
    del model.graph.output[:]
    for value in values:
        model.graph.node.append(onnx.helper.make_node("Shape", [value], [_PREFIX + value], name=_PREFIX + value))
        model.graph.output.append(onnx.helper.make_tensor_value_info(_PREFIX + value, onnx.TensorProto.INT64, [None]))
    try:
        session = REFERENCE.open(model.SerializeToString(), optimized=False, folder=graph.path.resolve().parent)
        found = session.run([_PREFIX + value for value in values], dict(feed))
    except Exception as error:  # its exceptions share no base
        raise ModelError(
            f"{graph.path} cannot be run with {shape[0]} x {shape[1]} tokens, to count its multiply-adds: "
            f"{REFERENCE.reason(error)}; give shape=(batch, tokens) that the model takes"
        ) from error
    return {value: tuple(map(int, each)) for value, each in zip(values, found, strict=True)}


def _counted(graph: OnnxGraph, gemm: Product, shapes: Mapping[str, Shape]) -> int:
    try:
        return _count(gemm.node, [shapes[str(factor.name)] for factor in gemm.factors], shapes)
    except (AssertionError, KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"{graph.path} has a product {quoted(gemm.name)} whose multiply-adds cannot be counted: its shapes are "
            f"{[shapes.get(str(factor.name)) for factor in gemm.factors]}; export the model again"
        ) from error


def _count(node: ir.Node, factors: Sequence[Shape], shapes: Mapping[str, Shape]) -> int:
    size, attributes = math.prod(shapes[str(node.outputs[0].name)]), node.attributes
    if node.op_type == "MatMul":
        return size * factors[0][-1]
    if node.op_type == "Gemm":
        return size * factors[0][0 if attributes.get_int("transA", 0) else 1]
    if node.op_type == "Conv":
        return size * math.prod(factors[1][1:])  # the weight's: output channels, input channels of a group, kernel
    if node.op_type == "Einsum":
        return size * _summed(attributes["equation"].as_string(), factors)
    return _attention(factors, attributes.get_int("q_num_heads"), attributes.get_int("kv_num_heads"))


def _summed(equation: str, factors: Sequence[Shape]) -> int:
    """How many products stand behind one element of an einsum's result."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:  # what stands once is not summed over
        output = "".join(letter for letter in inputs if inputs.count(letter) == 1)
    sizes: dict[str, int] = {}
    for term, shape in zip(inputs.split(","), factors, strict=True):
        # Letters in front of the dots count from the left, those behind from the right.
        left, _, right = term.partition("...")
        sizes.update(zip(left, shape, strict=False))
        sizes.update(zip(reversed(right), reversed(shape), strict=False))
    return math.prod(size for letter, size in sizes.items() if letter not in output)


def _attention(factors: Sequence[Shape], heads: int | None, shared: int | None) -> int:
    """Both products of ONNX's Attention: queries times keys, and probabilities times values."""
    query, key, value = factors
    if len(query) == 4:  # batch, heads, tokens, width
        return query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])
    assert heads, "ONNX wants it where there are three axes"
    assert shared, "ONNX wants it where there are three axes"
    return query[0] * query[1] * key[1] * (query[2] + heads * (value[2] // shared))
