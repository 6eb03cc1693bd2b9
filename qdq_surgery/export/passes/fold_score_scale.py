"""The factor of the attention scores, 1 / sqrt(head size), moves into the queries.

    matmul(Q/DQ(q), Q/DQ(k)) * a      becomes      matmul(Q/DQ(q * a), Q/DQ(k)),      with a in q's weights and bias

The integers stay what they are, since the scale of q's pair is multiplied by ``a`` too. TensorRT's INT8 attention asks
for this form (its guide on fused attention: the scale stands before the first product), and everywhere a pass over the
largest tensor of the layer is saved. The values are equal but for the rounding of ``a`` times a float: exactly equal
where the head size is 16, 64 or 256.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdq_surgery.export.passes.lower_qdq import typed_scale
from qdq_surgery.onnx_graph.qdq_pairs import Pair

__all__ = ["fold_score_factors"]

#: What may stand between the query's linear and its quantizer: it moves values and changes none.
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")


def fold_score_factors(graph: ir.Graph, pairs: Sequence[Pair]) -> int:
    """Fold every factor that can be, in place; returns how many."""
    by_value = {pair.dequantize.outputs[0]: pair for pair in pairs}
    return sum(
        _fold(graph, node, by_value) for node in list(graph) if node.op_type == "MatMul" and len(node.outputs) == 1
    )


def _fold(graph: ir.Graph, product: ir.Node, pairs: dict[ir.Value, Pair]) -> bool:
    query, key = (pairs.get(value) if value is not None else None for value in product.inputs)
    if query is None or key is None or query.quantize is None or key.quantize is None:
        return False
    scaled = _only_reader(product.outputs[0])
    factor = None if scaled is None else _factor(scaled, product.outputs[0])
    if scaled is None or factor is None or _only_reader(query.dequantize.outputs[0]) is not product:
        return False
    if scaled.outputs[0].is_graph_output():
        return False
    if query.quantize.outputs[0].uses() and len(query.quantize.outputs[0].uses()) > 1:
        return False
    source = query.quantize.inputs[0]
    assert source is not None
    _scale_constant(graph, query.quantize, 1, factor)
    query.dequantize.replace_input_with(1, query.quantize.inputs[1])
    query.site.factor *= factor
    ir.convenience.replace_all_uses_with(scaled.outputs[0], product.outputs[0])
    graph.remove(scaled, safe=True)
    if not _into_linear(graph, source, query.quantize, factor, pairs):
        constant = _constant(graph, f"{query.site.name}/factor", np.asarray(factor), source)
        moved = ir.node("Mul", [source, constant], name=f"{query.site.name}/Mul")
        moved.outputs[0].shape, moved.outputs[0].type = source.shape, source.type
        graph.insert_before(query.quantize, moved)
        query.quantize.replace_input_with(0, moved.outputs[0])
    return True


def _into_linear(graph: ir.Graph, value: ir.Value, reader: ir.Node, factor: float, pairs: dict[ir.Value, Pair]) -> bool:
    """Scale weight and bias, if ``value`` is a linear's output, moved about, for ``reader`` alone; whether it was."""
    while True:
        node = value.producer()
        if node is None or _only_reader(value) is not reader:
            return False
        if node.op_type not in _MOVES:
            break
        value, reader = node.inputs[0], node  # type: ignore[assignment]
    bias = None
    if node.op_type == "Add":
        bias = next((at for at, each in enumerate(node.inputs) if each is not None and each.is_initializer()), None)
        inner = node.inputs[1 - bias] if bias is not None else None
        if bias is None or inner is None or _only_reader(inner) is not node:
            return False
        product = inner.producer()
    else:
        product = node
    if product is None or product.op_type != "MatMul" or product.inputs[1] is None:
        return False
    weight = pairs.get(product.inputs[1])
    if weight is None or weight.quantize is not None or _only_reader(weight.dequantize.outputs[0]) is not product:
        return False
    _scale_constant(graph, weight.dequantize, 1, factor)
    weight.site.factor *= factor
    if bias is not None:
        _scale_constant(graph, node, bias, factor)
    return True


def _factor(node: ir.Node, product: ir.Value) -> float | None:
    """What ``node`` multiplies ``product`` by, if that is one number."""
    if node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    others = [value for value in node.inputs if value is not None and value is not product]
    if len(others) != 1 or (node.op_type == "Div" and node.inputs[0] is not product):
        return None
    number = ir.convenience.get_const_tensor(others[0])
    if number is None or number.size != 1:
        return None
    found = float(number.numpy().reshape(()))
    if not np.isfinite(found) or found <= 0:
        return None
    return found if node.op_type == "Mul" else 1.0 / found


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _scale_constant(graph: ir.Graph, node: ir.Node, at: int, factor: float) -> None:
    """Give ``node`` a constant of its own: the one it reads, times ``factor``."""
    value = node.inputs[at]
    assert value is not None
    assert value.const_value is not None
    array = value.const_value.numpy()
    scaled: NDArray[np.floating] = array.astype(np.float64) * factor
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        scaled = typed_scale(scaled, array.dtype.type)
    node.replace_input_with(at, _constant(graph, f"{value.name}/scaled", scaled, value))


def _constant(graph: ir.Graph, name: str, array: NDArray[np.floating], like: ir.Value) -> ir.Value:
    kind = np.float16 if like.dtype == ir.DataType.FLOAT16 else np.float32
    count = 1
    while name in graph.initializers:  # a constant that several nodes read is scaled for each of them
        count += 1
        name = f"{name.partition('@')[0]}@{count}"
    value = ir.val(name, const_value=ir.tensor(array.astype(kind), name=name))
    graph.register_initializer(value)
    return value
