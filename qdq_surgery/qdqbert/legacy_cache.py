"""``past_key_values`` as QDQBERT took them, tuples of tensors, in transformers' cache classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache

from qdq_surgery.errors import ModelError

__all__ = ["as_cache"]


def as_cache(past: Any, layers: int, crosses: bool) -> Any:
    """The cache that ``past`` stands for; a cache stays the object it is, and ``None`` is none.

    Args:
        past: For each layer (key, value), or (key, value, key, value) with those of cross-attention behind; each of
            shape (batch, heads, tokens, head size). The tensors stay as they are.
        crosses: Whether the call has cross-attention, whose keys and values are then kept, or computed anew.

    Raises:
        ModelError: It is neither.
    """
    if past is None or isinstance(past, Cache):
        return past
    entries = [*past] if isinstance(past, (tuple, list)) else None
    if entries is None or not all(_is_entry(each) for each in entries):
        raise ModelError(
            "past_key_values is neither a Cache nor, for each layer, a tuple of 2 tensors (key, value) or 4 (and those "
            "of cross-attention); pass on what a call with use_cache=True returned"
        )
    if len(entries) != layers:
        raise ModelError(f"past_key_values has entries for {len(entries)} layers, the model has {layers}")
    lengths = {len(each) for each in entries}
    if len(lengths) > 1:
        raise ModelError("past_key_values has 2 tensors for some layers and 4 for others")
    own = DynamicCache([each[:2] for each in entries])
    if lengths == {4}:
        return EncoderDecoderCache(own, DynamicCache([each[2:] for each in entries]))
    return EncoderDecoderCache(own, DynamicCache()) if crosses else own


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, (tuple, list)) and len(entry) in (2, 4) and all(isinstance(each, Tensor) for each in entry)
