"""The tagged nodes become Q/DQ pairs, and weights become integers.

    x -> FakeQuant           becomes   x -> QuantizeLinear -> DequantizeLinear     (one pair for all that read x alike)
    W -> FakeQuant -> Transpose -> MatMul   becomes   int8 W^T -> DequantizeLinear(axis=1) -> MatMul
    T -> FakeQuant -> Gather   becomes   int8 T -> Gather -> DequantizeLinear(1) -> Mul(scales of the rows -> Gather)

A weight is stored the way round in which MatMul takes it, with nothing between DequantizeLinear and MatMul: a Transpose
there keeps ONNX Runtime, OpenVINO and others from an integer kernel (microsoft/onnxruntime#9869, quic/aimet#4105).

A table that rows are looked up in is dequantized behind the lookup. In front of it ONNX Runtime would dequantize the
whole table in every run (5 ms for 30522 rows of 768, and 0.04 ms for those of 128 tokens). A DequantizeLinear takes no
scale for each row of more than two axes (blocks of opset 21 would be a form, which OpenVINO refuses): it makes floats
of the integers, and the product behind it multiplies by the rows' scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdq_surgery.errors import ExportError
from qdq_surgery.export.qparams import QParams, integer_type
from qdq_surgery.numerics.grid import Grid
from qdq_surgery.onnx_file.metadata import Site
from qdq_surgery.onnx_graph.qdq_pairs import Pair
from qdq_surgery.quantize.export_node import FAKE_QUANT, FAKE_QUANT_DOMAIN

__all__ = ["DIVIDED", "ROWS", "lower", "typed_scale"]

#: How the name of a product ends that divides an activation channel by channel.
DIVIDED = "/divided"

#: How the name of a product ends that gives looked up integers the scales of their rows.
ROWS = "/rows"


def lower(
    graph: ir.Graph, qparams: Mapping[str, QParams], activations: str, weights: Mapping[str, NDArray[np.float32]]
) -> list[Pair]:
    """Replace every ``qdq_surgery::FakeQuant`` of ``graph``, in place.

    Args:
        qparams: By the quantizer's name.
        activations: ``"int8"``, or ``"uint8"`` with 128 as zero point, which is the same grid.
        weights: Values of parameters in float32 by name, where the graph holds them in less.

    Returns:
        The pairs, in the order of the graph.
    """
    made = _Lowering(graph, activations, weights)
    for node in [node for node in graph if (node.domain, node.op_type) == (FAKE_QUANT_DOMAIN, FAKE_QUANT)]:
        each = qparams[node.attributes["quantizer"].as_string()]
        (value,) = node.inputs
        assert value is not None
        if value.is_initializer() and each.table:
            made.table(node, value, each)
        elif value.is_initializer():
            made.weight(node, value, each)
        else:
            made.activation(node, value, each)
    graph.opset_imports.pop(FAKE_QUANT_DOMAIN, None)
    return made.pairs


class _Lowering:
    def __init__(self, graph: ir.Graph, activations: str, weights: Mapping[str, NDArray[np.float32]]) -> None:
        self.graph, self.unsigned, self.weights = graph, activations == "uint8", weights
        self.pairs: list[Pair] = []
        self._activations: dict[tuple[object, ...], Pair] = {}
        self._weights: dict[tuple[str, str], tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._names: dict[str, int] = {}
        self._multiplied: dict[Pair, ir.Value] = {}

    def activation(self, node: ir.Node, value: ir.Value, qparams: QParams) -> None:
        if qparams.amax is None:
            raise ExportError(
                f"{qparams.name} quantizes a weight that is computed in the graph, and has no range; give it one with "
                "qdq_surgery.recalibrate_weights"
            )
        stored, middle = self._stored_grid(qparams.grid)
        scale = qparams.scale(qparams.amax)
        channels = None if qparams.channels is None else qparams.channels.tobytes()
        key = (id(value), stored, middle, qparams.axis, scale.tobytes(), channels)
        known = self._activations.get(key)
        if known is not None:
            known.site.quantizers.append(qparams.name)
            self._replace(node, self._taken_back(known, node, qparams))
            return
        name = self._unique(qparams.name)
        if qparams.channels is not None:
            value = self._times(f"{name}{DIVIDED}", value, 1.0 / qparams.channels, node)
        parameters = [
            self._constant(f"{name}/scale", typed_scale(scale, _numpy_type(value))),
            self._zero_point(np.full(scale.shape, middle, integer_type(stored))),
        ]
        assert value.shape is not None
        attributes = {} if qparams.axis is None else {"axis": qparams.axis % len(value.shape)}
        quantize = ir.node("QuantizeLinear", [value, *parameters], attributes, name=f"{name}/QuantizeLinear")
        quantize.outputs[0].name, quantize.outputs[0].shape = f"{name}/integers", value.shape
        quantize.outputs[0].type = ir.TensorType(ir.DataType[str(stored.onnx_type)])
        dequantize = self._dequantize(name, [quantize.outputs[0], *parameters], attributes, node.outputs[0])
        self.graph.insert_before(node, [quantize, dequantize])
        site = Site(
            [qparams.name], qparams.role, quantize.name, *_named(dequantize), scaled=qparams.channels is not None
        )
        self.pairs.append(Pair(site, dequantize, quantize))
        self._activations[key] = self.pairs[-1]
        self._replace(node, self._taken_back(self.pairs[-1], node, qparams))

    def _taken_back(self, pair: Pair, node: ir.Node, qparams: QParams) -> ir.Value:
        """What the pair gives, times the scales that nothing behind it takes back."""
        if qparams.channels is None or qparams.taken_back:
            return pair.value
        if pair not in self._multiplied:
            name = f"{str(pair.dequantize.name).removesuffix('/DequantizeLinear')}/multiplied"
            self._multiplied[pair] = self._times(name, pair.value, qparams.channels, node)
        return self._multiplied[pair]

    def _times(self, name: str, value: ir.Value, channels: NDArray[np.float32], before: ir.Node) -> ir.Value:
        factors = self._constant(f"{name}/scale", channels.astype(_numpy_type(value)))
        product = ir.node("Mul", [value, factors], name=name)
        product.outputs[0].name, product.outputs[0].shape, product.outputs[0].type = (
            f"{name}/value",
            value.shape,
            value.type,
        )
        self.graph.insert_before(before, product)
        return product.outputs[0]

    def _stored_grid(self, grid: Grid) -> tuple[Grid, int]:
        """The integers of the file, and which of them is 0.

        A grid moved by half its width is the same grid: what runs on unsigned integers is quantized to the same values.
        """
        if self.unsigned and not grid.unsigned:
            return Grid(grid.bits, unsigned=True), -grid.full.qmin
        return grid, grid.zero_point

    def weight(self, node: ir.Node, value: ir.Value, qparams: QParams) -> None:
        """A constant: its integers are stored."""
        assert value.name is not None
        _as_matmul(self.graph, node)
        readers = [use.node for use in node.outputs[0].uses()]
        # Scales along the last axis, which nothing behind it takes back: a product stands there.
        multiplied = qparams.role != "weight" and qparams.channels is not None and not qparams.taken_back
        turned = bool(readers) and all(_is_transpose(reader) for reader in readers) and not multiplied
        name = self._unique(qparams.name)
        parameters = self._stored(value, qparams, turned)
        assert value.shape is not None
        axis = None if qparams.axis is None else qparams.axis % len(value.shape)
        axis = 1 - axis if turned and axis is not None else axis
        attributes = {} if axis is None else {"axis": axis}
        dequantize = self._dequantize(name, list(parameters), attributes, (readers[0] if turned else node).outputs[0])
        self.graph.insert_before(node, dequantize)
        for old in [reader for reader in readers if turned]:
            ir.convenience.replace_all_uses_with(old.outputs[0], dequantize.outputs[0])
            self.graph.remove(old, safe=True)
        if not turned:
            found = dequantize.outputs[0]
            if multiplied and qparams.channels is not None:
                found = self._times(f"{name}/multiplied", found, qparams.channels, node)
            ir.convenience.replace_all_uses_with(node.outputs[0], found)
        self.graph.remove(node, safe=True)
        if qparams.alone and qparams.channels is not None:
            self._divide_beside(dequantize.outputs[0], qparams.channels, name)
        scaled = qparams.role != "weight" and qparams.channels is not None
        site = Site([qparams.name], "weight", None, *_named(dequantize), transposed=turned, scaled=scaled)
        self.pairs.append(Pair(site, dequantize))

    def _divide_beside(self, weight: ir.Value, channels: NDArray[np.float32], name: str) -> None:
        """Divide what products multiply ``weight`` with by the scales that its columns were multiplied by.

        Not the weight itself: behind its pair it would be a float weight for a runtime, of four times the size.
        """
        for product, at in [(use.node, use.idx) for use in weight.uses()]:
            other = product.inputs[0]
            if product.op_type != "MatMul" or at != 1 or other is None:
                raise ExportError(
                    f"{name} has scales that its linear's input has no quantizer for, and a {product.op_type} reads "
                    "it; disable both quantizers, or neither"
                )
            product.replace_input_with(0, self._times(f"{name}/beside", other, 1.0 / channels, product))

    def table(self, node: ir.Node, value: ir.Value, qparams: QParams) -> None:
        """A table: its integers are stored, and every lookup in it becomes one of integers."""
        for lookup in [use.node for use in node.outputs[0].uses()]:
            if lookup.op_type != "Gather" or lookup.attributes.get_int("axis", 0) != 0:
                raise ExportError(
                    f"{qparams.name} is of a table that a {lookup.op_type} reads; disable it for the export"
                )
            self._lookup(lookup, self._stored_table(value, qparams), qparams)
        self.graph.remove(node, safe=True)

    def _stored_table(self, value: ir.Value, qparams: QParams) -> tuple[ir.Value, ir.Value]:
        """Integers, (rows, columns), and scales, (rows, 1)."""
        integers, scale, _ = self._stored(value, qparams, turned=False)
        assert scale.const_value is not None
        assert integers.const_value is not None
        # One scale for all rows is written as often: OpenVINO (2026.4.1) cannot compile a lookup times a number.
        rows = (int(integers.const_value.numpy().shape[0]), 1)
        scales = np.broadcast_to(scale.const_value.numpy().reshape(-1, 1), rows)
        return integers, self._shared(f"{qparams.name}/scales", np.ascontiguousarray(scales))

    def _lookup(self, lookup: ir.Node, table: tuple[ir.Value, ir.Value], qparams: QParams) -> None:
        given, name = lookup.outputs[0], self._unique(qparams.name)
        shapes = [given.shape, None if given.shape is None else ir.Shape([*given.shape[:-1], 1])]
        integers, scales = (self._gathered(part, lookup, shape) for part, shape in zip(table, shapes, strict=True))
        one = self._shared("one", np.ones((), np.float32)), self._zero_point(np.zeros((), integer_type(qparams.grid)))
        dequantize = self._dequantize(name, [integers.outputs[0], *one], {}, given)
        dequantize.outputs[0].name = f"{name}/dequantized"
        product = ir.node("Mul", [dequantize.outputs[0], scales.outputs[0]], name=f"{name}{ROWS}")
        value = product.outputs[0]
        value.name, value.shape, value.type = f"{name}/value", given.shape, given.type
        made = [integers, scales, dequantize, product]
        for each in made:
            each.metadata_props.update(lookup.metadata_props)
        self.graph.insert_before(lookup, made)
        site = Site([qparams.name], "weight", None, str(dequantize.name), str(value.name), rows=product.name)
        self.pairs.append(Pair(site, dequantize))
        self._replace(lookup, value)

    def _gathered(self, part: ir.Value, lookup: ir.Node, shape: ir.Shape | None) -> ir.Node:
        """The lookup in a part of a table."""
        node = ir.node("Gather", [part, lookup.inputs[1]], {"axis": 0})
        assert part.dtype is not None
        node.outputs[0].shape, node.outputs[0].type = shape, ir.TensorType(part.dtype)
        return node

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        """Everyone reads ``value`` instead of what ``node`` gives; an output of the graph keeps its name."""
        if node.outputs[0].is_graph_output():
            same = ir.node("Identity", [value])
            same.outputs[0].shape, same.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
            self.graph.insert_before(node, same)
            name, value = node.outputs[0].name, same.outputs[0]
            ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
            self.graph.remove(node, safe=True)
            value.name = name
            return
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        self.graph.remove(node, safe=True)

    def _stored(self, value: ir.Value, qparams: QParams, turned: bool) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Integers, scale and zero point; one copy of a weight that several layers share."""
        assert value.name is not None
        assert value.const_value is not None
        key = (value.name, qparams.name + ("/turned" if turned else ""))
        if key not in self._weights:
            values = self.weights.get(value.name)
            if values is None:
                values = value.const_value.numpy().astype(np.float32)
            if qparams.channels is not None:
                # A weight takes back what an activation is divided by, a table of positions that is read as one, too.
                values = values * qparams.channels if qparams.role == "weight" else values / qparams.channels
            # A constant where others have an activation: the kernels want it as they want those.
            stored, middle = (qparams.grid, 0) if qparams.role == "weight" else self._stored_grid(qparams.grid)
            integers = qparams.integers(values)
            if middle:
                integers = (integers.astype(np.int32) + middle).astype(integer_type(stored))
            scale = typed_scale(qparams.scale(qparams.amax_of(values)), _numpy_type(value))
            self._weights[key] = (
                self._constant(f"{key[1]}/weight", np.ascontiguousarray(integers.T if turned else integers)),
                self._constant(f"{key[1]}/scale", scale),
                self._zero_point(np.full(scale.shape, middle, integers.dtype)),
            )
        return self._weights[key]

    def _dequantize(self, name: str, inputs: list[ir.Value], attributes: dict[str, int], like: ir.Value) -> ir.Node:
        node = ir.node("DequantizeLinear", inputs, attributes, name=f"{name}/DequantizeLinear")
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = f"{name}/value", like.shape, like.type
        return node

    def _zero_point(self, array: NDArray[np.generic]) -> ir.Value:
        """Explicit, because ONNX Runtime rewrites no pair without one; all that are alike are one constant."""
        name = f"zero_point/{array.dtype}{''.join(f'/{size}' for size in array.shape)}"
        name += f"/{int(array.reshape(-1)[0])}" if array.any() else ""
        return self._shared(name, array)

    def _shared(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """The constant of that name; one for all who ask."""
        known = self.graph.initializers.get(name)
        return known if known is not None else self._constant(name, array)

    def _constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(value)
        return value

    def _unique(self, name: str) -> str:
        """A layer that runs several times (ALBERT's) leaves the same quantizer at several places."""
        count = self._names[name] = self._names.get(name, 0) + 1
        return name if count == 1 else f"{name}@{count}"


def _named(dequantize: ir.Node) -> tuple[str, str]:
    name, value = dequantize.name, dequantize.outputs[0].name
    assert name is not None
    assert value is not None
    return name, value


def _numpy_type(value: ir.Value) -> type[np.floating]:
    return np.float16 if value.dtype == ir.DataType.FLOAT16 else np.float32


def typed_scale(scale: NDArray[np.floating], kind: type[np.floating]) -> NDArray[np.floating]:
    """``scale`` as ``kind``, > 0 there too: what float32 can hold for a range of 0, half precision rounds to 0."""
    limits = np.finfo(kind)
    least = limits.smallest_subnormal if kind is np.float16 else limits.tiny
    typed: NDArray[np.floating] = np.maximum(scale.astype(kind), least)
    return typed


def _is_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [1, 0])) == [1, 0]


