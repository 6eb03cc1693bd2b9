"""``head_mask``, which transformers 5 dropped: attention probabilities times a factor for each head.

The factor goes where QDQBERT had it: after the dropout, before the quantizer of the probabilities. That quantizer is a
module of its own, so a hook on it, there for one call and deaf to every other thread, needs no other attention.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qdq_surgery.errors import ModelError

__all__ = ["head_factors", "masked_heads", "times"]

#: The quantizer of the attention probabilities, by QDQBERT's name for it.
_PROBABILITIES = "matmul_a_input_quantizer"


def head_factors(head_mask: Any, layers: int, heads: int, dtype: torch.dtype) -> Tensor:
    """The factor of each head, shape (layers, 1, heads, 1, 1).

    Args:
        head_mask: Shape (heads,), which holds for every layer, or (layers, heads).

    Raises:
        ModelError: It has another shape, or is no tensor.
    """
    if not isinstance(head_mask, Tensor):
        raise ModelError(f"head_mask is a {type(head_mask).__name__}; pass a tensor, 1 for a head that stays")
    if head_mask.shape not in ((heads,), (layers, heads)):
        raise ModelError(
            f"head_mask has the shape {tuple(head_mask.shape)}; this model takes ({heads},), one factor for each head, "
            f"or ({layers}, {heads}), one for each head of each layer"
        )
    return head_mask.to(dtype).expand(layers, heads)[:, None, :, None, None]


@contextmanager
def masked_heads(layers: nn.ModuleList, factors: Tensor) -> Iterator[None]:
    """While this holds, the calling thread's attention probabilities are multiplied, in self- and cross-attention.

    Args:
        layers: The encoder's layers, converted.
        factors: What :func:`head_factors` gave.

    Raises:
        ModelError: A layer's probabilities have no quantizer, or are to be computed again behind the call's back.
    """
    owner = threading.get_ident()
    quantizers = [(index, each) for index, layer in enumerate(layers) for each in _probabilities(index, layer)]
    handles = []
    try:
        for index, quantizer in quantizers:
            handles.append(quantizer.register_forward_pre_hook(_factor(factors[index], owner)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _factor(factor: Tensor, owner: int) -> Any:
    def multiply(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (args[0] * factor,) if threading.get_ident() == owner else None

    return multiply


def _probabilities(index: int, layer: nn.Module) -> list[nn.Module]:
    """The quantizers of the layer's attention probabilities."""
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        raise ModelError(
            "head_mask does not go with gradient checkpointing in training, which computes the layers again when the "
            "mask is gone; turn checkpointing off, or call without head_mask"
        )
    found = []
    for name in ("attention", "crossattention"):
        attention = getattr(layer, name, None)
        if attention is None:
            continue
        quantizer = getattr(attention.self, _PROBABILITIES, None)
        if quantizer is None:
            raise ModelError(
                f"head_mask needs the quantizer {_PROBABILITIES}, which the rules left out of layer {index}'s {name}; "
                "convert with rules='qdqbert', or call without head_mask"
            )
        found.append(quantizer)
    return found


def times(attentions: tuple[Tensor, ...] | None, factors: Tensor) -> tuple[Tensor, ...] | None:
    """The attentions of a call as QDQBERT returned them: with their factors."""
    if attentions is None:
        return None
    return tuple(each * factor for each, factor in zip(attentions, factors, strict=True))
