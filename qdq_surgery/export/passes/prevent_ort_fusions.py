"""Forms that keep ONNX Runtime from fusions that cost time.

Measured with ONNX Runtime 1.31.1 on a CPU with AVX512-VNNI, BERT-base, 8 x 128 tokens: the twelve BiasGelu nodes take
17 to 20 ms, twelve of Add and Gelu 13; the 24 SkipLayerNormalization nodes take 45 ms, 24 of Add and LayerNormalization
10, in a run of 170 to 220 ms in all (``scripts/benchmark_runtimes.py --profile`` lists the nodes).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["plain_bias", "plain_skip_norm"]


def plain_bias(graph: ir.Graph) -> int:
    """The bias behind a product gets the axes of what it is added to, so that it counts as no bias; returns how many.

    As a bias it is fused with a GELU behind it, and where all shapes are fixed with the product, to a Gemm in float.
    """
    done = 0
    for node in graph:
        if node.op_type != "Add":
            continue
        for at, value in enumerate(node.inputs):
            constant = None if value is None else value.const_value
            other = node.inputs[1 - at]
            if value is None or constant is None or len(constant.shape) != 1 or other is None or other.shape is None:
                continue
            product = other.producer()
            if product is None or product.op_type != "MatMul" or len(other.shape) < 2:
                continue
            array = constant.numpy().reshape([1] * (len(other.shape) - 1) + [-1])
            name = f"{value.name}/wide/{node.name}"
            wide = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
            graph.register_initializer(wide)
            node.replace_input_with(at, wide)
            done += 1
    return done


def plain_skip_norm(graph: ir.Graph) -> int:
    """The add of two tensors in front of a LayerNorm is written as Sum, which is the same; returns how many."""
    done = 0
    for node in list(graph):
        norms = any(use.node.op_type == "LayerNormalization" and use.idx == 0 for use in node.outputs[0].uses())
        if (
            node.op_type == "Add"
            and norms
            and all(each is not None and each.const_value is None for each in node.inputs)
        ):
            total = ir.node("Sum", node.inputs, name=node.name, metadata_props=dict(node.metadata_props))
            total.outputs[0].shape, total.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
            name = node.outputs[0].name
            graph.insert_before(node, total)
            ir.convenience.replace_all_uses_with(node.outputs[0], total.outputs[0], replace_graph_outputs=True)
            graph.remove(node, safe=True)
            total.outputs[0].name = name
            done += 1
    return done
