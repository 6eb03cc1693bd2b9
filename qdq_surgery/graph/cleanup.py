"""What is done to a recorded graph before it is used."""

from __future__ import annotations

from torch.fx import Graph, Node

from qdq_surgery.rules.pattern import LAYOUT

__all__ = ["is_parameter", "tidy"]


def tidy(graph: Graph) -> None:
    """Drop what nothing uses and what has no effect; decide early."""
    _drop_unused(graph)
    _decide_early(graph)


def is_parameter(argument: object) -> bool:
    """Whether the argument is a parameter of the block, reshaped or not."""
    while isinstance(argument, Node) and argument.meta.get("op") in LAYOUT and argument.args:
        argument = argument.args[0]
    return isinstance(argument, Node) and argument.meta.get("op") == "parameter"


def _drop_unused(graph: Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and node.meta.get("op") in ("size", "item", "numel", "parameter"):
            graph.erase_node(node)


def _decide_early(graph: Graph) -> None:
    """Decisions on the sizes of arguments come first: a graph that does not hold is left before anything ran."""
    early = {node for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    last = next((node for node in reversed(list(graph.nodes)) if node in early), None)
    for node in list(graph.nodes):
        if node.meta.get("op") in ("size", "expect", "numel") and set(node.all_input_nodes) <= early:
            early.add(node)
            if last is not None and node is not last.next:
                last.append(node)
            last = node
