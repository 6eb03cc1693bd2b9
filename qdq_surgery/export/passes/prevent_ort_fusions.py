"""Forms that keep ONNX Runtime from fusions that cost time.

Measured with ONNX Runtime 1.31.1 on a CPU with AVX512-VNNI, BERT-base, 8 x 128 tokens: the twelve BiasGelu nodes take
17 to 20 ms, twelve of Add and Gelu 13; the 24 SkipLayerNormalization nodes take 45 ms, 24 of Add and LayerNormalization
10, in a run of 170 to 220 ms in all (``scripts/benchmark_runtimes.py --profile`` lists the nodes).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["plain_bias", "plain_relu", "plain_skip_norm"]


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


def plain_relu(graph: ir.Graph) -> int:
    """A ReLU right behind a product (T5 has no bias) is written as the larger of it and 0; returns how many.

    ONNX Runtime hopes to drop a ReLU in front of a quantization, leaves the product before it in float for that, and
    then drops nothing: a symmetric grid does not begin at 0.
    """
    done = 0
    for node in [each for each in graph if each.op_type == "Relu"]:
        value = node.inputs[0]
        product = None if value is None else value.producer()
        if value is None or product is None or product.op_type != "MatMul":
            continue
        larger = ir.node("Max", [value, _zero(graph)], name=node.name, metadata_props=dict(node.metadata_props))
        _put_in_place(graph, node, larger)
        done += 1
    return done


def _zero(graph: ir.Graph) -> ir.Value:
    name = "zero/float32"
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(np.zeros((), np.float32), name=name)))
    return graph.initializers[name]


def _put_in_place(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """``new`` computes what ``old`` did, under its name."""
    new.outputs[0].shape, new.outputs[0].type = old.outputs[0].shape, old.outputs[0].type
    name = old.outputs[0].name
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(old.outputs[0], new.outputs[0], replace_graph_outputs=True)
    graph.remove(old, safe=True)
    new.outputs[0].name = name


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
            _put_in_place(graph, node, total)
            done += 1
    return done
