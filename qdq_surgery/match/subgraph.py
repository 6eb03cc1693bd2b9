"""Whether a pattern fits a node of a recorded graph.

Operands are followed across blocks: what a child returns is what its own graph returns, and what a block is handed is
what its caller hands it. So ``add(maybe(dropout)(linear(_)), _)`` finds the residual add of DistilBERT, whose linear
lies in another block than its add.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from qdq_surgery.graph.block_graph import BlockGraph, flatten_call
from qdq_surgery.rules.pattern import COMMUTATIVE, LAYOUT, RESIDUAL_ADD, Operand, Pattern, operator_fits
from qdq_surgery.trace.units import RESIDUAL

__all__ = ["Attempt", "Slot", "Value", "fit", "operand_of", "place_of"]

#: Modules that have a weight as second operand.
_WEIGHTED = ("linear", "conv1d", "embedding")


@dataclass(frozen=True, eq=False)
class Value:
    """A node of a block's graph, after following calls: where a tensor comes from."""

    graph: BlockGraph
    node: Node

    @property
    def op(self) -> str:
        """The operator in the words of patterns; ``unknown`` if they have none for it."""
        return str(self.node.meta.get("op", "unknown"))

    def is_a(self, wanted: str) -> bool:
        """Whether the operator serves where a pattern names ``wanted``."""
        if wanted == RESIDUAL_ADD:
            return bool(self.node.meta.get(RESIDUAL))
        return operator_fits(wanted, self.op)


@dataclass(frozen=True)
class Slot:
    """One operand of one node."""

    graph: BlockGraph
    node: Node
    position: int | str

    @property
    def of_module(self) -> bool:
        """Whether the operator is a module that is called, such as a linear."""
        return self.node.op == "call_module"

    def key(self) -> tuple[Hashable, int | str]:
        """One for each operand that can have a quantizer, however often its operator is called."""
        return place_of(self.graph, self.node), self.position


@dataclass
class Attempt:
    """One try to fit a pattern: what was captured, how far it came, and why it ended."""

    captured: dict[str, Slot] = field(default_factory=dict)
    depth: int = 0
    reason: str = ""


def place_of(graph: BlockGraph, node: Node) -> Hashable:
    """Identity of an operator in its unit.

    A block may be called more than once (for each chunk, say): its operators are then recorded once for each call, and
    are the same operators.
    """
    if node.op == "call_module":
        return graph.path, node.target
    return graph.path, graph.kind, node.meta["origin"]


def operand_of(node: Node, position: int | str) -> Any:
    """The argument of ``node`` at an index or keyword; ``None`` for a module's weight, which is no node."""
    if position == "weight":
        return None
    return node.kwargs.get(position) if isinstance(position, str) else node.args[position]


def _slots(value: Value) -> list[Slot]:
    """The tensor operands of a node, in order. A linear, and an embedding, has its weight as second operand."""
    node = value.node
    slots = [Slot(value.graph, node, i) for i, argument in enumerate(node.args) if _is_tensor(argument)]
    slots += [Slot(value.graph, node, key) for key, argument in node.kwargs.items() if _is_tensor(argument)]
    if node.op == "call_module" and node.meta.get("op") in _WEIGHTED:
        slots.insert(1, Slot(value.graph, node, "weight"))
    return slots


def _is_tensor(argument: object) -> bool:
    return (
        isinstance(argument, Node)
        and argument.meta.get("op") not in ("size", "numel")
        and argument.meta.get("shape") != ()
    )


def fit(pattern: Pattern, value: Value, attempt: Attempt) -> bool:
    """Whether the node is what ``pattern`` names, operands included."""
    slots = _slots(value)
    wanted = pattern.operands
    if len(slots) < len(wanted):
        attempt.reason = f"this {value.op} has {len(slots)} tensor operands, the pattern names {len(wanted)}"
        return False
    orders = [slots]
    if value.op in COMMUTATIVE and len(wanted) == 2 and len(slots) == 2:
        orders.append(slots[::-1])
    trials = []
    for order in orders:
        trial = Attempt(dict(attempt.captured), attempt.depth + 1)
        if all(_fit_operand(operand, slot, trial) for operand, slot in zip(wanted, order, strict=False)):
            attempt.captured, attempt.depth = trial.captured, trial.depth
            return True
        trials.append(trial)
    best = max(trials, key=lambda trial: trial.depth)  # of equals the first: the order that is written
    attempt.depth, attempt.reason = best.depth, best.reason
    return False


