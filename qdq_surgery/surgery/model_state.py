"""What one asks a converted model: its plan, its quantizers, what it runs, and its behavior without quantizers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from qdq_surgery.errors import CalibrationError, ModelError
from qdq_surgery.hf.wrappers import models_inside
from qdq_surgery.match.plan import Plan
from qdq_surgery.quantize.embedding import QuantEmbedding
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.safety.transaction import put_back_after
from qdq_surgery.surgery.quantized_forward import QuantizedForward
from qdq_surgery.trace.attention import QUANTIZED_FORWARDS

__all__ = [
    "FROZEN_ATTRIBUTE",
    "CalibrationRecord",
    "ModelState",
    "check_module",
    "is_converted",
    "plan_of",
    "quantization_disabled",
    "quantized_forwards",
    "quantizers",
    "refuse_broken",
    "refuse_disabled",
    "refuse_lost",
    "set_state",
    "state_of",
]

_HOLDERS = itertools.count()

#: The attribute of a converted model that holds its :class:`ModelState`.
_STATE = "_qdq_state"

#: The attribute of a model that :func:`qdq_surgery.freeze` made, in which it says what it is; no other model has it.
FROZEN_ATTRIBUTE = "_qdq_frozen"


class CalibrationRecord(Protocol):
    """What a calibration did: a :class:`~qdq_surgery.calibration.ranges.Calibration`, a stage further on."""

    def now(self, qmodel: nn.Module) -> CalibrationRecord:
        """The same with the ranges that the model has by now."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""


@dataclass(frozen=True, eq=False)
class ModelState:
    """What a converted model knows of itself. It is replaced and never changed, so that a snapshot can bring it back.

    Attributes:
        plan: What it was converted by.
        calibration: What the last calibration did; ``None`` if there was none, or if it is in ``saved_report``.
        saved_report: The report that lay beside the checkpoint, as it was read and nothing more; ``None`` without one.
    """

    plan: Plan
    calibration: CalibrationRecord | None = None
    saved_report: bytes | None = None


def is_converted(model: nn.Module) -> bool:
    """Whether :func:`convert` made the model, or it was loaded as one that it made."""
    return isinstance(getattr(model, "__dict__", {}).get(_STATE), ModelState)


def check_module(qmodel: object) -> None:
    """Nothing, if it is a module.

    Raises:
        ModelError: It is something else.
    """
    if not isinstance(qmodel, nn.Module):
        raise ModelError(f"found a {type(qmodel).__name__}, wanted a model that qdq_surgery.convert returned")


def set_state(model: nn.Module, state: ModelState | None) -> None:
    """Give a model its state; ``None``: it is no longer converted."""
    if state is None:
        vars(model).pop(_STATE, None)
    else:
        vars(model)[_STATE] = state


def state_of(qmodel: nn.Module) -> ModelState:
    """The state of a converted model.

    Raises:
        ModelError: The model was not made by :func:`convert`.
    """
    check_module(qmodel)
    state = vars(qmodel).get(_STATE)
    if FROZEN_ATTRIBUTE in vars(qmodel):
        raise ModelError(
            f"this {type(qmodel).__name__} is frozen: its quantized linears are integers, without quantizers; use the "
            "quantized model that it was made of"
        )
    if not isinstance(state, ModelState):
        raise ModelError(f"this {type(qmodel).__name__} is not converted; {_remedy(qmodel)}")
    return state


def _remedy(qmodel: nn.Module) -> str:
    if hasattr(qmodel, "get_base_model"):  # PEFT's
        return "pass model.get_base_model()"
    for place, inside in models_inside(qmodel):
        if is_converted(inside):
            return f"it holds a {type(inside).__name__} that is, at model{place}: pass that one"
    return "call qdq_surgery.convert(model) first"


def plan_of(qmodel: nn.Module) -> Plan:
    """The plan that a converted model was made by.

    Raises:
        ModelError: The model was not made by :func:`convert`.
    """
    return state_of(qmodel).plan


def quantized_forwards(block: nn.Module) -> dict[str, QuantizedForward]:
    """What a converted block runs in place of its ``forward`` and of its ``attention`` function: one, both, or none."""
    own = {kind: vars(block).get(name) for kind, name in QUANTIZED_FORWARDS.items()}
    return {kind: each for kind, each in own.items() if isinstance(each, QuantizedForward)}


def quantizers(qmodel: nn.Module) -> dict[str, TensorQuantizer]:
    """All quantizers of a converted model by qualified name; a module that is shared has one name.

    Raises:
        ModelError: It is no model.
    """
    check_module(qmodel)
    return {name: module for name, module in qmodel.named_modules() if isinstance(module, TensorQuantizer)}


def refuse_disabled(qmodel: nn.Module, what: str) -> None:
    """Refuse ``what`` while a :func:`quantization_disabled` holds, in any thread: copies of the model would not be off.

    Raises:
        ModelError: One holds.
    """
    if any(each.held_off for each in quantizers(qmodel).values()):
        raise ModelError(
            f"the quantizers of this {type(qmodel).__name__} are off for a while; call {what} outside of "
            "quantization_disabled"
        )


def refuse_lost(qmodel: nn.Module, what: str) -> None:
    """Refuse ``what`` of a model without a quantizer that its plan has, in a module that is still there.

    Raises:
        ModelError: Somebody has put another module in the place of one with quantizers, or taken one out.
    """
    own = quantizers(qmodel)
    # (Beside adapters they have other names, and know those that they had.)
    found = own.keys() | {each.provenance.quantizer for each in own.values() if each.provenance is not None}
    modules = dict(qmodel.named_modules())
    lost = [site for site in plan_of(qmodel).sites if site.quantizer not in found and site.owner in modules]
    if lost:
        raise ModelError(
            f"this {type(qmodel).__name__} has lost {lost[0].quantizer} (rule '{lost[0].rule}') since its conversion, "
            f"and {len(lost) - 1} more, so that {what} would leave this in float; disable() quantizers in place of "
            "taking them out, and exchange modules before the conversion"
        )


def refuse_broken(qmodel: nn.Module) -> None:
    """Refuse weights and tables that no integers can stand for.

    Raises:
        CalibrationError: One is quantized, and has a NaN or an infinite value; names the module.
    """
    for name, module in qmodel.named_modules():
        if not isinstance(module, (QuantLinear, QuantEmbedding)):
            continue
        quantizer = module._weight_quantizer
        if quantizer is not None and quantizer.quantizes and not bool(module.weight.isfinite().all()):
            raise CalibrationError(f"the weight of {name} has a NaN or an infinite value, which no integer stands for")


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
