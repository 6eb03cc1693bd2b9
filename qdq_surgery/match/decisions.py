"""What is decided while a model is matched: of the whole model, and of the unit at hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import nn
from torch.fx import Node

from qdq_surgery.graph.block_graph import BlockGraph, join_path
from qdq_surgery.match.expectations import Tally
from qdq_surgery.match.plan import Refusal, Site
from qdq_surgery.trace.units import LoneLeaf, Unit

__all__ = ["Decisions", "ModulePaths", "UnitDecisions"]


@dataclass
class Decisions:
    """What is decided about a model so far.

    Attributes:
        sites: By the quantizer's qualified name.
        refusals: How often each was met.
        matches: Matches by rule that gave a quantizer or a refusal.
        tally: What the rules' promises are held against.
    """

    sites: dict[str, Site] = field(default_factory=dict)
    refusals: Counter[Refusal] = field(default_factory=Counter)
    matches: Counter[str] = field(default_factory=Counter)
    tally: Tally = field(default_factory=Tally)

    def refuse(
        self, path: str, operator: str, reason: str, layer: int | None, rule: str | None = None, source: str = ""
    ) -> None:
        self.refusals[Refusal(path, operator, reason, rule, layer, source)] += 1


@dataclass
class UnitDecisions:
    """What is decided about one unit so far.

    Attributes:
        claimed: Operands that a rule took: the first match wins.
        quantized: Operators with such an operand.
        near: By operator, how far the rule came that came nearest to fitting, and why it failed.
        named: How often each quantizer name was used in each block.
    """

    claimed: set[tuple[Hashable, int | str]] = field(default_factory=set)
    quantized: set[Hashable] = field(default_factory=set)
    near: dict[Hashable, tuple[int, str]] = field(default_factory=dict)
    named: Counter[tuple[str, str]] = field(default_factory=Counter)


class ModulePaths:
    """The paths of a model's modules. A module that hangs in several places has one path: the first."""

    def __init__(self, model: nn.Module) -> None:
        first: dict[int, str] = {}
        self._first = {
            path: first.setdefault(id(module), path) for path, module in model.named_modules(remove_duplicate=False)
        }

    def __getitem__(self, path: str) -> str:
        return self._first[path]

    def of_node(self, unit: Unit, graph: BlockGraph, node: Node) -> str:
        """Where ``node`` computes: in the module that it calls, or in the block of its graph."""
        return self[inner_path(unit, graph, node)]


def inner_path(unit: Unit, graph: BlockGraph, node: Node) -> str:
    """The path, as the graph has it, of the module that ``node`` calls, or of the graph's block."""
    path = join_path(unit.path, graph.path)
    # A unit that is a leaf itself was recorded inside a block made for it.
    alone = unit.tree is not None and isinstance(unit.tree.owner, LoneLeaf)
    return path if alone or node.op != "call_module" else join_path(path, str(node.target))
