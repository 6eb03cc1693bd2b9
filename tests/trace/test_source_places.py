"""What a function's parameters are called after the block itself."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import nn

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