def _as_matmul(graph: ir.Graph, weight: ir.Node) -> None:
    """Gemm(x, W, b, transB=1), a linear on two axes, as MatMul and Add.

    A Gemm whose bias is float becomes no integer kernel in ONNX Runtime (QGemm wants every input dequantized).
    """
    for use in list(weight.outputs[0].uses()):
        node = use.node
        if node.op_type != "Gemm" or use.idx != 1 or node.attributes.get_int("transA", False):
            continue
        if node.attributes.get_float("alpha", 1.0) != 1.0 or node.attributes.get_float("beta", 1.0) != 1.0:
            continue
        made: list[ir.Node] = []
        factor = weight.outputs[0]
        if node.attributes.get_int("transB", False):
            made.append(ir.node("Transpose", [factor], {"perm": [1, 0]}))
            factor = made[-1].outputs[0]
        made.append(ir.node("MatMul", [node.inputs[0], factor], metadata_props=dict(node.metadata_props)))
        made[-1].outputs[0].type = node.outputs[0].type
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            made.append(ir.node("Add", [made[-1].outputs[0], node.inputs[2]], metadata_props=dict(node.metadata_props)))
        graph.insert_before(node, made)
        made[-1].outputs[0].shape, made[-1].outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        name = node.outputs[0].name
        ir.convenience.replace_all_uses_with(node.outputs[0], made[-1].outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        made[-1].outputs[0].name = name