def _fit_operand(operand: Operand, slot: Slot, attempt: Attempt) -> bool:
    if operand.pattern is not None:
        argument = operand_of(slot.node, slot.position)
        value = _resolve(slot.graph, argument) if isinstance(argument, Node) else None
        if value is None or not _fit(operand.pattern, value, attempt):
            came = "a parameter" if value is None else _words(_through_layout(value, operand.pattern))
            name = f"operand '{operand.capture}'" if operand.capture else "an operand"
            attempt.reason = (
                attempt.reason or f"{name} of {slot.node.meta['op']} comes from {came}, not {operand.pattern}"
            )
            return False
    if operand.capture is not None:
        attempt.captured[operand.capture] = slot
    attempt.depth += 1
    return True


def _fit(pattern: Pattern, value: Value, attempt: Attempt) -> bool:
    """Whether what ``value`` comes from is what ``pattern`` names, looking through layout operators."""
    if pattern.optional:
        inner = pattern.operands[0]
        looked = _through_layout(value, pattern)
        if looked.op == "cat":
            looked = _chunk(looked) or looked
        if any(looked.is_a(name) for name in pattern.operators):
            slots = _slots(looked)
            if slots and _fit_operand(inner, slots[0], attempt):
                return True
        return inner.pattern is None or _fit(inner.pattern, value, attempt)
    looked = _through_layout(value, pattern)
    if looked.op == "cat" and not operator_fits(pattern.operators[0], "cat"):
        chunk = _chunk(looked)
        if chunk is not None:
            return _fit(pattern, chunk, attempt)
    return looked.is_a(pattern.operators[0]) and fit(pattern, looked, attempt)


def _words(value: Value) -> str:
    return {"input": "outside this layer", "parameter": "a parameter"}.get(value.op, f"'{value.op}'")


def _through_layout(value: Value, pattern: Pattern) -> Value:
    while value.op in LAYOUT and not any(value.is_a(name) for name in pattern.operators):
        source = next((arg for arg in value.node.args if isinstance(arg, Node)), None)
        below = _resolve(value.graph, source) if source is not None else None
        if below is None:
            break
        value = below
    return value


def _chunk(value: Value) -> Value | None:
    """Of a tensor that was computed chunk by chunk and joined again, the first chunk.

    Returns:
        ``None`` if what is joined was not made at one place in the source, by one operator.
    """
    parts = value.node.args[0] if value.node.args else None
    if not isinstance(parts, (list, tuple)):
        return None
    found = [_resolve(value.graph, part) if isinstance(part, Node) else None for part in parts]
    places = {_place_of_all(each) if each is not None else None for each in found}
    return found[0] if len(places) == 1 else None


def _place_of_all(value: Value) -> Hashable:
    """One for all calls at a place in the source, however often it is passed."""
    if value.node.op == "call_module":
        return value.graph.path, value.node.target
    return value.graph.path, value.node.meta["origin"][:-1]


def _resolve(graph: BlockGraph, node: Node) -> Value | None:
    """Follow ``node`` out of calls and into them, to the operator that made the tensor; ``None`` at a dead end."""
    for place in _steps(graph, node):
        if place.op not in ("item", "block", "input"):
            return place
        graph, node = place.graph, place.node
    return Value(graph, node)


def _steps(graph: BlockGraph, node: Node) -> Iterator[Value]:
    while True:
        value = Value(graph, node)
        yield value
        if value.op == "item":
            # An element of what a call returned.
            indices: list[Any] = []
            source = node
            while source.meta.get("op") == "item":
                indices.insert(0, source.args[1])
                source = source.args[0]  # type: ignore[assignment]
            callee = source.meta.get("callee")
            if callee is None or callee.failure is not None:
                if source.meta.get("op") in ("block", "item"):
                    return
                node = source  # chunk, unbind...: an element of a layout operator is the operator
                continue
            output = callee.output
            for index in indices:
                output = output[index]
            if not isinstance(output, Node):
                return
            graph, node = callee, output
        elif value.op == "block":
            callee = node.meta.get("callee")
            if callee is None or callee.failure is not None or not isinstance(callee.output, Node):
                return
            graph, node = callee, callee.output
        elif value.op == "input":
            caller, call = graph.caller, graph.call
            if caller is None or call is None:
                return
            args = call.args[1:] if graph.kind == "attention" else call.args
            handed, _ = flatten_call(tuple(args), dict(call.kwargs))
            argument = handed[graph.inputs.index(node)]
            if not isinstance(argument, Node):
                return
            graph, node = caller, argument
        else:
            return
