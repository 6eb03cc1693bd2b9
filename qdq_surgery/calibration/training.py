"""Ranges in training: fixed, learned, or found again from the weights when it ends. All are changed, or none."""

from __future__ import annotations

from torch import nn

from qdq_surgery.calibration.collect import planned_name, unwrapped, weight_quantizers
from qdq_surgery.calibration.ranges import share_ranges_found, weight_range
from qdq_surgery.errors import CalibrationError
from qdq_surgery.safety.given_flags import check_flags
from qdq_surgery.safety.transaction import all_or_nothing
from qdq_surgery.surgery.model_state import plan_of, quantizers, refuse_disabled

__all__ = ["fix_ranges", "learn_ranges", "recalibrate_weights"]


def learn_ranges(qmodel: nn.Module, *, weights: bool = False) -> list[nn.Parameter]:
    """Let training move the ranges on from where calibration put them (LSQ, arXiv 1902.08153).

    Ranges that quantizers share stay fixed: learned ones would part.

    Args:
        qmodel: A calibrated model. An optimizer that exists already does not know the new parameters; a file of PEFT
            adapters does not hold them.
        weights: Whether weights' ranges are learned too.

    Returns:
        The ranges as parameters, for an optimizer group without weight decay.

    Raises:
        CalibrationError: A quantizer has no range; none is changed then.
        ModelError: The model is not converted, or is in ``quantization_disabled``.
        OptionError: ``weights`` is neither true nor false.
    """
    check_flags(weights=weights)
    model = unwrapped(qmodel)
    refuse_disabled(model, "learn_ranges")
    shared = {name for group in plan_of(model).shared for name in group}
    kept = set() if weights else set(weight_quantizers(model))
    kept |= {name for name, each in quantizers(model).items() if planned_name(name, each) in shared or each.scaled}
    chosen = {name: each for name, each in quantizers(model).items() if name not in kept and each.enabled}
    for name, each in chosen.items():
        if each.amax is None:
            raise CalibrationError(f"{name} has no range to learn from: calibrate the model first")
    with all_or_nothing(model):
        for each in chosen.values():
            each.learn_amax()
    return [each.amax for each in chosen.values() if isinstance(each.amax, nn.Parameter)]


def fix_ranges(qmodel: nn.Module) -> None:
    """Learned ranges stay where they are from now on.

    Raises:
        ModelError: The model is not converted.
    """
    model = unwrapped(qmodel)
    with all_or_nothing(model):
        for each in quantizers(model).values():
            each.learn_amax(False)


def recalibrate_weights(qmodel: nn.Module) -> None:
    """Find the ranges of all weights of linears and embeddings again, from the weights as they are now.

    Training has moved them, or merging adapters has.

    Ranges that are learned stay. Rules with ``calibration: {recalibrate_weights: true}`` have it done when a
    :class:`~qdq_surgery.trainer.QATTrainer` ends.

    Raises:
        CalibrationError: A weight has a NaN or an infinite value; no range is changed then.
        ModelError: The model is not converted, or is in ``quantization_disabled``.
    """
    model = unwrapped(qmodel)
    refuse_disabled(model, "recalibrate_weights")
    found = {
        name: weight_range(name, quantizer, module.weight, module.channel_scale)
        for name, (quantizer, module) in weight_quantizers(model).items()
        if not quantizer.learns
    }
    share_ranges_found(model, found)
    with all_or_nothing(model):
        for each in found.values():
            each.quantizer.set_range(each.amax)
