"""What divides an activation channel by channel moves into the LayerNorm that it comes from.

    LayerNormalization(x, gamma, beta) / m -> Q/DQ    becomes    LayerNormalization(x, gamma / m, beta / m) -> Q/DQ

Only where nothing else reads what the LayerNorm gives: a residual add in float wants it as it is. Quantizers that read
it with the same scales read one quotient, so with the full recipe, whose residual is quantized too, this holds for all
LayerNorms inside an encoder. The values are equal but for the rounding of the factors.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdq_surgery.export.passes.lower_qdq import DIVIDED

__all__ = ["fold_channel_scales"]

_GAMMA, _BETA = 1, 2


def fold_channel_scales(graph: ir.Graph) -> int:
    """Fold every product that can be, in place; returns how many."""
    return sum(_fold(graph, node) for node in list(graph) if node.op_type == "Mul" and str(node.name).endswith(DIVIDED))


def _fold(graph: ir.Graph, product: ir.Node) -> bool:
    value, factors = product.inputs
    assert value is not None
    assert factors is not None
    norm = value.producer()
    if norm is None or norm.op_type != "LayerNormalization" or len(norm.outputs[0].uses()) > 1:
        return False
    if norm.outputs[0].is_graph_output() or product.outputs[0].is_graph_output():
        return False
    own = {at: value for at, value in enumerate(norm.inputs) if at in (_GAMMA, _BETA) and value is not None}
    constants = {at: ir.convenience.get_const_tensor(value) for at, value in own.items()}
    by = ir.convenience.get_const_tensor(factors)
    if by is None or any(each is None or each.shape != by.shape for each in constants.values()):
        return False
    for at, constant in constants.items():
        assert constant is not None
        array = constant.numpy()
        made = (array.astype(np.float64) * by.numpy()).astype(array.dtype)
        name = f"{product.name}/{'gamma' if at == _GAMMA else 'beta'}"
        folded = ir.val(name, const_value=ir.tensor(made, name=name))
        graph.register_initializer(folded)
        norm.replace_input_with(at, folded)
    ir.convenience.replace_all_uses_with(product.outputs[0], norm.outputs[0])
    graph.remove(product, safe=True)
    return True
