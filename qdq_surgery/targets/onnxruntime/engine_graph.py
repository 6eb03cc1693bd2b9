"""The graph that ONNX Runtime runs: the one it writes when it has optimized a file.

As of 1.31.1: it keeps the name of a product when it makes an integer kernel of it, and adds to it when it merges it
with what is around: ``fused x``, ``x/MatMulAddFusion``, ``x/MatMulScaleFusion/``. QuantizeLinear nodes that it moves up
over transposes get names from values (``linear_1_q``), copies of DequantizeLinear a suffix (``/duplicated``), and
constants that are equal are merged, so that the name of a scale says nothing about the quantizer. A product whose
weight alone is quantized becomes MatMulNBits, which rounds the other factor by blocks of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qdq_surgery.onnx_file.metadata import Site
from qdq_surgery.onnx_graph.claim import claim
from qdq_surgery.onnx_graph.executed import Executed, Kernel, Leftover, named
from qdq_surgery.onnx_graph.graph import OnnxGraph
from qdq_surgery.onnx_graph.products import Product, module_of
from qdq_surgery.onnx_graph.qdq_pairs import MOVES
from qdq_surgery.targets.onnxruntime.session import OnnxRuntimeSession
from qdq_surgery.text.optional_imports import require

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["run_by_onnxruntime"]

#: Kernels that multiply integers by integers.
_INTEGER = frozenset(
    """MatMulIntegerToFloat QLinearMatMul QGemm MatMulInteger DynamicQuantizeMatMul QLinearConv ConvInteger
    ConvIntegerToFloat QAttention QOrderedMatMul QOrderedAttention""".split()
)
#: Kernels with a weight in integers, which round the other factor by themselves or not at all.
_WEIGHTS = frozenset(("MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "GatherMatMulNBits"))
_FLOAT = frozenset(
    """MatMul Gemm FusedMatMul FusedGemm FusedMatMulActivation GemmFloat8 TransposeMatMul Conv FusedConv NhwcFusedConv
    Einsum Attention MultiHeadAttention GroupQueryAttention PackedAttention""".split()
)
_GEMMS = _INTEGER | _WEIGHTS | _FLOAT
#: Which inputs of an integer kernel are the zero points of the two factors: they tell their types.
_ZERO_POINTS = {"MatMulIntegerToFloat": (4, 5), "QLinearMatMul": (2, 5), "QGemm": (2, 5), "MatMulInteger": (2, 3)}
_TYPES = {2: "u8", 3: "i8"}  # of onnx.TensorProto

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def run_by_onnxruntime(graph: OnnxGraph, *_: object) -> Executed:
    """What ONNX Runtime made of the file, on the CPU with all its optimizations.

    Raises:
        ModelError: It cannot open the file.
    """
    optimized = _Optimized(graph, _optimize(graph.path))
    return Executed(
        OnnxRuntimeSession.installed(),
        optimized.kernels(),
        tuple(optimized.leftover()),
        tuple(optimized.steps()),
        tuple(optimized.unclaimed()),
    )


def _optimize(path: Path) -> ir.Model:
    onnx_ir = require("onnx_ir", "a receipt")
    OnnxRuntimeSession.package("a receipt of ONNX Runtime")
    with tempfile.TemporaryDirectory(prefix="qdq-surgery-") as folder:
        file = Path(folder) / "optimized.onnx"
        try:
            OnnxRuntimeSession.open(path, written=file)
        except Exception as error:  # its exceptions share no base
            raise OnnxRuntimeSession.unopened(path, error) from error
        optimized: ir.Model = onnx_ir.load(file)  # the large constants are not read
        return optimized


class _Optimized:
    def __init__(self, graph: OnnxGraph, model: ir.Model) -> None:
        self.graph, self.nodes = graph, list(model.graph)
        self._claimed = claim(graph.products, self.nodes, (_same_name, _longer_name, _same_value))
        self._sites = {name: site for site in graph.sites for name in (site.quantize, site.dequantize) if name}
        # The integers of a pair keep their name wherever its QuantizeLinear goes.
        self._integers = {
            str(value.name): site
            for site in graph.sites
            if site.quantize in graph.nodes
            for value in graph.nodes[site.quantize].outputs
        }

    def kernels(self) -> dict[str, Kernel]:
        return {gemm.name: self._kernel(gemm) for gemm in self.graph.products}

    def unclaimed(self) -> Iterator[str]:
        """Products that the file does not have."""
        taken = {id(node) for node in self._claimed.values()}
        for node in self.nodes:
            if node.op_type in _GEMMS and id(node) not in taken:
                yield f"{node.op_type} {node.name}"

    def steps(self) -> Iterator[str]:
        """Quantizers that are a pass of their own in front of an integer kernel."""
        for node in self.nodes:
            if node.op_type == _QUANTIZE and self._feeds(node)[0]:
                yield self._name(node)

    def leftover(self) -> Iterator[Leftover]:
        """Q/DQ that no integer kernel needs."""
        for node in self.nodes:
            site = self._site(node) if node.op_type == _DEQUANTIZE else None
            if site is not None and site.rows is not None:
                continue  # the rows of a table: there is nothing else to do with them
            if node.op_type == _DEQUANTIZE:
                yield self._left(node)
            elif node.op_type == _QUANTIZE:
                integer, dequantized = self._feeds(node)
                if not integer and not dequantized:
                    yield Leftover(named(self._site(node)), node.name or "", "its integers reach no integer kernel")

    def _kernel(self, gemm: Product) -> Kernel:
        node = self._claimed.get(gemm.name)
        if node is None and gemm.constant and not any(self.unclaimed()):
            return Kernel("constant", "computed when the file is opened")
        if node is None:
            return Kernel("unknown", "not found", "no node of the optimized graph can be told to be it")
        if node.op_type in _INTEGER:
            return Kernel("int8", self._types(node) + node.op_type)
        if node.op_type in _WEIGHTS:
            return Kernel("weights", node.op_type)
        if node.op_type in _FLOAT:
            return Kernel("float", node.op_type)
        return Kernel("hidden", node.op_type, f"inside {node.op_type}, which does not tell how it multiplies")

    def _types(self, node: ir.Node) -> str:
        """``u8 x i8 in``, as far as it is told."""
        told = [node.inputs[at] for at in _ZERO_POINTS.get(node.op_type, ()) if at < len(node.inputs)]
        types = [None if value is None or value.dtype is None else _TYPES.get(value.dtype) for value in told]
        return f"{types[0]} x {types[1]} in " if len(types) == 2 and all(types) else ""

    def _left(self, node: ir.Node) -> Leftover:
        readers = [each for each in self._behind(node) if each.op_type not in MOVES]
        what = ", ".join(f"{each.op_type} {each.name}" for each in readers) or "an output of the file"
        module = module_of(readers[0].name or "") if readers else ""
        source = node.inputs[0]
        if source is not None and source.is_initializer():
            why = f"a constant, dequantized in every run for {what}"
        else:
            *_, first = self._back(source)
            quantize = None if first is None else first.producer()
            shared = quantize is not None and quantize.op_type == _QUANTIZE and self._feeds(quantize)[0]
            why = f"dequantized for {what}, which takes floats"
            why += "; integer kernels read the same integers" if shared else "; quantized for nothing else"
        return Leftover(named(self._site(node), module), node.name or "", why)

    def _back(self, value: ir.Value | None) -> Iterator[ir.Value | None]:
        """``value``, and what it was before the moves that it went through."""
        yield value
        node = None if value is None else value.producer()
        if node is not None and node.op_type in MOVES:
            yield from self._back(node.inputs[0])

    def _feeds(self, quantize: ir.Node) -> tuple[bool, bool]:
        """Whether its integers reach an integer kernel, and whether a DequantizeLinear."""
        readers = list(self._behind(quantize))
        integer = any(each.op_type in _INTEGER or each.op_type.startswith("QLinear") for each in readers)
        return integer, any(each.op_type == _DEQUANTIZE for each in readers)

    def _behind(self, node: ir.Node) -> Iterator[ir.Node]:
        """What reads the node's result, behind moves; the moves, too."""
        for value in node.outputs:
            for reader in dict.fromkeys(use.node for use in value.uses()):
                yield reader
                if reader.op_type in MOVES:
                    yield from self._behind(reader)

    def _site(self, node: ir.Node) -> Site | None:
        base = (node.name or "").partition("/duplicated")[0]
        if base in self._sites:
            return self._sites[base]
        # A DequantizeLinear reads them, a QuantizeLinear makes them, both perhaps with moves between.
        behind = (value for each in self._behind(node) for value in each.outputs)
        values = self._back(node.inputs[0]) if node.op_type == _DEQUANTIZE else (*node.outputs, *behind)
        names = (str(value.name) for value in values if value is not None)
        return next((self._integers[name] for name in names if name in self._integers), None)

    def _name(self, node: ir.Node) -> str:
        site = self._site(node)
        return node.name or "" if site is None else site.name


def _base(node: ir.Node) -> str:
    return (node.name or "").removeprefix("fused ")


def _same_name(node: ir.Node, gemm: Product) -> bool:
    return _base(node) == gemm.name


def _longer_name(node: ir.Node, gemm: Product) -> bool:
    return node.op_type in _GEMMS and _base(node).startswith(f"{gemm.name}/")


def _same_value(node: ir.Node, gemm: Product) -> bool:
    return node.op_type in _GEMMS and any(value.name in gemm.aliases for value in node.outputs)
