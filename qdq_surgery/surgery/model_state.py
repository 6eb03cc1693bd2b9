"""What one asks a converted model: its plan, its quantizers, and its behavior without them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qdq_surgery.errors import ModelError
from qdq_surgery.match.plan import Plan
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.safety.transaction import put_back_after
from qdq_surgery.surgery.apply import PLAN_ATTRIBUTE

_HOLDERS = itertools.count()

__all__ = ["plan_of", "quantization_disabled", "quantizers"]


def plan_of(qmodel: nn.Module) -> Plan:
    """The plan that a converted model was made by.

    Raises:
        ModelError: The model was not made by :func:`convert`.
    """
    made = vars(qmodel).get(PLAN_ATTRIBUTE)
    if not isinstance(made, Plan):
        inside = hasattr(qmodel, "get_base_model")  # PEFT's
        remedy = "pass model.get_base_model()" if inside else "call qdq_surgery.convert(model) first"
        raise ModelError(f"this {type(qmodel).__name__} is not converted; {remedy}")
    return made


def quantizers(qmodel: nn.Module) -> dict[str, TensorQuantizer]:
    """All quantizers of a converted model by qualified name; a module that is shared has one name."""
    return {name: module for name, module in qmodel.named_modules() if isinstance(module, TensorQuantizer)}


@contextmanager
def quantization_disabled(qmodel: nn.Module) -> Iterator[None]:
    """While this holds, every quantizer lets its input pass; then each is as it was.

    Such blocks may overlap, nested or in threads, and end in any order: a quantizer works again when the last one that
    it is in has ended. They may overlap a collection of statistics, which is in float as well.

    Raises:
        ModelError: The model has no quantizers.
    """
    found = list(quantizers(qmodel).values())
    if not found:
        raise ModelError(f"this {type(qmodel).__name__} has no quantizers; call qdq_surgery.convert(model) first")
    holder = next(_HOLDERS)

    def let_go() -> None:
        for quantizer in found:
            quantizer.let_go(holder)

    with put_back_after(let_go):
        for quantizer in found:
            quantizer.hold_off(holder)
        yield
