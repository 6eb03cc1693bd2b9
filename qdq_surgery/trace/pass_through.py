"""Run a block on the way to others that are recorded: only what it read is written down, not what it computed.

Which layers are alike, and so are recorded once, depends on what all of their blocks read. Most of them are rewritten
by no rule, and the graph of such a block would be thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from qdq_surgery.errors import TraceError
from qdq_surgery.graph.block_graph import BlockGraph, join_path
from qdq_surgery.graph.operators import is_leaf
from qdq_surgery.trace.proxy_module import make_stand_in

__all__ = ["Look", "check_forward", "failed", "look_within", "pass_through"]


class Look(Protocol):
    """How a block is called by the one around it."""

    def __call__(
        self,
        block: nn.Module,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        path: str,
        kind: str,
    ) -> tuple[BlockGraph, Any]:
        """What was seen of the block, and what it returned."""


def pass_through(
    block: nn.Module,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    path: str,
    kind: str,
    look: Look,
) -> tuple[BlockGraph, Any]:
    """Call ``function(block, *args, **kwargs)``.

    Args:
        block, function, path, kind: As of a recording, see :func:`~qdq_surgery.trace.recorder.record`.
        look: Calls the blocks below.

    Returns:
        A routine with what the block read and what was seen below it, and an empty graph; what the function returned.

    Raises:
        TraceError: It cannot be done with a stand-in for the block.
    """
    check_forward(block, kind)
    passage = _Passage(BlockGraph(path, kind, block, getattr(function, "__name__", "forward")), look)
    return passage.routine, function(make_stand_in(block, "", passage), *args, **kwargs)


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


def failed(block: nn.Module, function: Callable[..., Any], path: str, kind: str, error: TraceError) -> BlockGraph:
    """What there is of a block that could not be recorded."""
    return BlockGraph(path, kind, block, getattr(function, "__name__", "forward"), failure=str(error))


def look_within(
    look: Look,
    block: nn.Module,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    path: str,
    kind: str,
) -> tuple[BlockGraph, Any]:
    """``look``, or where that fails the block's own run: the one around it goes on with what it returns."""
    try:
        return look(block, function, args, kwargs, path=path, kind=kind)
    except TraceError as error:
        return failed(block, function, path, kind, error), function(block, *args, **kwargs)


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
        seen, output = look_within(self.look, block, function, args, kwargs, path=whole, kind=kind)
        self.routine.children.append(seen)
        return output
