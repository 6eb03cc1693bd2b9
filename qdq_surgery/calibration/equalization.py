"""Scales per channel alone: found and set, with what they depend on, and everything else left as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from qdq_surgery.calibration.collect import Statistics, activation_quantizers, collect, unwrapped, weight_quantizers
from qdq_surgery.calibration.ranges import Calibration, FoundRange, find_ranges, own_method, set_ranges
from qdq_surgery.errors import CalibrationError
from qdq_surgery.numerics.channel_scales import channel_scale
from qdq_surgery.safety.transaction import all_or_nothing
from qdq_surgery.surgery.model_state import CalibrationRecord, ModelState, plan_of, set_state, state_of
from qdq_surgery.text.view import Column, Line, Part, Result, Table, data_words, line, number

__all__ = ["Equalization", "Scales", "equalize"]

#: How many outlier channels a table names.
_SHOWN = 3


@dataclass(frozen=True)
class Scales:
    """The scales of one quantizer.

    Attributes:
        quantizer: Its qualified name.
        method: In words, such as ``outliers above 1.5 medians``.
        channels: How many channels what it sees has.
        outliers: Scale by channel, of those above 1, the largest first.
    """

    quantizer: str
    method: str
    channels: int
    outliers: Mapping[int, float]


@dataclass(frozen=True, repr=False)
class Equalization(Result):
    """What :func:`equalize` did.

    Attributes:
        scales: One entry for each quantizer whose channels have scales.
        weights: How many weights were rounded anew, because their columns take the scales back.
        batches, rows, tokens: How much data it was; padding is no token.
    """

    scales: tuple[Scales, ...]
    weights: int
    batches: int
    rows: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """As plain data; ``schema`` is the version of this form."""
        return {"schema": 1, **asdict(self)}

    def _title(self) -> Line:
        data = data_words(self.batches, self.rows, self.tokens)
        return line(f"{len(self.scales)} quantizers with a scale per channel, from {data}")

    def _parts(self) -> Iterable[Part]:
        columns = (Column("quantizer"), number("channels"), number("scaled"), Column("largest scales"))
        yield Table(columns, tuple(map(_row, self.scales)))


def _row(scales: Scales) -> tuple[str, ...]:
    named = list(scales.outliers.items())[:_SHOWN]
    words = ", ".join(f"channel {channel}: {scale:.3g}" for channel, scale in named)
    return scales.quantizer, str(scales.channels), str(len(scales.outliers)), words


def equalize(qmodel: nn.Module, batches: Iterable[Mapping[str, Any]] | Statistics) -> Equalization:
    """Find the scales of all quantizers whose rule says ``axis: -1``, and round the weights that take them back anew.

    :func:`~qdq_surgery.calibration.ranges.calibrate` does so, too, with all other ranges. This is for a model whose
    other ranges are to stay. The same data gives the same scales again, whatever was set before; weights themselves are
    never changed.

    Args:
        qmodel: A converted model, alone or in DistributedDataParallel, ``torch.compile`` or a PEFT model.
        batches: Dicts of the model's arguments; or what :func:`~qdq_surgery.calibration.collect.collect` made of them.

    Returns:
        The scales, with the channels that have one.

    Raises:
        CalibrationError: No rule asks for scales, or the data cannot be used; the model is then as it was before.
        ModelError: The model is not converted.
    """
    model = unwrapped(qmodel)
    activations = {name: each for name, each in activation_quantizers(model).items() if each.scaled}
    if not activations:
        rules = plan_of(model).rules.name
        raise CalibrationError(
            f"no quantizer that is enabled has a scale per channel by the rules '{rules}'; convert by 'qdqbert-scaled' "
            "or by a target's rules, or write axis: -1 in a spec"
        )
    data = batches if isinstance(batches, Statistics) else collect(qmodel, batches, histograms=False)
    weights = {
        name: (quantizer, linear)
        for name, (quantizer, linear) in weight_quantizers(model).items()
        if linear._input_quantizer is not None and linear._input_quantizer.scaled
    }
    methods = {name: own_method(each) for name, each in activations.items()}
    found = find_ranges(model, data, activations, methods, weights)
    with all_or_nothing(model):
        set_ranges(found.values())
        set_state(model, replace(state_of(model), calibration=_record(state_of(model), found), saved_report=None))
    scales = tuple(_scales(name, found[name]) for name in activations)
    return Equalization(scales, len(weights), data.batches, data.rows, data.tokens)


def _record(state: ModelState, found: Mapping[str, FoundRange]) -> CalibrationRecord | None:
    """The record of the calibration before, with what was found now in its place."""
    if not isinstance(state.calibration, Calibration):
        return state.calibration
    ranges = state.calibration.ranges
    return replace(
        state.calibration, ranges=tuple(found[e.quantizer].how if e.quantizer in found else e for e in ranges)
    )


def _scales(name: str, found: FoundRange) -> Scales:
    scale: Tensor = channel_scale(found.amax).cpu()
    order = scale.argsort(descending=True, stable=True)
    outliers = {int(channel): float(scale[channel]) for channel in order if float(scale[channel]) > 1.0}
    return Scales(name, found.how.method, scale.numel(), outliers)
