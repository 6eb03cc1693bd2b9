"""What got no quantizer, and why: every linear, matrix product and residual add of a model is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from torch import nn
from torch.fx import Node

from qdq_surgery.graph.block_graph import BlockGraph, join_path
from qdq_surgery.graph.operators import INSIDE, PRODUCTS
from qdq_surgery.match.decisions import Decisions, ModulePaths, UnitDecisions
from qdq_surgery.match.plan import COVERED, Coverage
from qdq_surgery.match.subgraph import place_of
from qdq_surgery.trace.units import RESIDUAL, Unit

__all__ = ["CoverageCount"]


class CoverageCount:
    """Counts the operators of a model, unit by unit, once all rules were tried on the unit.

    Args:
        decisions: Gets a refusal for each operator that has neither a quantizer nor a refusal yet.
        reached: Paths of the linears that the example came to.
    """

    def __init__(
        self, model: nn.Module, paths: ModulePaths, decisions: Decisions, reached: frozenset[str] = frozenset()
    ) -> None:
        self.model, self.paths, self.decisions = model, paths, decisions
        self.reached = {paths[path] for path in reached}
        self.counts: dict[str, Counter[str]] = {kind: Counter() for kind in COVERED}

    def result(self) -> dict[str, Coverage]:
        return {kind: Coverage(c["found"], c["quantized"], c["refused"]) for kind, c in self.counts.items()}

    def add(self, unit: Unit, tree: BlockGraph, decided: UnitDecisions) -> None:
        """Count the operators of a unit that was recorded."""
        nodes = [(graph, node) for graph in tree.walk() for node in graph.graph.nodes]
        called = {self.paths.of_node(unit, graph, node) for graph, node in nodes if node.op == "call_module"}
        self.add_uncalled(unit, called)
        counted: set[Hashable] = set()
        for graph, node in nodes:
            kind = self._kind(graph, node, decided)
            if kind is None:
                continue
            where = self.paths.of_node(unit, graph, node)
            place = where if node.op == "call_module" else place_of(graph, node)
            if place not in counted:
                counted.add(place)
                self._count(kind, unit, graph, node, where, decided)

    def _count(self, kind: str, unit: Unit, graph: BlockGraph, node: Node, where: str, decided: UnitDecisions) -> None:
        counts = self.counts[kind if kind in self.counts else "matmul"]
        if unit.layer is None:
            # Embeddings, pooler and heads: the table is about the encoder layers, but what stays in float is said.
            counts = Counter()
            if kind == "residual add":
                return
        counts["found"] += 1
        if any(s.origin == node.meta["origin"] and s.owner == where for s in self.decisions.sites.values()):
            counts["quantized"] += 1
            return
        counts["refused"] += 1
        if place_of(graph, node) in decided.quantized:
            return  # refused already, with its own reason
        where_rules = "outside the encoder layers" if unit.layer is None else "here"
        default = f"no rule is about a {kind} {where_rules}"
        if INSIDE in node.meta:
            default = f"its own backward goes with its forward, so the {node.meta[INSIDE]} inside takes no quantizers"
        _, reason = decided.near.get(place_of(graph, node), (0, default))
        self.decisions.refuse(where, kind, reason, unit.layer, None, str(node.meta["source"]))

    def _kind(self, graph: BlockGraph, node: Node, decided: UnitDecisions) -> str | None:
        op = str(node.meta.get("op"))
        if op in PRODUCTS or INSIDE in node.meta:
            return op
        if op == "add" and (place_of(graph, node) in decided.quantized or node.meta.get(RESIDUAL)):
            return "residual add"
        return None

    def add_uncalled(self, unit: Unit, called: set[str]) -> None:
        """Count the linears of a unit that the example never came to: cross-attention without encoder states, say."""
        graphs = [] if unit.tree is None else list(unit.tree.walk())
        used = {
            join_path(unit.path, graph.path, str(node.target)).rpartition(".")[0]
            for graph in graphs
            for node in graph.graph.nodes
            if node.op == "get_attr"
        }
        opaque = [join_path(unit.path, graph.path) for graph in graphs if graph.failure is not None]
        for name, module in self.model.get_submodule(unit.path).named_modules():
            path = self.paths[join_path(unit.path, name)]
            # (MobileBERT's head multiplies with the weights of linears that it never calls: that product is listed.)
            if not isinstance(module, nn.Linear) or path in called or path in used:
                continue
            if any(path.startswith(block + ".") for block in opaque):
                reason = "it lies in a block that has no graph"
            elif path in self.reached:
                reason = "it is called by code around its block, or in a later call of it, and these have no graph"
            else:
                reason = "the example inputs never reach it; pass example_inputs= that do"
            self.decisions.refuse(path, "linear", reason, unit.layer)
            if unit.layer is not None:
                self.counts["linear"].update(found=1, refused=1)
