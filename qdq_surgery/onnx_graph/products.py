"""The matrix products of a graph: which they are, what feeds them, what for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdq_surgery.onnx_file.metadata import Site
from qdq_surgery.onnx_graph.qdq_pairs import PAIR, Operand, Pair
from qdq_surgery.text.layer_names import star_numbers

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FACTORS", "KINDS", "Product", "kind_of", "layers_of", "module_of"]

#: What a product is for. ``linear``: of the encoder, or with a quantized weight. ``attention``: of two activations.
#: ``head``: behind the encoder. ``other``: the rest, such as the projection of embeddings.
KINDS = ("linear", "attention", "head", "other")

#: How many of a node's inputs, from the first on, are its factors; ``None`` for all.
FACTORS: Mapping[str, int | None] = {"MatMul": 2, "Gemm": 2, "Conv": 2, "Einsum": None, "Attention": 3}


@dataclass(frozen=True, eq=False)
class Product:
    """One product of the graph.

    Attributes:
        node: That computes it.
        operands: Its factors.
        kind: One of :data:`KINDS`.
        constant: No input of the graph changes it, so that a runtime may compute it once, when it opens the file.
    """

    node: ir.Node
    operands: tuple[Operand, ...]
    kind: str
    constant: bool

    @property
    def name(self) -> str:
        """Of the node."""
        return self.node.name or ""

    @property
    def module(self) -> str:
        """Path of the module in PyTorch that it belongs to; empty if it is not known."""
        return module_of(self.name)

    @property
    def factors(self) -> tuple[ir.Value, ...]:
        """The values that are multiplied."""
        return tuple(operand.value for operand in self.operands if operand.value is not None)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The Q/DQ pairs that its factors come from."""
        return tuple(operand.pair for operand in self.operands if operand.pair is not None)

    @property
    def sites(self) -> tuple[Site | None, ...]:
        """For each factor the record of its pair, or ``None``."""
        return tuple(None if operand.pair is None else operand.pair.site for operand in self.operands)

    @property
    def weighted(self) -> bool:
        """Whether a factor is stored in the file."""
        return self.kind != "attention"

    @property
    def aliases(self) -> frozenset[str]:
        """Names under which a runtime may know it if it merged it with what follows.

        They are those of the nodes that read its result one after another, and of what they return.
        """
        return frozenset(self._aliases())

    def _aliases(self) -> Iterator[str]:
        node = self.node
        for _ in range(4):  # a bias, a residual, an activation, a move: nothing merges more
            yield node.name or ""
            yield from (str(value.name) for value in node.outputs)
            readers = list({use.node for use in node.outputs[0].uses()})
            if len(readers) != 1 or node.outputs[0].is_graph_output() or readers[0].op_type in (*FACTORS, *PAIR):
                return
            node = readers[0]


def kind_of(name: str, operands: Sequence[Operand], layers: set[str], reached: bool) -> str:
    """One of :data:`KINDS`.

    Args:
        name: Of the product's node.
        layers: Of :func:`layers_of`, for all quantizers of the file.
        reached: Whether something of the encoder leads to it.
    """
    weights = [operand for operand in operands if operand.constant]
    if not weights:
        return "attention"
    inside = layers_of(module_of(name))
    # Without a quantizer in the file, any module with a number in its path counts as a layer.
    if any(weight.pair for weight in weights) or (inside is not None and (inside in layers or not layers)):
        return "linear"
    return "head" if reached else "other"


def module_of(name: str) -> str:
    """Path of the module that a node is named after."""
    return name.rpartition("/")[0]


def layers_of(path: str) -> str | None:
    """``encoder.layer`` for ``encoder.layer.0.output.dense``; ``None`` for what is in no numbered module."""
    before, star, _ = star_numbers(path).partition(".*")
    return before if star else None
