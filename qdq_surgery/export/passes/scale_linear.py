"""A factor moves into the linear in front of it: into the scales of its weight's integers, and into its bias.

    (matmul(x, DQ(W, s)) + b) * a      becomes      matmul(x, DQ(W, s * a)) + b * a

The integers stay what they are. The factor is one number, or one for each of the linear's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdq_surgery.export.passes.lower_qdq import typed_scale
from qdq_surgery.onnx_graph.qdq_pairs import Pair

__all__ = ["constant", "only_reader", "scale_constant", "scale_linear"]


def scale_linear(
    graph: ir.Graph, value: ir.Value, reader: ir.Node, factor: NDArray[np.floating], pairs: Mapping[ir.Value, Pair]
) -> Pair | None:
    """Scale weight and bias, if ``value`` is a linear's output that only ``reader`` reads.

    Args:
        factor: (), or (outputs,).
        pairs: By what they give.

    Returns:
        The weight's pair, whose steps are others now. ``None`` where nothing was changed: something else reads the
        linear, its weight is float, or with a factor for each output, has one step for all or steps too small for the
        file's precision.
    """
    node = value.producer()
    if node is None or only_reader(value) is not reader:
        return None
    product, bias = node, None
    if node.op_type == "Add":
        bias = next((at for at, each in enumerate(node.inputs) if each is not None and each.is_initializer()), None)
        inner = node.inputs[1 - bias] if bias is not None else None
        summed = None if inner is None or only_reader(inner) is not node else inner.producer()
        if summed is None:
            return None
        product = summed
    if product.op_type != "MatMul" or product.inputs[1] is None:
        return None
    weight = pairs.get(product.inputs[1])
    if weight is None or weight.quantize is not None or only_reader(weight.dequantize.outputs[0]) is not product:
        return None
    constants = [(weight.dequantize, 1), *([] if bias is None else [(node, bias)])]
    if factor.ndim and any(_shape(each.inputs[at]) != factor.shape for each, at in constants):
        return None
    if factor.ndim and not _holds(weight.dequantize.inputs[1], factor):
        return None
    for each, at in constants:
        scale_constant(graph, each, at, factor)
    return weight


def _holds(value: ir.Value | None, factor: NDArray[np.floating]) -> bool:
    """Whether each step divided by an outlier's scale keeps its digits: half precision has fewer of them below 6e-5."""
    assert value is not None
    assert value.const_value is not None
    steps = value.const_value.numpy()
    return bool((steps.astype(np.float64) * factor >= np.finfo(steps.dtype).tiny).all())


def _shape(value: ir.Value | None) -> tuple[int, ...] | None:
    return None if value is None or value.const_value is None else tuple(value.const_value.numpy().shape)


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node that reads ``value``, if it is one, and the graph does not give it."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def scale_constant(graph: ir.Graph, node: ir.Node, at: int, factor: NDArray[np.floating] | float) -> None:
    """Give ``node`` a constant of its own: the one it reads, times ``factor``."""
    value = node.inputs[at]
    assert value is not None
    assert value.const_value is not None
    array = value.const_value.numpy()
    scaled: NDArray[np.floating] = array.astype(np.float64) * factor
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        scaled = typed_scale(scaled, array.dtype.type)
    node.replace_input_with(at, constant(graph, f"{value.name}/scaled", scaled, value))


def constant(graph: ir.Graph, name: str, array: NDArray[np.floating], like: ir.Value) -> ir.Value:
    """A new constant of the precision of ``like``."""
    kind = np.float16 if like.dtype == ir.DataType.FLOAT16 else np.float32
    count = 1
    while name in graph.initializers:  # a constant that several nodes read is scaled for each of them
        count += 1
        name = f"{name.partition('@')[0]}@{count}"
    value = ir.val(name, const_value=ir.tensor(array.astype(kind), name=name))
    graph.register_initializer(value)
    return value
