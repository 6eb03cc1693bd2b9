"""The rounding for the next linear moves into the product before it, where that linear alone reads what it gives.

    rounded(x) -> linear, GELU -> float -> rounded -> linear    becomes    rounded(x) -> linear, GELU -> linear

Both may lie in blocks of their own, which the block around them calls. That one's graph is rewritten, and asks for
integers by giving some: a linear that was linked to the next one and reads integers gives integers. Whoever calls it
otherwise, by code that was not recorded or from outside, gives it floats and gets floats; so does the graph while
anything on the way has a hook or was replaced.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from qdq_surgery.freeze.dataflow import PASSES, readers, readers_inside
from qdq_surgery.freeze.epilogues import Done, Epilogue
from qdq_surgery.freeze.linear import IntegerLinear
from qdq_surgery.graph.block_graph import BlockGraph, flatten_call, join_path
from qdq_surgery.integers.arranged import Arrangement, by_step
from qdq_surgery.integers.product import LEAST
from qdq_surgery.match.subgraph import Value

__all__ = ["Handover", "Step", "can_hand", "find_handovers", "hand_over", "in_one_role", "link", "steps_of"]


#: Parts of a product that are worth calling one by one.
_MOST_STEPS = 8


@dataclass(frozen=True)
class Handover:
    """A linear that gives integers to the only one that reads them.

    Attributes:
        block: Path of the block whose graph asks for it.
        linear, reader: Paths of the two linears.
        giver, taker: Paths of what the block calls with the one's input, and with the other's.
        given, taken: Which argument that is.
    """

    block: str
    linear: str
    reader: str
    giver: str
    given: str
    taker: str
    taken: str

    def parts(self) -> tuple[str, ...]:
        """As they are stored."""
        return (self.block, self.linear, self.reader, self.giver, self.given, self.taker, self.taken)


@dataclass(frozen=True)
class Step:
    """The same, below the block: what is done to its graph."""

    linear: str
    giver: str
    given: str
    taker: str
    taken: str


def steps_of(block: str, handovers: Iterable[Handover]) -> tuple[Step, ...]:
    """What is done to the graph of a block."""

    def below(path: str) -> str:
        return path[len(block) + 1 :] if block else path

    return tuple(
        Step(below(each.linear), below(each.giver), each.given, below(each.taker), each.taken)
        for each in handovers
        if each.block == block
    )


def find_handovers(
    model: nn.Module,
    recorded: Iterable[tuple[str, BlockGraph]],
    epilogues: Iterable[Epilogue],
    apart: Collection[str],
) -> tuple[Handover, ...]:
    """All places where a product can round for the next one.

    Args:
        recorded: The path of each unit and its tree, for each kind of call that was looked at. A place counts if every
            call of its linear, in all of them, is this one.
        epilogues: The functions that products compute.
        apart: Paths of linears that read integers already.
    """
    functions = {each.linear: each.function for each in epilogues}
    found: dict[str, list[Handover | None]] = {}
    for path, tree in recorded:
        for graph in tree.walk():
            for node in graph.graph.nodes if graph.failure is None else ():
                where = join_path(path, graph.path, str(node.target))
                if node.op == "call_module" and isinstance(_module(model, where), IntegerLinear):
                    place = _handover(model, path, Value(graph, node), where, functions.get(where))
                    found.setdefault(where, []).append(place)
    # A module that hangs in two places has two paths, and is called from elsewhere, too.
    seen = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    firsts = {linear: places[0] for linear, places in found.items()}
    handed = (
        first
        for linear, first in firsts.items()
        if first is not None
        and all(place == first for place in found[linear])
        and all(seen.count(id(model.get_submodule(path))) == 1 for path in (linear, first.reader))
    )
    return in_one_role(handed, apart)


def in_one_role(handovers: Iterable[Handover], apart: Collection[str]) -> tuple[Handover, ...]:
    """Those whose linears do nothing else: one that reads integers anyway would give some that nobody asked for."""
    kept: list[Handover] = []
    for each in handovers:
        given = {*apart, *(other.reader for other in kept)}
        taken = {*apart, *(other.linear for other in kept)}
        if each.linear not in given and each.reader not in taken:
            kept.append(each)
    return tuple(kept)


def _handover(model: nn.Module, unit: str, value: Value, path: str, function: str | None) -> Handover | None:
    linear = model.get_submodule(path)
    assert isinstance(linear, IntegerLinear)
    result = value if function is None else _only_reader(value)
    after = None if result is None else _only_reader(result)
    if after is None or after.node.op != "call_module":
        return None
    reader = join_path(unit, after.graph.path, str(after.node.target))
    meeting = next((each for each in _outwards(value.graph) if each in list(_outwards(after.graph))), None)
    if meeting is None or not _can_round(linear, linear.activation, _module(model, reader)):
        return None
    ends = [_end(meeting, each) for each in (value, after)]
    if meeting.kind != "forward" or None in ends:
        return None
    block = join_path(unit, meeting.path)
    parts = [part for target, argument in filter(None, ends) for part in (join_path(block, target), argument)]
    return Handover(block, path, reader, *parts)


def _only_reader(value: Value) -> Value | None:
    after = readers(value)
    return after[0] if after is not None and len(after) == 1 else None


def _outwards(graph: BlockGraph | None) -> Iterator[BlockGraph]:
    """A graph, and those around it."""
    while graph is not None:
        yield graph
        graph = graph.caller


def _end(meeting: BlockGraph, linear: Value) -> tuple[str, str] | None:
    """What ``meeting`` calls for this linear to be called, and which argument it alone reads."""
    call = linear.node
    for graph in _outwards(linear.graph):
        if graph is meeting:
            break
        if graph.kind != "forward" or graph.call is None:
            return None
        call = graph.call
    if call.op != "call_module":
        return None
    if call is linear.node:
        return (str(call.target), "0") if len(call.args) == 1 and not call.kwargs else None
    for argument, path in zip(*flatten_call(call.args, dict(call.kwargs)), strict=True):
        if isinstance(argument, Node):
            inside = readers_inside(Value(meeting, argument), call)
            if inside is not None and [each.node for each in inside] == [linear.node]:
                return str(call.target), path
    return None


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _can_round(linear: IntegerLinear, activation: str, reader: nn.Module | None) -> bool:
    """Whether integers that are cut off at 0 and 255 are those of the reader's grid, which has few different steps."""
    if not isinstance(reader, IntegerLinear) or reader is linear or reader.in_features != linear.out_features:
        return False
    grid = reader.input_grid
    least, most = float(grid.factor.min()), float(grid.factor.max())
    if not least > 0 or grid.zero_point + grid.highest != 255 or len(torch.unique(grid.factor)) > _MOST_STEPS:
        return False
    if grid.never_negative:  # it refuses what is negative
        return LEAST[activation] >= 0
    return grid.zero_point + grid.lowest == 0 or LEAST[activation] * most > grid.lowest


