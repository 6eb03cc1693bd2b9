"""What divides an activation channel by channel moves into the LayerNorm, or the linear, that it comes from.

    LayerNormalization(x, gamma, beta) / m -> Q/DQ    becomes    LayerNormalization(x, gamma / m, beta / m) -> Q/DQ
    (matmul(x, DQ(W, s)) + b) / m -> Q/DQ             becomes    matmul(x, DQ(W, s / m)) + b / m -> Q/DQ

Only where nothing else reads what they give: a residual add in float wants it as it is. Quantizers that read it with
the same scales read one quotient, so with the full recipe, whose residual is quantized too, this holds for all
LayerNorms inside an encoder, and for the linears in front of its adds. The values are equal but for the rounding of the
factors; a weight's integers stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdq_surgery.export.passes.lower_qdq import DIVIDED
from qdq_surgery.export.passes.scale_linear import scale_linear
from qdq_surgery.onnx_graph.qdq_pairs import Pair

__all__ = ["fold_channel_scales"]

_GAMMA, _BETA = 1, 2


def fold_channel_scales(graph: ir.Graph, pairs: Sequence[Pair]) -> int:
    """Fold every product that can be, in place; returns how many."""
    by_value = {pair.dequantize.outputs[0]: pair for pair in pairs}
    products = [node for node in graph if node.op_type == "Mul" and str(node.name).endswith(DIVIDED)]
    return sum(_fold(graph, product, by_value) for product in products)


def _fold(graph: ir.Graph, product: ir.Node, pairs: Mapping[ir.Value, Pair]) -> bool:
    value, factors = product.inputs
    assert value is not None
    assert factors is not None
    by = ir.convenience.get_const_tensor(factors)
    if by is None or product.outputs[0].is_graph_output() or value.is_graph_output():
        return False
    if not (_into_norm(graph, product, value, by.numpy()) or _into_linear(graph, product, value, by.numpy(), pairs)):
        return False
    ir.convenience.replace_all_uses_with(product.outputs[0], value)
    graph.remove(product, safe=True)
    return True


def _into_norm(graph: ir.Graph, product: ir.Node, value: ir.Value, by: NDArray[np.floating]) -> bool:
    norm = value.producer()
    if norm is None or norm.op_type != "LayerNormalization" or len(value.uses()) > 1:
        return False
    own = {at: value for at, value in enumerate(norm.inputs) if at in (_GAMMA, _BETA) and value is not None}
    constants = {at: ir.convenience.get_const_tensor(value) for at, value in own.items()}
    if any(each is None or tuple(each.shape) != by.shape for each in constants.values()):
        return False
    for at, constant in constants.items():
        assert constant is not None
        array = constant.numpy()
        made = (array.astype(np.float64) * by).astype(array.dtype)
        name = f"{product.name}/{'gamma' if at == _GAMMA else 'beta'}"
        folded = ir.val(name, const_value=ir.tensor(made, name=name))
        graph.register_initializer(folded)
        norm.replace_input_with(at, folded)
    return True


def _into_linear(
    graph: ir.Graph, product: ir.Node, value: ir.Value, by: NDArray[np.floating], pairs: Mapping[ir.Value, Pair]
) -> bool:
    weight = scale_linear(graph, value, product, by, pairs)
    if weight is not None:
        weight.site.divided = str(product.name).removesuffix(DIVIDED).partition("@")[0]
    return weight is not None
