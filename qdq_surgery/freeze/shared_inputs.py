"""Linears that read one tensor with one grid quantize it once: queries, keys and values start from one.

query(x), key(x), value(x)    becomes    q = query.input_grid(x); query(q), key(q), value(q)
"""

from __future__ import annotations

from torch import nn
from torch.fx import Graph, Node

from qdq_surgery.freeze.linear import IntegerLinear
from qdq_surgery.graph.call_targets import is_in_place

__all__ = ["groups", "makes", "share_inputs"]

#: The child of an integer linear that quantizes.
_GRID = "input_grid"


def makes(block: nn.Module) -> tuple[tuple[str, int], ...]:
    """What decides which linears of a block share, the same for blocks whose graphs may be the same.

    Returns:
        For each integer linear its path below the block, and the number of its grid among those of the block.
    """
    numbers: dict[tuple[object, ...], int] = {}
    linears = ((name, child) for name, child in block.named_modules() if isinstance(child, IntegerLinear))
    return tuple((name, numbers.setdefault(child.input_grid.key, len(numbers))) for name, child in linears)


def groups(graph: Graph, block: nn.Module) -> list[list[Node]]:
    """Calls of integer linears of ``block``, two or more in a group, that read one tensor with one grid."""
    found: dict[tuple[object, ...], list[Node]] = {}
    for node in graph.nodes:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        module = block.get_submodule(str(node.target))
        if isinstance(module, IntegerLinear) and isinstance(node.args[0], Node):
            found.setdefault((node.args[0], *module.input_grid.key), []).append(node)
    return [calls for calls in found.values() if len(calls) > 1 and not _written_between(graph, calls)]


def _written_between(graph: Graph, calls: list[Node]) -> bool:
    """Whether anything is changed in place from the first of the calls to the last."""
    nodes = list(graph.nodes)
    between = nodes[nodes.index(calls[0]) : nodes.index(calls[-1])]
    names = (str(getattr(node.target, "__name__", node.target)) for node in between if node.op != "call_module")
    return any(is_in_place(name) or name == "setitem" for name in names)


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
