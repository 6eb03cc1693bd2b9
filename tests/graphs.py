"""Small ONNX graphs with Q/DQ pairs, a line for each node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

U8, S8 = np.uint8(128), np.int8(0)


class Graph:
    """Builds one graph: each method adds nodes and gives the name of the value that they make."""

    def __init__(self, opset: int = 20, kind: type[np.floating[Any]] = np.float32) -> None:
        self.opset, self.kind = opset, kind
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str = "x", shape: tuple[int | str, ...] = ("b", 4, 8), integers: bool = False) -> str:
        kind = TensorProto.INT64 if integers else helper.np_dtype_to_tensor_dtype(np.dtype(self.kind))
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def const(self, array: Any) -> str:
        value = np.asarray(array)
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def ones(self, *shape: int) -> str:
        return self.const(np.ones(shape, self.kind))

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        made = name or f"{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [f"{made}/out"], name=made, **attributes))
        return f"{made}/out"

    def pair(
        self,
        value: str,
        name: str,
        scale: float | NDArray[Any] = 0.02,
        zero: Any = S8,
        axis: int | None = None,
    ) -> str:
        """QuantizeLinear and DequantizeLinear, called ``name/...``; ``zero=None`` leaves the zero point out."""
        parameters = [self.const(np.asarray(scale, self.kind))]
        if zero is not None:
            parameters.append(self.const(np.broadcast_to(zero, np.shape(scale)).copy()))
        attributes = {} if axis is None else {"axis": axis}
        made = self.op("QuantizeLinear", value, *parameters, name=f"{name}/QuantizeLinear", **attributes)
        return self.op("DequantizeLinear", made, *parameters, name=name, **attributes)

    def weight(self, name: str = "w", shape: tuple[int, ...] = (8, 8), axis: int = 1, turned: bool = False) -> str:
        """Stored integers; ``turned`` puts a Transpose between them and their DequantizeLinear."""
        integers = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
        stored = self.const(integers.T if turned else integers)
        value = self.op("Transpose", stored, perm=[1, 0]) if turned else stored
        scale = self.const(np.full(shape[axis], 0.01, self.kind))
        zero = self.const(np.zeros(shape[axis], np.int8))
        return self.op("DequantizeLinear", value, scale, zero, name=name, axis=axis)

    def end(self, value: str) -> None:
        """Something that no runtime fuses, then the output."""
        self.output(self.op("Erf", value))

    def output(self, value: str) -> None:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.kind))
        self.outputs.append(helper.make_tensor_value_info(value, kind, None))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "tiny", self.inputs, self.outputs, self.constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)
        return onnx.shape_inference.infer_shapes(made, data_prop=True)


def attention(
    g: Graph,
    zeros: tuple[Any, Any, Any, Any] = (S8, S8, S8, S8),
    *,
    head: int = 16,
    tokens: int | str = "s",
    scaled: bool = False,
    between: str = "",
    output: bool = True,
) -> None:
    """Queries times keys, softmax, times values; ``zeros`` are zero points, ``...`` for no pair."""

    def maybe(value: str, name: str, zero: Any) -> str:
        return value if zero is ... else g.pair(value, name, 1 / 127 if name == "a" else 0.02, zero)

    q, k, v = (g.input(name, ("b", 2, tokens, head)) for name in "qkv")
    left = maybe(q, "q_pair", zeros[0])
    scores = g.op("MatMul", left, maybe(g.op("Transpose", k, perm=[0, 1, 3, 2]), "k_pair", zeros[1]), name="scores")
    if scaled:
        scores = g.op("Mul", scores, g.const(np.asarray(0.25, g.kind)))
    scores = g.op("Add", scores, g.input("mask", ("b", 1, tokens, tokens)))
    if between == "Where":
        keep = g.op("Greater", g.input("keep", ("b", 1, tokens, tokens)), g.const(np.asarray(0, g.kind)))
        scores = g.op("Where", keep, scores, g.const(np.asarray(-1e4, g.kind)))
    elif between == "Reshape":
        scores = g.op("Reshape", scores, g.const(np.array([0, 0, 0, -1])))
    probabilities = maybe(g.op("Softmax", scores, axis=-1), "a", zeros[2])
    context = g.op("MatMul", probabilities, maybe(v, "v_pair", zeros[3]), name="context")
    context = g.op("Reshape", g.op("Transpose", context, perm=[0, 2, 1, 3]), g.const(np.array([0, 0, 2 * head])))
    if output:
        g.end(g.op("MatMul", g.pair(context, "o"), g.weight("wo", (2 * head, 8)), name="projection"))
    else:
        g.end(g.op("MatMul", context, g.ones(2 * head, 8), name="projection"))
