"""A form that keeps OpenVINO from failing at an embedding that is multiplied by a number.

OpenVINO (2026.4.1) takes the number behind a lookup in a table for the scale of a dequantization, moves it, and then
cannot compile the file ("Check 'convert->constant_fold(...)' failed"): seen with every model whose config has
``scale_embedding``, such as Pegasus, Marian or M2M100. A vector of the table's width that holds the number as often is
taken for what it is, and the product is the same to the bit.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdq_surgery.export.passes.lower_qdq import ROWS

__all__ = ["widen_embedding_factors"]


def widen_embedding_factors(graph: ir.Graph) -> int:
    """Write each such number as a vector, in place; returns how many."""
    done = 0
    for node in [each for each in graph if each.op_type == "Mul"]:
        for index, value in enumerate(node.inputs):
            width = _width(node.inputs[1 - index])
            if value is not None and width is not None and _is_number(value):
                node.replace_input_with(index, _vector(graph, value, width))
                done += 1
    return done


def _width(value: ir.Value | None) -> int | None:
    """The width of the table that a value was looked up in, whether rows or integers."""
    source = None if value is None else value.producer()
    if source is not None and str(source.name).endswith(ROWS):
        integers = source.inputs[0].producer() if source.inputs[0] is not None else None
        looked_up = None if integers is None else integers.inputs[0]
        source = None if looked_up is None else looked_up.producer()
    if source is None or source.op_type != "Gather" or source.inputs[0] is None:
        return None
    table = source.inputs[0].const_value
    return None if table is None or len(table.shape) != 2 else int(table.numpy().shape[1])


def _is_number(value: ir.Value) -> bool:
    return value.const_value is not None and len(value.const_value.shape) == 0


def _vector(graph: ir.Graph, number: ir.Value, width: int) -> ir.Value:
    name = f"{number.name}/{width}"
    if name not in graph.initializers:
        assert number.const_value is not None
        values = np.full((width,), number.const_value.numpy())
        graph.register_initializer(ir.val(name, const_value=ir.tensor(values, name=name)))
    return graph.initializers[name]
