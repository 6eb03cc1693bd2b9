"""The Q/DQ pairs of a graph, what reads them, and what comes from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdq_surgery.onnx_file.metadata import Site
from qdq_surgery.text.optional_imports import require

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["MOVES", "PAIR", "Operand", "Pair", "Reader", "rank_of", "stored"]

#: Operators that move values about and change none. A runtime moves a Q/DQ pair through some of them only.
MOVES = frozenset(
    "Reshape Transpose Squeeze Unsqueeze Flatten Slice Split Concat Gather Expand Tile Identity Cast".split()
)
#: Those that give something of each of their inputs; of others the first is moved, and the rest say how.
_JOINTS = ("Concat", "Gather")
PAIR = ("QuantizeLinear", "DequantizeLinear")


@dataclass(eq=False)
class Pair:
    """A QuantizeLinear and its DequantizeLinear, or stored integers and their DequantizeLinear.

    Attributes:
        site: The record of it; made of the nodes' names for a pair that the file does not list.
        dequantize: The DequantizeLinear.
        quantize: ``None`` where integers are stored.
    """

    site: Site
    dequantize: ir.Node
    quantize: ir.Node | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the PyTorch quantizers; that of the node in a file that does not tell."""
        return tuple(self.site.quantizers)

    @property
    def source(self) -> ir.Value | None:
        """What is quantized, or the integers that are stored."""
        return (self.dequantize if self.quantize is None else self.quantize).inputs[0]

    @property
    def constant(self) -> bool:
        """Whether that is stored."""
        return stored(self.source)

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
        rank = rank_of(self.dequantize.inputs[0])
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
        value: As it reads it.
        pair: That it comes from, if only nodes that move values are between.
        moves: Those nodes, the nearest to the pair first.
        source: The value that they start from.
    """

    value: ir.Value | None
    pair: Pair | None
    moves: tuple[ir.Node, ...]
    source: ir.Value | None

    @property
    def constant(self) -> bool:
        """Whether it is stored in the file."""
        return stored(self.value)

    @property
    def axis(self) -> int | None:
        """The pair's per-channel axis, as the node sees it; ``None`` for one scale."""
        axis = None if self.pair is None else self.pair.axis
        for move in self.moves:
            if axis is not None and move.op_type == "Transpose":
                perm = list(move.attributes.get_ints("perm", range(rank_of(move.inputs[0]))[::-1]))
                axis = perm.index(axis) if axis in perm else axis
        return axis


def stored(value: ir.Value | None) -> bool:
    """Whether a value is stored in the file: as it is, as integers, or moved about; not what is looked up in it."""
    seen: set[ir.Value | None] = set()
    queue = [value]
    while queue:
        value = queue.pop()
        if value is None:
            return False
        if value in seen or value.is_initializer() or value.const_value is not None:
            continue
        seen.add(value)
        node = value.producer()
        if node is None or node.op_type not in (*MOVES, *PAIR, "Constant"):
            return False
        queue.extend(node.inputs if node.op_type in _JOINTS else node.inputs[:1])
    return True


def rank_of(value: ir.Value | None) -> int:
    """How many axes it has; 0 if that is not known."""
    return 0 if value is None or value.shape is None else len(value.shape)


def _array(value: ir.Value | None) -> NDArray[Any] | None:
    if value is None:
        return None
    found = require("onnx_ir", "looking at an ONNX file").convenience.get_const_tensor(value)
    return None if found is None else found.numpy()
