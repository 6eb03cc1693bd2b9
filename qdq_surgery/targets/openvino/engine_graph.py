"""The graph that OpenVINO runs on a CPU: its runtime model.

What its entries mean, as of 2026.4:

* ``runtimePrecision`` is the *narrowest* type among a node's inputs: a FullyConnected that multiplies floats by an int8
  weight says ``i8``, and a fused attention whose mask is u8 says ``u8``. What a node multiplies is told by the types of
  the two factors alone, which are those that the nodes in front of it give.
* ``originalLayersNames`` lists what was merged into a node. The name of a product can be missing (``Multiply_7226``)
  where its scale was merged with a bias; the node's weight still has it, ``x/MatMul/transpose_b``.
* A ``Subgraph`` holds the attention: two products, the mask, the softmax and its quantizer. It is compiled for the
  types of its inputs, and a quantizer inside gives integers if the other factor, from outside, is in integers: sums
  above 2**24, where float32 would round, were found exact to the last digit. If only one factor of a product has a
  quantizer, both come in as floats.
* A quantizer that was moved up over a transpose is renamed (``FakeQuantize_7559``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qdq_surgery.onnx_file.metadata import Site
from qdq_surgery.onnx_graph.claim import claim
from qdq_surgery.onnx_graph.executed import Executed, Kernel, Leftover, named
from qdq_surgery.onnx_graph.graph import OnnxGraph
from qdq_surgery.onnx_graph.products import Product
from qdq_surgery.targets.openvino.session import OpenVinoSession

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["run_by_openvino"]

_INTEGERS = ("i8", "u8")
_NARROW = (*_INTEGERS, "i4", "u4", "nf4")
_PLAIN = ("FullyConnected", "MatMul", "Convolution")
_GEMMS = (*_PLAIN, "Subgraph", "ScaledDotProductAttention")
_MOVES = (
    "Reshape",
    "Transpose",
    "Reorder",
    "Split",
    "VariadicSplit",
    "StridedSlice",
    "Concatenation",
    "Gather",
    "Tile",
)
_MOVED = re.compile(r"FakeQuantize_\d+")


@dataclass
class _Node:
    """A node of the runtime model.

    Attributes:
        kind: ``layerType``.
        names: Of the file's nodes that it does the work of.
        output: Type of its (first) result.
        inputs: The nodes in front of it.
        readers: The nodes behind it.
    """

    name: str
    kind: str
    names: tuple[str, ...]
    output: str
    inputs: list[_Node] = field(default_factory=list)
    readers: list[_Node] = field(default_factory=list)


def run_by_openvino(graph: OnnxGraph, precision: str | None = None, *_: object) -> Executed:
    """What OpenVINO made of the file, on the CPU, set for latency.

    Args:
        precision: For what is not INT8, as in :class:`OpenVinoSession`.

    Raises:
        ModelError: It cannot open the file.
    """
    session = OpenVinoSession(graph.path, precision=precision)
    model = _Runtime(graph, _read(session.compiled.get_runtime_model()))
    return Executed(
        session.version,
        model.kernels(),
        tuple(model.leftover()),
        tuple(model.steps()),
        tuple(model.unclaimed()),
    )


def _read(model: Any) -> list[_Node]:
    """In the order in which they run."""
    made: dict[str, _Node] = {}
    for op in model.get_ordered_ops():
        told = {key: op.rt_info[key].astype(str) for key in ("layerType", "originalLayersNames", "outputPrecisions")}
        names = tuple(name for name in told["originalLayersNames"].split(",") if name)
        output = told["outputPrecisions"].split(",")[0]
        node = made[op.get_name()] = _Node(op.get_friendly_name(), told["layerType"], names, output)
        for value in op.inputs():
            source = made[value.get_source_output().get_node().get_name()]
            node.inputs.append(source)
            source.readers.append(node)
    return list(made.values())


class _Runtime:
    def __init__(self, graph: OnnxGraph, nodes: list[_Node]) -> None:
        self.graph, self.nodes = graph, nodes
        self._quantizers = {site.quantize: site for site in graph.sites if site.quantize}
        self._inside = {name: node for node in nodes for name in node.names}
        ranks = (_by_name, _by_longer_name, self._by_weight, _by_alias, self._by_factors)
        self._claimed = claim(graph.products, nodes, ranks, shared=lambda node: node.kind == "Subgraph")

    def kernels(self) -> dict[str, Kernel]:
        return {gemm.name: self._kernel(gemm) for gemm in self.graph.products}

    def unclaimed(self) -> Iterator[str]:
        """Products that the file does not have."""
        taken = {id(node) for node in self._claimed.values()}
        for node in self.nodes:
            if node.kind in _PLAIN and id(node) not in taken:
                yield f"{node.kind} {node.name}"

    def steps(self) -> Iterator[str]:
        """Quantizers that are a pass of their own in front of an integer kernel."""
        for node in self.nodes:
            if node.kind == "FakeQuantize" and _gives_integers(node):
                yield from self._names(node)[:1] or (node.name,)

    def leftover(self) -> Iterator[Leftover]:
        """Rounding whose result stays in floats."""
        for node in self.nodes:
            if node.kind == "Subgraph":
                yield from self._left_inside(node)
            elif self._rounds(node) and not _gives_integers(node):
                where = "" if node.kind == "FakeQuantize" else f"at the end of {node.kind} {node.name}, "
                why = f"rounds {where}and gives {node.output}, which no integer kernel reads"
                yield Leftover(self._names(node), node.name, why)
            elif node.kind == "Convert" and self._rounds(node.inputs[0]) and node.output not in _INTEGERS:
                why = f"converts {node.inputs[0].output} back to {node.output}"
                yield Leftover(self._names(node.inputs[0]), node.name, why)

    # Which node runs which product.

    def _by_weight(self, node: _Node, gemm: Product) -> bool:
        if node.kind not in _PLAIN or len(node.inputs) < 2:
            return False
        weight = node.inputs[1]
        while True:
            if any(name.startswith(f"{gemm.name}/") for name in weight.names):
                return True
            if weight.kind not in (*_MOVES, "Convert") or not weight.inputs:
                break
            weight = weight.inputs[0]
        return weight.kind == "Const" and any(name in _own_constants(gemm) for name in weight.names)

    def _by_factors(self, node: _Node, gemm: Product) -> bool:
        """A fused attention that every factor goes into."""
        return node.kind == "Subgraph" and all(
            self._port(node, factor) is not None or self._computed_in(node, factor) for factor in gemm.factors
        )

    # What it multiplies.

    def _kernel(self, gemm: Product) -> Kernel:
        node = self._claimed.get(gemm.name)
        if node is None:
            if gemm.name in self._inside:
                other = self._inside[gemm.name]
                return Kernel("hidden", other.kind, f"inside {other.kind} {other.name}, which does not tell")
            if gemm.constant and not any(self.unclaimed()):
                return Kernel("constant", "computed when the file is opened")
            return Kernel("unknown", "not found", "no node of the runtime model can be told to be it")
        if node.kind == "Subgraph":
            return self._fused(node, gemm)
        types = [each.output for each in node.inputs[: len(gemm.factors)]]
        executed = f"{' x '.join(dict.fromkeys(types))} in {node.kind}"
        if all(each in _INTEGERS for each in types):
            if node.kind == "ScaledDotProductAttention":
                return Kernel("hidden", executed, f"inside {node.kind} {node.name}, which does not tell")
            return Kernel("int8", executed)
        if types[-1] in _NARROW and types[0] not in _NARROW and node.inputs[1].kind in ("Const", "Transpose"):
            return Kernel("weights", executed)
        return Kernel("float", executed)

    def _fused(self, node: _Node, gemm: Product) -> Kernel:
        types: list[str | None] = []
        for factor, site in zip(gemm.factors, gemm.sites, strict=True):
            if site is not None and site.quantize in node.names:
                types.append("quantized inside")
            elif self._computed_in(node, factor):
                types.append("float")
            else:
                port = self._port(node, factor)
                types.append(None if port is None else node.inputs[port].output)
        words = " x ".join(each or "?" for each in types)
        executed = f"{words} in {node.kind}"
        if any(each is not None and each not in (*_INTEGERS, "quantized inside") for each in types):
            return Kernel("float", executed)
        if None in types or not any(each in _INTEGERS for each in types):
            return Kernel("hidden", executed, f"inside {node.kind} {node.name}, which does not tell its types")
        return Kernel("int8", executed)

    def _port(self, node: _Node, factor: ir.Value) -> int | None:
        """Which input of a fused node a factor of the file comes in by."""
        known = {each.name or "" for each in self.graph.upstream(factor)}
        fits = [at for at, source in enumerate(node.inputs) if self._comes_from(source, known)]
        return fits[0] if len(fits) == 1 else None

    def _comes_from(self, source: _Node, known: set[str]) -> bool:
        """Whether the nearest node in front that the file knows is one of ``known``."""
        while True:
            names = [name for name in map(self._base, source.names) if name is not None]
            if names:
                return any(name in known for name in names)
            if not source.inputs:
                return False
            source = source.inputs[0]

    def _computed_in(self, node: _Node, factor: ir.Value) -> bool:
        """Whether what gives a factor is inside ``node``, with or without a quantizer."""
        return any(
            each.name in node.names and each.op_type not in ("Transpose", "Reshape")
            for each in self.graph.upstream(factor)
        )

    def _base(self, name: str) -> str | None:
        """The file's node that a name goes back to."""
        while name and name not in self.graph.nodes:
            name = name.rpartition("/")[0]
        return name or None

    # Quantizers.

    def _rounds(self, node: _Node) -> bool:
        return node.kind == "FakeQuantize" or any(
            name in self._quantizers or _MOVED.fullmatch(name) for name in node.names
        )

    def _left_inside(self, node: _Node) -> Iterator[Leftover]:
        for name in node.names:
            site = self._quantizers.get(name)
            if site is None:
                continue
            reads = [
                gemm for gemm in self.graph.products if site in gemm.sites and self._claimed.get(gemm.name) is node
            ]
            if reads and all(self._kernel(gemm).precision == "float" for gemm in reads):
                why = f"rounds inside {node.kind} {node.name} for {reads[0].name}, which multiplies floats"
                yield Leftover(named(site, reads[0].module), name, why)

    def _names(self, node: _Node) -> tuple[str, ...]:
        """The quantizers of a node that rounds."""
        sites: Sequence[Site] = [self._quantizers[name] for name in node.names if name in self._quantizers]
        if not sites:
            # Moved up over moves: the one that comes behind what is near.
            moves = [each for each in _behind(node) if each.kind in _MOVES]
            near = {self._base(name) for each in (node, *moves) for name in each.names} - {None}
            gone = [pair for pair in self.graph.pairs if pair.quantize and pair.site.quantize not in self._inside]
            sites = [pair.site for pair in gone if near & {each.name for each in self.graph.upstream(pair.source)}]
            if len(sites) != 1:
                return ()
        return tuple(name for site in sites for name in named(site))


