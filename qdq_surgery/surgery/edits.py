"""Edits of a recorded graph: a quantizer between an operand and its operator, by the operator's place in the source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from qdq_surgery.errors import TraceError

__all__ = ["Edit", "Origin", "insert_quantizers"]

Origin = tuple[Any, ...]


@dataclass(frozen=True)
class Edit:
    """A quantizer between an operand and its operator.

    Attributes:
        origin: Identity of the operator's call within the source.
        position: Index into the node's args, or a keyword.
        quantizer: Attribute name of the quantizer on the owning block.
        operator: What the node is.
    """

    origin: Origin
    position: int | str
    quantizer: str
    operator: str


def insert_quantizers(graph: Graph, edits: tuple[Edit, ...]) -> list[Edit]:
    """Put quantizer calls into ``graph`` at their places; returns the edits that found their place.

    Args:
        graph: A recorded graph; it is edited.
    """
    places: dict[Origin, Node] = {node.meta["origin"]: node for node in graph.nodes if "origin" in node.meta}
    done = []
    for edit in edits:
        node = places.get(edit.origin)
        if node is None:
            continue
        operand = _operand(node, edit)
        with graph.inserting_before(node):
            quantizer = graph.call_module(edit.quantizer, (operand,))
        quantizer.meta.update(op="quantizer", origin=(*edit.origin, edit.position), source=node.meta["source"])
        if isinstance(edit.position, str):
            node.kwargs = {**node.kwargs, edit.position: quantizer}
        else:
            node.args = (*node.args[: edit.position], quantizer, *node.args[edit.position + 1 :])
        done.append(edit)
    graph.lint()
    return done


def _operand(node: Node, edit: Edit) -> Node:
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
