"""Places in the source, which are the same whoever looks on, and what a function's parameters are called."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import set_eval_frame

from qdq_surgery.graph.shell_copy import shadow
from qdq_surgery.trace.recorder import record
from qdq_surgery.trace.source_places import parameter_names


class Block(nn.Module):
    """Its forward has parameters of every kind."""

    def forward(self, hidden: Any, /, mask: Any = None, *more: Any, cache: Any = None, **options: Any) -> Any:
        return hidden, mask, more, cache, options


@functools.wraps(Block.forward)
def wrapped(*args: Any, **kwargs: Any) -> Any:
    return Block.forward(*args, **kwargs)


@pytest.mark.parametrize("function", [Block.forward, wrapped, functools.partial(Block.forward)])
def test_names_of_the_positional_ones(function: Any) -> None:
    assert parameter_names(function) == ["hidden", "mask"]


class Helped(nn.Module):
    """Calls C functions, and Python functions of its own, of its file and of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def product(self, x: Tensor) -> Tensor:
        return torch.matmul(x, x.transpose(-1, -2))

    def forward(self, x: Tensor) -> Tensor:
        scores = nn.functional.softmax(self.product(self.linear(x)), dim=-1)
        return torch.einsum("bij,bjk->bik", doubled(scores), x)


def doubled(x: Tensor) -> Tensor:
    return x + x


def origins() -> list[Any]:
    block = shadow(Helped())
    graph, _ = record(block, Helped.forward, (torch.ones(2, 3, 4),), {})
    return [node.meta["origin"] for node in graph.graph.nodes if "origin" in node.meta]


def test_places_are_the_same_where_each_frame_is_seen() -> None:
    """As debuggers and dynamo see them: calls do not run in the interpreter's own loop then."""
    wanted = origins()
    before = set_eval_frame(False)
    try:
        found = origins()
    finally:
        set_eval_frame(before)
    assert found == wanted
    assert len(set(wanted)) == len(wanted) > 6
