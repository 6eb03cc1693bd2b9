"""Where the Q/DQ pairs of a file stand: what they read, what reads them, and the GEMMs, attentions and residual adds.

Facts only. What a runtime makes of them is in ``lint_onnxruntime.py``, ``lint_openvino.py`` and ``lint_tensorrt.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdq_surgery.onnx_file.sites import Site

__all__ = ["GEMMS", "Attention", "Operand", "Pair", "Placement", "Product", "Reader", "Residual"]

#: Operators that multiply matrices.
GEMMS = ("MatMul", "Gemm", "Conv", "Einsum")

#: What may stand between the scores and the softmax: scaling, mask, relative positions, casts.
_ELEMENTWISE = ("Add", "Sum", "Sub", "Mul", "Div", "Where", "Cast", "Clip", "Max", "Min", "Identity", "Reshape")

#: Further than this from a softmax no product is its scores.
_DEPTH = 12


@dataclass(frozen=True, eq=False)
class Pair:
    """A QuantizeLinear and its DequantizeLinear, or stored integers and their DequantizeLinear.

    Attributes:
        names: Of the PyTorch quantizers; that of the node in a file that does not tell.
        quantize: ``None`` where integers are stored.
        constant: Whether what is quantized is a constant.
    """

    names: tuple[str, ...]
    dequantize: ir.Node
    quantize: ir.Node | None
    constant: bool

    @property
    def value(self) -> ir.Value:
        """What the DequantizeLinear gives."""
        return self.dequantize.outputs[0]

    @property
    def scale(self) -> NDArray[np.float64] | None:
        """``None`` if the graph computes it."""
        found = _array(self.dequantize.inputs[1])
        return None if found is None else found.astype(np.float64)

    @property
    def zero_point(self) -> NDArray[Any] | None:
        """``None`` if it is left out, or the graph computes it."""
        return _array(self.dequantize.inputs[2]) if self.explicit else None

    @property
    def explicit(self) -> bool:
        """Whether the DequantizeLinear has a zero point."""
        return len(self.dequantize.inputs) > 2 and self.dequantize.inputs[2] is not None

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is 0 or left out."""
        return not self.explicit or (self.zero_point is not None and not self.zero_point.any())

    @property
    def integers(self) -> str:
        """``"int8"``, ``"uint8"``, ...; ``"uint8"`` is ONNX's choice where nothing tells."""
        found = self.dequantize.inputs[2] if self.explicit else self.dequantize.inputs[0]
        kind = None if found is None else found.dtype
        return "uint8" if kind is None else kind.name.lower()

    @property
    def axis(self) -> int | None:
        """The per-channel axis of what is quantized; ``None`` for one scale."""
        scale = self.scale
        if scale is None or scale.size == 1:
            return None
        axis = self.dequantize.attributes.get_int("axis", 1)
        rank = _rank(self.dequantize.inputs[0])
        return axis % rank if rank else axis


@dataclass(frozen=True)
class Reader:
    """A node that reads a pair, through nodes that only move values."""

    node: ir.Node
    at: int
    moves: tuple[ir.Node, ...]


@dataclass(frozen=True)
class Operand:
    """What a node reads.

    Attributes:
        pair: That it comes from, if only nodes that move values are between.
        moves: Those nodes, the nearest to the pair first.
        source: The value that they start from.
        constant: Whether it is a constant.
    """

    pair: Pair | None
    moves: tuple[ir.Node, ...]
    source: ir.Value | None
    constant: bool

    @property
    def axis(self) -> int | None:
        """The pair's per-channel axis, as the node sees it; ``None`` for one scale."""
        axis = None if self.pair is None else self.pair.axis
        for move in self.moves:
            if axis is not None and move.op_type == "Transpose":
                perm = list(move.attributes.get_ints("perm", range(_rank(move.inputs[0]))[::-1]))
                axis = perm.index(axis) if axis in perm else axis
        return axis


