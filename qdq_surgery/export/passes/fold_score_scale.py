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

from qdq_surgery.export.passes.scale_linear import constant, only_reader, scale_constant, scale_linear
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
    scaled = only_reader(product.outputs[0])
    factor = None if scaled is None else _factor(scaled, product.outputs[0])
    if scaled is None or factor is None or only_reader(query.dequantize.outputs[0]) is not product:
        return False
    if scaled.outputs[0].is_graph_output():
        return False
    if query.quantize.outputs[0].uses() and len(query.quantize.outputs[0].uses()) > 1:
        return False
    source = query.quantize.inputs[0]
    assert source is not None
    scale_constant(graph, query.quantize, 1, factor)
    query.dequantize.replace_input_with(1, query.quantize.inputs[1])
    query.site.factor *= factor
    ir.convenience.replace_all_uses_with(scaled.outputs[0], product.outputs[0])
    graph.remove(scaled, safe=True)
    if not _moved_into_linear(graph, source, query.quantize, factor, pairs):
        moved_by = constant(graph, f"{query.site.name}/factor", np.asarray(factor), source)
        moved = ir.node("Mul", [source, moved_by], name=f"{query.site.name}/Mul")
        moved.outputs[0].shape, moved.outputs[0].type = source.shape, source.type
        graph.insert_before(query.quantize, moved)
        query.quantize.replace_input_with(0, moved.outputs[0])
    return True


def _moved_into_linear(
    graph: ir.Graph, value: ir.Value, reader: ir.Node, factor: float, pairs: dict[ir.Value, Pair]
) -> bool:
    """Scale the linear in front of what only moves values about; whether there was one."""
    while (node := value.producer()) is not None and node.op_type in _MOVES and only_reader(value) is reader:
        assert node.inputs[0] is not None
        value, reader = node.inputs[0], node
    weight = scale_linear(graph, value, reader, np.asarray(factor), pairs)
    if weight is not None:
        weight.site.factor *= factor
    return weight is not None


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
