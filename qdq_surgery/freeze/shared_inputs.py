"""Linears that read one tensor with one grid quantize it once: queries, keys and values start from one.

query(x), key(x), value(x)    becomes    q = query.input_grid(x); query(q), key(q), value(q)
"""

from __future__ import annotations

from torch import nn
from torch.fx import Graph, Node

from qdq_surgery.freeze.linear import IntegerLinear, hooked
from qdq_surgery.graph.call_targets import is_in_place

__all__ = ["groups", "makes", "share_inputs"]

#: The child of an integer linear that quantizes.
_GRID = "input_grid"

#: Modules that write to nothing that they are given.
_PURE = (nn.Linear, nn.LayerNorm, nn.Identity)


def makes(block: nn.Module) -> tuple[tuple[str, int], ...]:
    """What decides which linears of a block share, the same for blocks whose graphs may be the same.

    Returns:
        For each integer linear its path below the block, and the number of its grid among those of the block.
    """
    numbers: dict[tuple[object, ...], int] = {}
    linears = ((name, child) for name, child in block.named_modules() if isinstance(child, IntegerLinear))
    keys = ((name, (hooked(child) and name, *child.input_grid.key)) for name, child in linears)
    return tuple((name, numbers.setdefault(key, len(numbers))) for name, key in keys)


def groups(graph: Graph, block: nn.Module) -> list[list[Node]]:
    """Calls of integer linears of ``block``, two or more in a group, that read one tensor with one grid."""
    found: dict[tuple[object, ...], list[Node]] = {}
    for node in graph.nodes:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        module = block.get_submodule(str(node.target))
        if isinstance(module, IntegerLinear) and not hooked(module) and isinstance(node.args[0], Node):
            found.setdefault((node.args[0], *module.input_grid.key), []).append(node)
    return [calls for calls in found.values() if len(calls) > 1 and not _written_between(graph, block, calls)]


def _written_between(graph: Graph, block: nn.Module, calls: list[Node]) -> bool:
    """Whether anything may be changed in place from the first of the calls to the last."""
    nodes = list(graph.nodes)
    return any(_writes(block, node) for node in nodes[nodes.index(calls[0]) : nodes.index(calls[-1])])


def _writes(block: nn.Module, node: Node) -> bool:
    if node.op == "call_module":  # of a block within, or an activation that works in place, nothing is known
        module = block.get_submodule(str(node.target))
        return hooked(module) or not isinstance(module, _PURE)
    name = str(getattr(node.target, "__name__", node.target))
    return is_in_place(name) or name == "setitem"


def share_inputs(graph: Graph, block: nn.Module) -> int:
    """Quantize once for each group, in place; returns how many groups there are."""
    found = groups(graph, block)
    for calls in found:
        first = calls[0]
        with graph.inserting_before(first):
            once = graph.call_module(f"{first.target}.{_GRID}", (first.args[0],))
        once.meta.update(op="quantizer", origin=(*first.meta["origin"], _GRID), source=first.meta["source"])
        for call in calls:
            call.args = (once,)
    graph.lint()
    return len(found)
