"""What the placement lint of all runtimes has in common: the walk over pairs and readers; a runtime gives verdicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from qdq_surgery.onnx_file.opened import OnnxFile
from qdq_surgery.onnx_graph.findings import Finding
from qdq_surgery.onnx_graph.graph import OnnxGraph
from qdq_surgery.onnx_graph.products import Product
from qdq_surgery.onnx_graph.qdq_pairs import Pair

__all__ = ["LintRules", "Verdict"]

#: Verdict, fusion, reason and remedy of a :class:`~qdq_surgery.onnx_graph.findings.Finding`.
Verdict = tuple[str, str, str, str]

#: What is said of a table, of any runtime that has such files.
_ROWS = "int8 rows", "a quarter of the table is stored, and only rows that are looked up are dequantized"


class LintRules(ABC):
    """The rules of one runtime, for one graph.

    Attributes:
        moves: Operators that the runtime moves a pair through.
        factors: And those that it moves a pair through with a constant.
        floats: Whether a pair that gives an output of the model is told, for it gives floats.
        placement: The graph.
        opset: Its version of ONNX's operators.
        products: Its matrix products, by node.
        residuals: Its residual adds, by node.
        attentions: Its attentions, by each of their two products' nodes.
    """

    moves: ClassVar[tuple[str, ...]]
    factors: ClassVar[tuple[str, ...]] = ()
    floats: ClassVar[bool] = True

    def __init__(self, placement: OnnxGraph, opset: int) -> None:
        self.placement, self.opset = placement, opset
        self.products = {product.node: product for product in placement.matmuls}
        self.residuals = {residual.node: residual for residual in placement.residuals}
        self.attentions = {
            product.node: each for each in placement.attentions for product in (each.scores, each.context)
        }

    @classmethod
    def check(cls, file: OnnxFile) -> Iterator[Finding]:
        """The findings, site by site, then those about the whole."""
        placement = OnnxGraph(file, cls.moves, cls.factors)
        rules = cls(placement, file.model.opset_imports.get("", 0))
        for pair in placement.pairs:
            yield from rules.site(pair)
        yield from rules.whole()

    def site(self, pair: Pair) -> Iterator[Finding]:
        """What is to be said of one pair."""
        if pair.site.rows is not None:
            yield Finding("enables", *_ROWS, sites=pair.names, nodes=(pair.site.rows,))
            return
        refusal = self.refusal(pair)
        if refusal is not None:
            yield Finding("blocks", *refusal, pair.names)
            return
        readers = self.placement.readers(pair)
        if not readers:
            yield Finding("idle", "nothing", "nothing reads it", sites=pair.names)
        for reader in readers:
            node = reader.node
            product = self.products.get(node)
            verdict = self.operator(pair, node) if product is None else self.product(pair, product)
            yield Finding(*verdict, pair.names, (node.name or node.op_type,))
        if self.floats and pair.value.is_graph_output():
            yield Finding("idle", "nothing", "it is an output of the model, in float", sites=pair.names)

    def refusal(self, _: Pair) -> tuple[str, str, str] | None:
        """The fusion that a pair stands in the way of whatever reads it, the reason and the remedy."""
        return None

    @abstractmethod
    def product(self, pair: Pair, product: Product) -> Verdict:
        """What the runtime makes of a pair in front of a matrix product."""

    @abstractmethod
    def operator(self, pair: Pair, node: ir.Node) -> Verdict:
        """What the runtime makes of a pair in front of anything else."""

    @abstractmethod
    def whole(self) -> Iterator[Finding]:
        """What is to be said of no single pair."""

    def requantized(self, verdict: str, fusion: str, clause: str, remedy: str) -> Iterator[Finding]:
        """Tensors that several pairs quantize with different scales."""
        for pairs in self.placement.requantized:
            names = tuple(name for pair in pairs for name in pair.names)
            reason = f"{len(pairs)} pairs quantize one tensor with different scales, {clause}"
            yield Finding(verdict, fusion, reason, remedy, names)

    def left_out(self, reason: str) -> Iterator[Finding]:
        """Products without a pair."""
        nodes = tuple(product.node.name or "" for product in self.placement.matmuls if not product.pairs)
        if nodes:
            yield Finding("note", "GEMMs without Q/DQ", reason, nodes=nodes)
