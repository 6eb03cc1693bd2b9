"""One opened graph: its Q/DQ pairs and products, the attentions and residual adds that they are part of.

Facts only. What a runtime makes of them is in its folder of :mod:`qdq_surgery.targets`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from qdq_surgery.onnx_file.metadata import Site
from qdq_surgery.onnx_file.opened import OnnxFile
from qdq_surgery.onnx_graph.products import FACTORS, Product, kind_of, layers_of
from qdq_surgery.onnx_graph.qdq_pairs import MOVES, PAIR, Operand, Pair, Reader, stored

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Attention", "OnnxGraph", "Residual"]

#: What may stand between the scores and the softmax: scaling, mask, relative positions, casts.
_ELEMENTWISE = ("Add", "Sum", "Sub", "Mul", "Div", "Where", "Cast", "Clip", "Max", "Min", "Identity", "Reshape")

#: Further than this from a softmax no product is its scores.
_DEPTH = 12


@dataclass(frozen=True)
class Attention:
    """softmax(scores) times values.

    Attributes:
        scores, context: The two products.
        softmax: The node.
        between: The nodes between the scores and the softmax.
        output: The pair that quantizes the context, moved about; ``None`` if none does.
    """

    scores: Product
    softmax: ir.Node
    context: Product
    between: tuple[ir.Node, ...]
    output: Pair | None


@dataclass(frozen=True)
class Residual:
    """An add that takes the output of a GEMM with Q/DQ back to the residual stream.

    Attributes:
        node: The add.
        gemm: The GEMM.
        local, identity: Pairs of the operand that comes from it, and of the other.
    """

    node: ir.Node
    gemm: ir.Node
    local: Pair | None
    identity: Pair | None


class OnnxGraph:
    """The nodes of one opened graph, with what they do for quantization. It is read only, and in ONNX's order.

    Args:
        file: The graph and its metadata.
        moves: Operators that count as moves of a Q/DQ pair: all that move values, or those that a runtime sees through.
        factors: Operators with a constant that count as such, too.

    Attributes:
        path, config: Of the file.
        sites: Records of the pairs that the file lists, whether they are there or not.
        nodes: By name.
        pairs: All that are there, in the order of the graph.
    """

    def __init__(self, file: OnnxFile, moves: Collection[str] = MOVES, factors: Collection[str] = ()) -> None:
        self.file, self.graph = file, file.model.graph
        self.path, self.sites, self.config = file.path, file.sites, file.config
        self.nodes = {node.name or "": node for node in self.graph}
        self._moves, self._factors = frozenset(moves), frozenset(factors)
        known = {site.dequantize: site for site in file.sites}
        self.pairs = tuple(_pair(node, known) for node in self.graph if node.op_type == "DequantizeLinear")
        self._by_value = {pair.value: pair for pair in self.pairs}
        # What gives each channel, or each row of a table, back its scale belongs to the pair.
        self._scales = {
            use.node
            for pair in self.pairs
            if pair.site.scaled
            for use in pair.value.uses()
            if use.node.op_type == "Mul" and use.idx == 0 and stored(use.node.inputs[1])
        }
        self._scales.update(self.nodes[site.rows] for site in self.sites if site.rows in self.nodes)

    def readers(self, pair: Pair) -> tuple[Reader, ...]:
        """What reads the pair in the end."""
        return tuple(self._read(pair.value, ()))

    def _read(self, value: ir.Value, moves: tuple[ir.Node, ...]) -> Iterator[Reader]:
        for use in value.uses():
            if use.idx == 0 and self._moved(use.node):
                for output in use.node.outputs:
                    yield from self._read(output, (*moves, use.node))
            else:
                yield Reader(use.node, use.idx, moves)

    def _moved(self, node: ir.Node) -> bool:
        factor = node.op_type in self._factors and len(node.inputs) == 2 and stored(node.inputs[1])
        return node.op_type in self._moves or factor or node in self._scales

    def operand(self, value: ir.Value | None) -> Operand:
        """Where a value comes from."""
        moves: list[ir.Node] = []
        source = value
        while source is not None and source not in self._by_value:
            node = source.producer()
            if node is None or not self._moved(node):
                break
            moves.append(node)
            source = node.inputs[0]
        pair = None if source is None else self._by_value.get(source)
        return Operand(value, pair, tuple(reversed(moves)), source)

    def upstream(self, value: ir.Value | None) -> Iterator[ir.Node]:
        """The nodes that ``value`` comes from: pairs, moves, a bias or a factor, and the first node that does more."""
        queue: list[ir.Value | None] = [value]
        seen: set[ir.Node] = set()
        while queue:
            value = queue.pop(0)
            node = None if value is None else value.producer()
            if node is None or node in seen:
                continue
            seen.add(node)
            yield node
            variable = [each for each in node.inputs if each is not None and not each.is_initializer()]
            if node.op_type in MOVES or node.op_type in PAIR:
                queue.append(node.inputs[0])
            elif node.op_type in ("Add", "Mul", "Div") and len(variable) < len(node.inputs):
                queue.extend(variable)

    def lost(self, module: str) -> list[str]:
        """Quantizers of a module that the file lists and whose pair is not in it."""
        return [
            name
            for site in self.sites
            if site.dequantize not in self.nodes
            for name in site.quantizers
            if name.rpartition(".")[0] == module
        ]

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """All products, in the order of the graph."""
        paths = (layers_of(name) for site in self.sites for name in site.quantizers)
        layers = {path for path in paths if path is not None}
        fixed: set[ir.Value] = set()  # what no input of the graph changes
        behind: set[ir.Value] = set()  # what a product of the encoder leads to
        found: list[Product] = []
        for node in self.graph:
            inputs = [value for value in node.inputs if value is not None]
            if all(value.is_initializer() or value in fixed for value in inputs):
                fixed.update(node.outputs)
            reached = not behind.isdisjoint(inputs)
            if node.op_type in FACTORS:
                operands = tuple(map(self.operand, node.inputs[: FACTORS[node.op_type]]))
                kind = kind_of(node.name or "", operands, layers, reached)
                reached = reached or kind in ("linear", "attention")
                found.append(Product(node, operands, kind, node.outputs[0] in fixed))
            if reached:
                behind.update(node.outputs)
        return tuple(found)

    @cached_property
    def matmuls(self) -> tuple[Product, ...]:
        """The products of two factors; an Attention has three."""
        return tuple(product for product in self.products if len(product.operands) == 2)

    @cached_property
    def _by_node(self) -> dict[ir.Node, Product]:
        return {product.node: product for product in self.matmuls}

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """In the order of the graph."""
        found = (self._attention(node) for node in self.graph if node.op_type == "Softmax")
        return tuple(attention for attention in found if attention is not None)

    def _attention(self, softmax: ir.Node) -> Attention | None:
        products = {node: product for node, product in self._by_node.items() if not product.weighted}
        above, below = _path_up(softmax, products), _path_down(softmax, products)
        if above is None or below is None:
            return None
        context = products[below]
        return Attention(products[above[-1]], softmax, context, above[:-1], self._quantized_as(context.node.outputs[0]))

    def _quantized_as(self, value: ir.Value) -> Pair | None:
        """The pair that quantizes a value, moved about."""
        quantized = {pair.quantize: pair for pair in self.pairs if pair.quantize is not None}
        return next((quantized[each.node] for each in self._read(value, ()) if each.node in quantized), None)

    @cached_property
    def residuals(self) -> tuple[Residual, ...]:
        """In the order of the graph."""
        found = (self._residual(node) for node in self.graph if node.op_type in ("Add", "Sum"))
        return tuple(residual for residual in found if residual is not None)

    def _residual(self, node: ir.Node) -> Residual | None:
        operands = [self.operand(value) for value in node.inputs]
        if len(operands) != 2 or any(operand.constant for operand in operands):
            return None
        # Read by nothing else: the sum of a GEMM's output and something made of it is part of an activation.
        gemms = [self.gemm_behind(each.source) if _read_once(each.source) else None for each in operands]
        # The identity may be the sum of a GEMM and something itself; the last GEMM in the graph is the local one.
        order = list(self._by_node)
        quantized = ((at, gemm) for at, gemm in enumerate(gemms) if gemm is not None and self._by_node[gemm].pairs)
        known = [(order.index(gemm), at) for at, gemm in quantized]
        if not known:
            return None
        local = max(known)[1]
        gemm = gemms[local]
        assert gemm is not None
        return Residual(node, gemm, operands[local].pair, operands[1 - local].pair)

    def gemm_behind(self, value: ir.Value | None) -> ir.Node | None:
        """The GEMM with weights whose output a value is, quantized or not, but for its bias."""
        pair = None if value is None else self._by_value.get(value)
        if pair is not None and pair.quantize is not None:
            value = _undivided(pair)
        node = None if value is None else value.producer()
        if node is not None and node.op_type == "Add" and sum(map(stored, node.inputs)) == 1:
            value = next(each for each in node.inputs if not stored(each))
            node = None if value is None else value.producer()
        product = None if node is None else self._by_node.get(node)
        return node if product is not None and product.weighted else None

    @cached_property
    def requantized(self) -> tuple[tuple[Pair, ...], ...]:
        """Pairs that read one value with different scales."""
        by_source: dict[ir.Value, list[Pair]] = {}
        for pair in self.pairs:
            if pair.quantize is not None and pair.source is not None:
                by_source.setdefault(pair.source, []).append(pair)
        return tuple(
            tuple(pairs)
            for pairs in by_source.values()
            if len({None if pair.scale is None else pair.scale.tobytes() for pair in pairs}) > 1
        )


def _pair(node: ir.Node, known: Mapping[str, Site]) -> Pair:
    integers = node.inputs[0]
    above = None if integers is None else integers.producer()
    quantize = above if above is not None and above.op_type == "QuantizeLinear" else None
    name, value = node.name or "", str(node.outputs[0].name)
    if quantize is None:
        return Pair(known.get(name) or Site([name or value], "weight", None, name, value), node)
    return Pair(known.get(name) or Site([name or value], "input", quantize.name, name, value), node, quantize)


def _undivided(pair: Pair) -> ir.Value | None:
    """What a pair quantizes, before each channel was divided by its scale."""
    node = None if pair.source is None else pair.source.producer()
    if pair.site.scaled and node is not None and node.op_type == "Mul" and stored(node.inputs[1]):
        return node.inputs[0]
    return pair.source


def _path_up(start: ir.Node, wanted: Collection[ir.Node]) -> tuple[ir.Node, ...] | None:
    """The nodes from ``start``, without it, up to the nearest that is wanted."""
    paths: list[tuple[ir.Node, ...]] = [()]
    for _ in range(_DEPTH):
        further = []
        for path in paths:
            for value in (path[-1] if path else start).inputs:
                node = None if value is None else value.producer()
                if node is not None and node in wanted:
                    return (*path, node)
                if node is not None and node.op_type in _ELEMENTWISE:
                    further.append((*path, node))
        paths = further
    return None


def _path_down(start: ir.Node, wanted: Collection[ir.Node]) -> ir.Node | None:
    """The nearest node below ``start`` that is wanted; Q/DQ pairs are between."""
    values = list(start.outputs)
    for _ in range(_DEPTH):
        nodes = [use.node for value in values for use in value.uses()]
        found = next((node for node in nodes if node in wanted), None)
        if found is not None:
            return found
        through = (*_ELEMENTWISE, "QuantizeLinear", "DequantizeLinear", "Dropout")
        values = [output for node in nodes if node.op_type in through for output in node.outputs]
    return None


def _read_once(value: ir.Value | None) -> bool:
    return value is not None and len(tuple(value.uses())) == 1
