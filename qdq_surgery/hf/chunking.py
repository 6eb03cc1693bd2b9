"""A feed-forward network in chunks, written as one: chunks save memory in PyTorch, and cost a kernel each in a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["unchunked"]

#: Transformers' name for the number of tokens in a chunk, on each layer that has chunks.
_SIZE = "chunk_size_feed_forward"


@contextmanager
def unchunked(model: nn.Module) -> Iterator[None]:
    """While this holds, every layer of ``model`` takes all its tokens at once.

    The values are the same: a linear has the same result for a token in whatever company. In chunks, the number of
    kernels depends on the length, so that no length can stay open.
    """
    chunked = [
        (module, size) for module in model.modules() if isinstance(size := vars(module).get(_SIZE), int) and size
    ]
    try:
        for module, _ in chunked:
            setattr(module, _SIZE, 0)
        yield
    finally:
        for module, size in chunked:
            setattr(module, _SIZE, size)
