"""Edits of a recorded graph, each at its operator's place in the source: one function for each kind of edit."""

from __future__ import annotations

from collections.abc import Iterable
from functools import singledispatch

from torch.fx import Graph, Node

from qdq_surgery.errors import TraceError
from qdq_surgery.match.edits import Edit, InsertQuantizer, Origin

__all__ = ["apply_edit", "apply_edits"]


def apply_edits(graph: Graph, edits: Iterable[Edit]) -> list[Edit]:
    """Make ``edits`` in ``graph``, at their places; returns those that found their place.

    Args:
        graph: A recorded graph; it is edited.

    Raises:
        TraceError: An operator is not what an edit was planned for.
    """
    places: dict[Origin, Node] = {node.meta["origin"]: node for node in graph.nodes if "origin" in node.meta}
    done = [edit for edit in edits if edit.origin in places]
    for edit in done:
        apply_edit(edit, graph, places[edit.origin])
    graph.lint()
    return done


@singledispatch
def apply_edit(edit: Edit, _graph: Graph, _node: Node) -> None:
    """Make ``edit`` in a graph, at the node of its operator; each kind of edit registers its function here."""
    raise TypeError(f"no function is registered for a {type(edit).__name__}; write one with @apply_edit.register")


@apply_edit.register
def _insert_quantizer(edit: InsertQuantizer, graph: Graph, node: Node) -> None:
    operand = _operand(node, edit)
    with graph.inserting_before(node):
        quantizer = graph.call_module(edit.quantizer, (operand,))
    quantizer.meta.update(op="quantizer", origin=(*edit.origin, edit.position), source=node.meta["source"])
    if isinstance(edit.position, str):
        node.kwargs = {**node.kwargs, edit.position: quantizer}
    else:
        node.args = (*node.args[: edit.position], quantizer, *node.args[edit.position + 1 :])


def _operand(node: Node, edit: InsertQuantizer) -> Node:
    """What the quantizer of ``edit`` is to stand behind.

    Raises:
        TraceError: There is no such operand, or it is another operator's: the plan was not made for this code.
    """
    if isinstance(edit.position, str):
        operand = node.kwargs.get(edit.position)
    else:
        operand = node.args[edit.position] if edit.position < len(node.args) else None
    if not isinstance(operand, Node) or node.meta.get("op") != edit.operator:
        raise TraceError(
            f"{edit.quantizer} belongs to operand {edit.position} of a {edit.operator}, which the "
            f"{node.meta.get('op')} at {node.meta['source']} has not; its plan was made for other code: convert it anew"
        )
    return operand
