"""Run a block on the way to others that are recorded: only what it read is written down, not what it computed.

Which layers are alike, and so are recorded once, depends on what all of their blocks read. Most of them are rewritten
by no rule, and the graph of such a block would be thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from qdq_surgery.errors import TraceError
from qdq_surgery.graph.block_graph import BlockGraph, join_path
from qdq_surgery.graph.operators import is_leaf
from qdq_surgery.trace.proxy_module import make_stand_in

__all__ = ["BlockCall", "Look", "check_forward", "failed", "look_within", "pass_through"]


class BlockCall(NamedTuple):
    """A call of a block, as the one around it makes it: what :func:`~qdq_surgery.trace.recorder.record` is given."""

    block: nn.Module
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: str
    kind: str

    def routine(self) -> BlockGraph:
        """An empty one."""
        return BlockGraph(self.path, self.kind, self.block, getattr(self.function, "__name__", "forward"))


#: Makes a call; gives what was seen of the block, and what it returned.
Look = Callable[[BlockCall], tuple[BlockGraph, Any]]


def pass_through(call: BlockCall, look: Look) -> tuple[BlockGraph, Any]:
    """Make a call.

    Args:
        look: Calls the blocks below.

    Returns:
        A routine with what the block read and what was seen below it, and an empty graph; what the function returned.

    Raises:
        TraceError: It cannot be done with a stand-in for the block.
    """
    check_forward(call.block, call.kind)
    passage = _Passage(call.routine(), look)
    return passage.routine, call.function(make_stand_in(call.block, "", passage), *call.args, **call.kwargs)


def check_forward(block: nn.Module, kind: str) -> None:
    """Refuse a block whose instance has another forward than its class.

    Raises:
        TraceError: It has.
    """
    if kind == "forward" and "forward" in vars(block):
        raise TraceError(
            f"this {type(block).__name__} has a forward of its own (accelerate's hooks set one, for example); convert "
            "the model before it gets one"
        )


def failed(call: BlockCall, error: TraceError) -> BlockGraph:
    """What there is of a block that could not be recorded."""
    routine = call.routine()
    routine.failure = str(error)
    return routine


def look_within(look: Look, call: BlockCall) -> tuple[BlockGraph, Any]:
    """``look``, or where that fails the block's own run: the one around it goes on with what it returns."""
    try:
        return look(call)
    except TraceError as error:
        return failed(call, error), call.function(call.block, *call.args, **call.kwargs)


class _Passage:
    """Told by the stand-in of one block what it reads and calls."""

    #: As of a recorder: the attention inside runs as the block's own rules say.
    nested = True

    def __init__(self, routine: BlockGraph, look: Look) -> None:
        self.routine, self.look = routine, look

    def note_read(self, path: str, name: str, value: Any) -> None:
        self.routine.reads[path, name] = value

    def to_call(self, value: Any) -> Any:
        return value

    def call_child(self, path: str, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_leaf(child):
            return child(*args, **kwargs)
        return self._below(child, type(child).forward, args, kwargs, path, "forward")

    def call_attention(
        self, _: Callable[..., Any], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return self._below(self.routine.owner, function, args[1:], kwargs, "", "attention")

    def _below(
        self,
        block: nn.Module,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        path: str,
        kind: str,
    ) -> Any:
        whole = join_path(self.routine.path, path)
        seen, output = look_within(self.look, BlockCall(block, function, args, kwargs, whole, kind))
        self.routine.children.append(seen)
        return output