def _by_name(node: _Node, gemm: Product) -> bool:
    return node.kind in _GEMMS and gemm.name in node.names


def _by_longer_name(node: _Node, gemm: Product) -> bool:
    return node.kind in _kinds(gemm) and any(name.startswith(f"{gemm.name}/") for name in node.names)


def _by_alias(node: _Node, gemm: Product) -> bool:
    return node.kind in _kinds(gemm) and any(name in gemm.aliases for name in node.names)


def _own_constants(gemm: Product) -> set[str]:
    """Stored values of the file that come to this product alone."""
    found: set[str] = set()
    for factor in gemm.factors:
        value: ir.Value | None = factor
        while value is not None and len({use.node for use in value.uses()}) == 1:
            if value.is_initializer():
                found.add(str(value.name))
            node = value.producer()
            value = node.inputs[0] if node is not None and node.inputs else None
    return found


def _kinds(gemm: Product) -> tuple[str, ...]:
    """What may run it: a linear's result is moved and scaled inside a fused attention, and not computed there."""
    return _GEMMS if gemm.kind == "attention" else _PLAIN


def _gives_integers(node: _Node) -> bool:
    return node.output in _INTEGERS or any(
        each.kind == "Reorder" and each.output in _INTEGERS for each in _behind(node)
    )


def _behind(node: _Node) -> Iterator[_Node]:
    """What reads the node's result, behind moves; the moves, too."""
    for reader in node.readers:
        yield reader
        if reader.kind in _MOVES:
            yield from _behind(reader)