def can_hand(model: nn.Module, handover: Handover, activation: str) -> bool:
    """Whether there are two such linears in such a block, whoever says so.

    Args:
        activation: What the first one's product computes, or is to compute.
    """
    linear, reader = (_module(model, path) for path in (handover.linear, handover.reader))
    inside = f"{handover.block}." if handover.block else ""
    return (
        isinstance(linear, IntegerLinear)
        and _can_round(linear, activation, reader)
        and _module(model, handover.block) is not None
        and not isinstance(_module(model, handover.block), nn.ModuleList)
        and handover.giver.startswith(inside)
        and handover.taker.startswith(inside)
        and f"{handover.linear}.".startswith(f"{handover.giver}.")
        and f"{handover.reader}.".startswith(f"{handover.taker}.")
    )


def link(model: nn.Module, handovers: Iterable[Handover]) -> None:
    """Tell each linear for whom it rounds, and who must not have hooks; and sort weights where channels want it."""
    sorted_as: dict[IntegerLinear, Arrangement] = {}
    for each in handovers:
        linear, reader = model.get_submodule(each.linear), model.get_submodule(each.reader)
        assert isinstance(linear, IntegerLinear)
        assert isinstance(reader, IntegerLinear)
        linear.hand_to(reader.input_grid, _between(model, each))
        if reader.input_grid.factor.ndim:
            rows, factors = by_step(reader.input_grid.factor)
            before = sorted_as.get(linear, Arrangement())
            sorted_as[linear] = replace(before, rows=rows, factors=factors)
            sorted_as[reader] = replace(sorted_as.get(reader, Arrangement()), columns=torch.cat(rows))
    for linear, arrangement in sorted_as.items():
        linear.arrange(arrangement)


