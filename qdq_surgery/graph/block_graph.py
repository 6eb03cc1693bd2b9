"""What a recording is: a graph, and the calls that it holds for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

__all__ = [
    "PLAIN",
    "SELF",
    "BlockGraph",
    "DecisionChangedError",
    "Leaf",
    "describe_leaf",
    "expect",
    "flatten_call",
    "join_path",
    "rebuild_call",
]

#: Name of the placeholder for the block itself, where a graph hands it on (to the attention function).
SELF = "block_itself"

#: Values that a graph holds as constants.
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def join_path(*parts: str) -> str:
    """A module path from its parts, of which any may be empty."""
    return ".".join(part for part in parts if part)


class DecisionChangedError(Exception):
    """A recorded decision turned out otherwise: the graph does not hold for this call."""


def expect(found: object, wanted: bool, where: str) -> None:
    """Node of a recorded decision.

    Raises:
        DecisionChangedError: ``found`` is not what it was when the graph was recorded.
    """
    if bool(found) != wanted:  # no "is not": torch.compile has symbols for truth values
        raise DecisionChangedError(
            f"{where}: a comparison of sizes that was {wanted} in the recorded run is now {not wanted}"
        )


Leaf = tuple[Any, ...]


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """All values in the arguments of a call, with the path of each: tuples, lists and dicts are opened."""
    values: list[Any] = []
    paths: list[str] = []
    for index, value in enumerate(args):
        _flatten(value, str(index), values, paths)
    for key, value in kwargs.items():
        _flatten(value, key, values, paths)
    return values, paths


# (No closure: one that calls itself is a circle, which would hold the tensors of every call until it is collected.)
def _flatten(value: Any, path: str, values: list[Any], paths: list[str]) -> None:
    if type(value) in (tuple, list) or isinstance(value, torch.Size):
        for index, item in enumerate(value):
            _flatten(item, f"{path}.{index}", values, paths)
    elif type(value) is dict:
        for key, item in value.items():
            _flatten(item, f"{path}.{key}", values, paths)
    else:
        values.append(value)
        paths.append(path)


def rebuild_call(value: Any, leaves: Iterator[Any]) -> Any:
    """The structure that :func:`flatten_call` opened, with new leaves."""
    if type(value) in (tuple, list) or isinstance(value, torch.Size):
        items = [rebuild_call(item, leaves) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if type(value) is dict:
        return {key: rebuild_call(item, leaves) for key, item in value.items()}
    return next(leaves)


def describe_leaf(value: Any) -> Leaf:
    """What of an argument a graph depends on: kind, rank, dtype and device of a tensor; the value of a constant."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.ndim, value.dtype, value.device)
    if isinstance(value, float):
        return ("float",)
    if isinstance(value, nn.Module):
        return ("module",)
    if isinstance(value, PLAIN):
        # The type belongs to it: True == 1.
        return ("constant", type(value), value)
    return ("object", type(value))


@dataclass(eq=False)
class BlockGraph:
    """One recorded function: a block's forward, or the attention function that a block calls.

    Attributes:
        path: Where the owning block lies, relative to the unit that was recorded; ``""`` is the unit itself.
        kind: ``"forward"`` or ``"attention"``.
        graph: Nodes carry ``meta``: ``op`` (operator name), ``origin`` (identity of the call within the source),
            ``source`` (file:line), ``shape`` (of the example), ``callee`` (graph of a child that is a block).
        signature: Description of each argument leaf that the graph holds for; see :func:`describe_leaf`.
        inputs: For each argument leaf its placeholder, or the constant that it was.
        reads: Plain attributes that decided something: (path of the module, name) -> value.
        reads_dtype: Whether a dtype was asked for, so that autocast matters.
        failure: Why there is no graph, if there is none.
        baked_size: Why the graph may be looked at but not run, if a size of the example is baked into it.
        example: What it was recorded on, until the graph was tried on it (:mod:`~qdq_surgery.graph.replay`); the
            outputs' leaves; the arguments' leaves as the forward left them.
    """

    path: str
    kind: str
    owner: nn.Module
    function: str
    graph: Graph = field(default_factory=Graph)
    argument_paths: tuple[str, ...] = ()
    signature: tuple[Leaf, ...] = ()
    inputs: list[Any] = field(default_factory=list)
    output: Any = None
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    reads_dtype: bool = False
    caller: BlockGraph | None = None
    call: Node | None = None
    children: list[BlockGraph] = field(default_factory=list)
    failure: str | None = None
    baked_size: str | None = None
    example: tuple[Any, list[Any], list[Any]] | None = field(default=None, repr=False)

    def walk(self) -> Iterator[BlockGraph]:
        """This graph and all that it calls, outermost first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def opaque(self) -> Iterator[BlockGraph]:
        """Those that could not be recorded."""
        return (routine for routine in self.walk() if routine.failure is not None)
