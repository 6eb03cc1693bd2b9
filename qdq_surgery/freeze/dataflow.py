"""Who reads a value, followed through blocks: into those that are handed it, and out of those that return it."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from qdq_surgery.graph.block_graph import BlockGraph, flatten_call
from qdq_surgery.match.subgraph import Value

__all__ = ["PASSES", "readers", "readers_inside"]

#: What hands on what it is given, in eval mode.
PASSES = ("dropout", "identity")


def readers(value: Value) -> list[Value] | None:
    """The operators that read ``value``, wherever they are; ``None`` where it leaves what was recorded."""
    return _all(_readers(value))


def readers_inside(value: Value, call: Node) -> list[Value] | None:
    """Those that a block has that ``call`` calls, and that is handed ``value``; ``None`` as there."""
    return _all(_inside(value, call))


def _all(values: Iterator[Value | None]) -> list[Value] | None:
    found: list[Value] = []
    for each in values:
        if each is None:
            return None
        found.append(each)
    return found


def _readers(value: Value) -> Iterator[Value | None]:
    for user in value.node.users:
        reader = Value(value.graph, user)
        if user.op == "output":
            yield from _outside(value)
        elif reader.op in PASSES and user.args[:1] == (value.node,):
            yield from _readers(reader)
        elif reader.op == "block":
            yield from _inside(value, user)
        else:
            yield reader


def _outside(value: Value) -> Iterator[Value | None]:
    """Who reads what a block returns: one value, for of several nothing is known."""
    graph = value.graph
    if graph.caller is None or graph.call is None or graph.output is not value.node:
        yield None
    else:
        yield from _readers(Value(graph.caller, graph.call))


def _inside(value: Value, call: Node) -> Iterator[Value | None]:
    """Who reads what a block is handed."""
    callee = call.meta.get("callee")
    if not isinstance(callee, BlockGraph) or callee.failure is not None:
        yield None
        return
    args = call.args[1:] if callee.kind == "attention" else call.args
    handed, _ = flatten_call(tuple(args), dict(call.kwargs))
    for argument, own in zip(handed, callee.inputs, strict=True):
        if argument is value.node:
            if not isinstance(own, Node):
                yield None
            else:
                yield from _readers(Value(callee, own))
