"""While a model is traced for a deployment file, a quantizer leaves a node with its name in the graph, not arithmetic.

What becomes of the node is decided later, for one target (:mod:`qdq_surgery.export.passes.lower_qdq`). The name lets
everything that is found in the file, or in what a runtime makes of it, be said in the words of the PyTorch model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

__all__ = ["FAKE_QUANT", "FAKE_QUANT_DOMAIN", "is_tagged", "tag", "tagged"]

FAKE_QUANT_DOMAIN, FAKE_QUANT = "qdq_surgery", "FakeQuant"

_NAMES: ContextVar[Mapping[nn.Module, str] | None] = ContextVar("names of the quantizers being traced", default=None)


@contextmanager
def tagged(names: Mapping[nn.Module, str]) -> Iterator[None]:
    """While this holds, in this thread, each quantizer in ``names`` leaves a node."""
    token = _NAMES.set(names)
    try:
        yield
    finally:
        _NAMES.reset(token)


def _name(quantizer: nn.Module, names: Mapping[nn.Module, str]) -> str:
    if quantizer in names:
        return names[quantizer]
    # Of a module that hangs in two places, torch.export runs another object at the second: it was made for the first.
    made_for = getattr(getattr(quantizer, "provenance", None), "quantizer", None)
    if made_for in names.values():
        return str(made_for)
    raise KeyError(quantizer)


def is_tagged() -> bool:
    """Whether quantizers leave nodes in this thread. torch.compile has no export under way, and could not ask."""
    return not torch.compiler.is_dynamo_compiling() and _NAMES.get() is not None


def tag(quantizer: nn.Module, inputs: Tensor) -> Tensor | None:
    """The node in place of a quantizer, with shape and dtype of ``inputs``; ``None`` unless :func:`tagged`.

    Raises:
        KeyError: The quantizer is not among those that were announced.
    """
    names = _NAMES.get()
    if names is None:
        return None
    return torch.onnx.ops.symbolic(
        f"{FAKE_QUANT_DOMAIN}::{FAKE_QUANT}",
        (inputs,),
        {"quantizer": _name(quantizer, names)},
        dtype=inputs.dtype,
        shape=inputs.shape,
        version=1,
    )