def _between(model: nn.Module, handover: Handover) -> tuple[nn.Module, ...]:
    ends = (module for path in (handover.giver, handover.taker) for module in model.get_submodule(path).modules())
    # What lies beside them is an activation, say, or a dropout.
    beside = (child for child in model.get_submodule(handover.block).children() if not any(child.children()))
    return tuple(dict.fromkeys((*ends, *beside)))


def hand_over(graph: Graph, block: nn.Module, steps: Iterable[Step]) -> int:
    """Ask for integers where the graph is as it was when it was looked at, in place; returns at how many places."""
    found = [
        (step, call, way) for step in steps for call in graph.nodes if (way := _way(block, call, step)) is not None
    ]
    for step, call, way in found:
        values = _argument(call, step.given)
        below = step.linear[len(step.giver) + 1 :]
        with graph.inserting_before(call):
            called = [graph.get_attr(target) for target in way]
            handed = graph.call_function(_handed, (values, below, *called))
        origin = (*call.meta["origin"], "handed")
        for node in called:
            node.meta.update(op="parameter", origin=origin, source=call.meta["source"])
        handed.meta.update(op="quantizer", origin=origin, source=call.meta["source"])
        _replace(call, step.given, handed)
    graph.lint()
    return len(found)


def _handed(values: Tensor, below: str, giver: nn.Module, *others: nn.Module) -> Tensor:
    """What to give ``giver`` for its linear at ``below`` to give integers; ``values`` if that is another one by now."""
    linear = _module(giver, below)
    return linear.handed(values, (giver, *others)) if isinstance(linear, IntegerLinear) else values


def _way(block: nn.Module, call: Node, step: Step) -> list[str] | None:
    """The modules that are called from ``call`` to the next linear; ``None`` if that is not such a place."""
    if call.op != "call_module" or call.target != step.giver or _argument(call, step.given) is None:
        return None
    result, users, way = call, list(call.users), [step.giver]
    while len(users) == 1 and _passes(block, users[0]) and users[0].args[:1] == (result,):
        result, users = users[0], list(users[0].users)
        way += [str(result.target)] if result.op == "call_module" else []
    if len(users) != 1 or users[0].op != "call_module" or users[0].target != step.taker:
        return None
    handed = flatten_call(users[0].args, dict(users[0].kwargs))
    reads = [path for value, path in zip(*handed, strict=True) if value is result]
    return [*way, step.taker] if reads == [step.taken] else None


def _passes(block: nn.Module, node: Node) -> bool:
    done = node.op == "call_module" and isinstance(_module(block, str(node.target)), Done)
    return done or node.meta.get("op") in PASSES


def _argument(call: Node, path: str) -> Node | None:
    values, paths = flatten_call(call.args, dict(call.kwargs))
    found = dict(zip(paths, values, strict=True)).get(path)
    return found if isinstance(found, Node) else None


def _replace(call: Node, path: str, value: Node) -> None:
    if path in call.kwargs:
        call.kwargs = {**call.kwargs, path: value}
    else:
        call.args = tuple(value if str(index) == path else each for index, each in enumerate(call.args))