@dataclass(frozen=True)
class Product:
    """A GEMM with its two operands."""

    node: ir.Node
    operands: tuple[Operand, Operand]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The Q/DQ pairs in front of its operands: none, one or two."""
        return tuple(operand.pair for operand in self.operands if operand.pair is not None)

    @property
    def weighted(self) -> bool:
        """Whether one operand is a constant."""
        return any(operand.constant for operand in self.operands)

    @property
    def constant(self) -> bool:
        """Whether both are."""
        return all(operand.constant for operand in self.operands)


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


class Placement:
    """The pairs of one graph.

    Args:
        graph: Is read only.
        sites: What the file says of its pairs; others are called after their nodes.
        config: Of the model; empty if the file does not tell.
        moves: Operators through which the runtime moves a Q/DQ pair.
        factors: Operators with a constant through which it does, too.
    """

    def __init__(
        self,
        graph: ir.Graph,
        sites: Sequence[Site],
        config: dict[str, Any],
        moves: Sequence[str],
        factors: Sequence[str] = (),
    ) -> None:
        self.graph, self.config = graph, config
        self._moves, self._factors = frozenset(moves), frozenset(factors)
        known = {site.dequantize: site for site in sites}
        self.pairs = tuple(_pair(node, known) for node in graph if node.op_type == "DequantizeLinear")
        self._by_value = {pair.value: pair for pair in self.pairs}

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
        factor = node.op_type in self._factors and len(node.inputs) == 2 and _constant(node.inputs[1])
        return node.op_type in self._moves or factor

    def operand(self, value: ir.Value | None) -> Operand:
        """Where a value comes from."""
        moves: list[ir.Node] = []
        while value is not None and value not in self._by_value:
            node = value.producer()
            if node is None or not self._moved(node):
                break
            moves.append(node)
            value = node.inputs[0]
        pair = None if value is None else self._by_value.get(value)
        return Operand(pair, tuple(reversed(moves)), value, _constant(value))

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """The GEMMs, in the order of the graph."""
        return tuple(
            Product(node, (self.operand(node.inputs[0]), self.operand(node.inputs[1])))
            for node in self.graph
            if node.op_type in GEMMS and len(node.inputs) > 1
        )

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """In the order of the graph."""
        products = {product.node: product for product in self.products}
        found = (self._attention(node, products) for node in self.graph if node.op_type == "Softmax")
        return tuple(attention for attention in found if attention is not None)

    def _attention(self, softmax: ir.Node, products: dict[ir.Node, Product]) -> Attention | None:
        above = _path_up(softmax, lambda node: node in products and not products[node].weighted)
        below = _path_down(softmax, lambda node: node in products and not products[node].weighted)
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
        order = {product.node: at for at, product in enumerate(self.products)}
        known = [(order[gemm], at) for at, gemm in enumerate(gemms) if gemm is not None and self._quantized(gemm)]
        if not known:
            return None
        local = max(known)[1]
        gemm = gemms[local]
        assert gemm is not None
        return Residual(node, gemm, operands[local].pair, operands[1 - local].pair)

    def _quantized(self, gemm: ir.Node) -> bool:
        return any(product.pairs for product in self.products if product.node is gemm)

    def gemm_behind(self, value: ir.Value | None) -> ir.Node | None:
        """The GEMM with weights whose output a value is, quantized or not, but for its bias."""
        pair = None if value is None else self._by_value.get(value)
        if pair is not None and pair.quantize is not None:
            value = pair.quantize.inputs[0]
        node = None if value is None else value.producer()
        if node is not None and node.op_type == "Add" and sum(map(_constant, node.inputs)) == 1:
            value = next(each for each in node.inputs if not _constant(each))
            node = None if value is None else value.producer()
        weighted = {product.node for product in self.products if product.weighted}
        return node if node in weighted else None

    @cached_property
    def requantized(self) -> tuple[tuple[Pair, ...], ...]:
        """Pairs that read one value with different scales."""
        by_source: dict[ir.Value, list[Pair]] = {}
        for pair in self.pairs:
            if pair.quantize is not None and pair.quantize.inputs[0] is not None:
                by_source.setdefault(pair.quantize.inputs[0], []).append(pair)
        return tuple(
            tuple(pairs)
            for pairs in by_source.values()
            if len({None if pair.scale is None else pair.scale.tobytes() for pair in pairs}) > 1
        )


def _pair(node: ir.Node, known: dict[str, Site]) -> Pair:
    integers = node.inputs[0]
    above = None if integers is None else integers.producer()
    quantize = above if above is not None and above.op_type == "QuantizeLinear" else None
    constant = _constant(integers if quantize is None else quantize.inputs[0])
    site = known.get(node.name or "")
    names = tuple(site.quantizers) if site is not None else (node.name or f"{node.outputs[0].name}",)
    return Pair(names, node, quantize, constant)


def _path_up(start: ir.Node, wanted: Any) -> tuple[ir.Node, ...] | None:
    """The nodes from ``start``, without it, up to the nearest that is wanted."""
    paths: list[tuple[ir.Node, ...]] = [()]
    for _ in range(_DEPTH):
        further = []
        for path in paths:
            for value in (path[-1] if path else start).inputs:
                node = None if value is None else value.producer()
                if node is not None and wanted(node):
                    return (*path, node)
                if node is not None and node.op_type in _ELEMENTWISE:
                    further.append((*path, node))
        paths = further
    return None


def _path_down(start: ir.Node, wanted: Any) -> ir.Node | None:
    """The nearest node below ``start`` that is wanted; Q/DQ pairs are between."""
    values = list(start.outputs)
    for _ in range(_DEPTH):
        nodes = [use.node for value in values for use in value.uses()]
        found = next((node for node in nodes if wanted(node)), None)
        if found is not None:
            return found
        through = (*_ELEMENTWISE, "QuantizeLinear", "DequantizeLinear", "Dropout")
        values = [output for node in nodes if node.op_type in through for output in node.outputs]
    return None


def _read_once(value: ir.Value | None) -> bool:
    return value is not None and len(tuple(value.uses())) == 1


def _constant(value: ir.Value | None) -> bool:
    """Whether a value is a constant, dequantized or moved about."""
    for _ in range(_DEPTH):
        if value is None:
            return False
        if value.const_value is not None or value.is_initializer():
            return True
        node = value.producer()
        if node is None:
            return False
        if node.op_type == "Constant":
            return True
        if node.op_type not in ("DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape", "Cast", "Identity"):
            return False
        value = node.inputs[0]
    return False


def _array(value: ir.Value | None) -> NDArray[Any] | None:
    found = None if value is None else ir.convenience.get_const_tensor(value)
    return None if found is None else found.numpy()


def _rank(value: ir.Value | None) -> int:
    return 0 if value is None or value.shape is None else len(value.shape)
