"""A form that keeps OpenVINO from dropping the scales of an activation.

OpenVINO (seen with 2026.4.1, on a CPU) fuses the product with the scales into the quantization behind it, whose kernel
then takes the scale of the first channel for all, where the product reads what a linear gives and something else reads
that, too: in ELECTRA, whose embeddings are projected before the first layer. With a Clip that cuts nothing off in front
of the product, the three are one elementwise kernel, and right.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdq_surgery.export.passes.lower_qdq import DIVIDED

__all__ = ["keep_scales_apart"]


def keep_scales_apart(graph: ir.Graph) -> int:
    """Put a Clip in front of every such product, in place; returns how many."""
    done = 0
    for node in [each for each in graph if each.op_type == "Mul" and str(each.name).endswith(DIVIDED)]:
        value = node.inputs[0]
        assert value is not None
        source = value.producer()
        if source is None or source.op_type == "LayerNormalization" or len(tuple(value.uses())) < 2:
            continue
        clip = ir.node("Clip", [value, _lowest(graph)], name=f"{node.name}/Clip")
        clip.outputs[0].shape, clip.outputs[0].type = value.shape, value.type
        graph.insert_before(node, clip)
        node.replace_input_with(0, clip.outputs[0])
        done += 1
    return done


def _lowest(graph: ir.Graph) -> ir.Value:
    """The lowest number of float32, one constant for all."""
    name = "lowest"
    if name not in graph.initializers:
        tensor = ir.tensor(np.asarray(np.finfo(np.float32).min, np.float32), name=name)
        graph.register_initializer(ir.val(name, const_value=tensor))
    return graph.initializers[name]
