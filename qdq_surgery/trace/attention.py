"""The attention function that quantized models use, plugged in through transformers' own interface.

Models that call ``ALL_ATTENTION_FUNCTIONS`` hide their matmuls in a function outside the block. Under the name
:data:`QDQ_ATTENTION` that function is :func:`qdq_attention`: it runs the rewritten graph of the module that calls it,
or, for a module that has none, the eager function of the module's own modeling file. Masks are those of ``eager``.
Registering the name changes no model; a model uses it when its config says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from qdq_surgery.errors import AttentionBypassError, TraceError
from qdq_surgery.trace.recorder import recording_of

__all__ = [
    "QDQ_ATTENTION",
    "QUANTIZED_FORWARDS",
    "check_not_bypassed",
    "eager_function",
    "qdq_attention",
]

#: Value of ``config._attn_implementation`` in a model whose attention is quantized.
QDQ_ATTENTION = "qdq_eager"

#: The attribute of a converted block that holds what it runs in place of its forward, or of its attention function.
QUANTIZED_FORWARDS = {"forward": "_qdq_forward", "attention": "_qdq_attention"}


def eager_function(cls: type[nn.Module]) -> Callable[..., Any]:
    """The eager attention function that the modeling file of ``cls`` falls back to.

    Raises:
        TraceError: The file has none under transformers' usual name.
    """
    for base in cls.__mro__:
        function = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if callable(function):
            return cast("Callable[..., Any]", function)
    raise TraceError(
        f"{cls.__module__} defines no eager_attention_forward, so the attention of {cls.__name__} is hidden"
    )


def qdq_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> Any:
    """Attention with the quantizers of ``module`` in it; shapes and return value as in transformers' eager function."""
    args = (module, query, key, value, attention_mask)
    rewritten: Any = getattr(module, QUANTIZED_FORWARDS["attention"], None)
    recorder = recording_of(module)
    if recorder is not None:
        rewrite = rewritten is not None and recorder.nested
        function = rewritten.as_function() if rewrite else eager_function(type(module))
        return recorder.call_attention(qdq_attention, function, args, kwargs)
    if rewritten is None:
        return eager_function(type(module))(*args, **kwargs)
    return rewritten(module, args[1:], kwargs)


def check_not_bypassed(module: nn.Module) -> None:
    """Refuse to run a quantized attention module whose model was switched to another implementation.

    Raises:
        AttentionBypassError: The config names another attention function, which would leave the matmuls in float.
    """
    found = module.config._attn_implementation  # type: ignore[union-attr]
    if found != QDQ_ATTENTION:
        raise AttentionBypassError(
            f"{type(module).__name__}: the attention implementation was switched to '{found}', which would bypass the "
            f"quantizers of the attention matmuls; call model.set_attn_implementation('{QDQ_ATTENTION}'), or convert "
            "the float model with rules='linear-only' to use any implementation"
        )


AttentionInterface.register(QDQ_ATTENTION, qdq_attention)
AttentionMaskInterface.register(QDQ_ATTENTION, eager_mask)
