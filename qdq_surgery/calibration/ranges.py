"""From statistics to ranges, all of them or none: each by its rule's method or by one for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdq_surgery.calibration.collect import (
    Seen,
    Statistics,
    Weighted,
    activation_quantizers,
    collect,
    planned_name,
    unwrapped,
    weight_quantizers,
)
from qdq_surgery.errors import CalibrationError, ModelError, OptionError
from qdq_surgery.numerics.channel_scales import channel_scale
from qdq_surgery.numerics.range_choice import check_method_name, choose, takes_percentile
from qdq_surgery.numerics.range_methods import DEFAULT_PERCENTILE, relative_error
from qdq_surgery.numerics.real_numbers import is_number
from qdq_surgery.quantize.calibrators import HistogramCalibrator
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.rules.quant_spec import LEAST_PERCENTILE, CalibratorSpec, doubtful_percentile
from qdq_surgery.safety.transaction import all_or_nothing
from qdq_surgery.surgery.model_state import plan_of, quantizers, set_state, state_of
from qdq_surgery.text.progress import track
from qdq_surgery.text.view import Column, Line, Part, Result, Table, data_words, line, number

__all__ = [
    "Calibration",
    "FoundRange",
    "Range",
    "calibrate",
    "check_method",
    "find_ranges",
    "own_method",
    "set_ranges",
    "share_ranges_found",
    "weight_range",
]


#: After the method of a weight that is rounded for its product.
_ADAPTED = ", adapted rounding"


@dataclass(frozen=True)
class Range:
    """How one quantizer got its range.

    Attributes:
        quantizer: Its qualified name.
        method: In words: ``max``, ``99.99 %``, ``entropy``, ``mse``; after a comma what was done to it then.
        amax: The range, of several the largest.
        error: Squared quantization error as a share of the squares; ``None`` where there is no histogram.
    """

    quantizer: str
    method: str
    amax: float
    error: float | None = None


@dataclass(frozen=True)
class FoundRange:
    """A range that was computed, and not set yet.

    Attributes:
        quantizer: Whose it is.
        amax: (), or one for each channel with 1 in every other axis.
        how: The record of it.
    """

    quantizer: TensorQuantizer
    amax: Tensor
    how: Range


@dataclass(frozen=True, repr=False)
class Calibration(Result):
    """What a calibration did.

    Attributes:
        method: What was asked for.
        ranges: One for each quantizer, activations first.
        batches, rows, tokens: How much data it was; padding is no token.
    """

    method: str
    ranges: tuple[Range, ...]
    batches: int
    rows: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        data = {"method": self.method, "batches": self.batches, "rows": self.rows, "tokens": self.tokens}
        return {"schema": 1, **data, "ranges": [vars(each) for each in self.ranges]}

    def now(self, qmodel: nn.Module) -> Calibration:
        """The same with the ranges that the model has by now: training may have moved them, and weights be rounded."""
        found = quantizers(qmodel)
        kept = (each for each in self.ranges if each.quantizer in found)  # of layers that were taken out, none
        return replace(self, ranges=tuple(_now(each, found[each.quantizer]) for each in kept))

    def _title(self) -> Line:
        data = data_words(self.batches, self.rows, self.tokens)
        return line(f"{len(self.ranges)} ranges by {self.method}, from {data}")

    def _parts(self) -> Iterable[Part]:
        columns = (Column("quantizer"), Column("method", wraps=False), number("amax"), number("error"))
        errors = ("" if each.error is None else f"{100 * each.error:.3f} %" for each in self.ranges)
        rows = zip(self.ranges, errors, strict=True)
        yield Table(columns, tuple((r.quantizer, r.method, f"{r.amax:.4g}", error) for r, error in rows))


def _now(known: Range, quantizer: TensorQuantizer) -> Range:
    method = known.method.removesuffix(_ADAPTED)
    if quantizer.amax is not None and quantizer.amax.is_meta:
        raise ModelError(f"the range of {known.quantizer} has no data (meta device); load the model with its weights")
    top = known.amax if quantizer.amax is None else float(quantizer.amax.detach().max())
    if top != known.amax:
        known, method = replace(known, amax=top, error=None), f"{method}, trained"
    return replace(known, method=method if quantizer.rounding is None else method + _ADAPTED)


def calibrate(
    qmodel: nn.Module,
    batches: Iterable[Mapping[str, Any]] | Statistics,
    method: str | None = None,
    *,
    percentile: float | None = None,
) -> Calibration:
    """Give every enabled quantizer of a converted model its range: all of them or, if anything goes wrong, none.

    Args:
        qmodel: A converted model, alone or in DistributedDataParallel, ``torch.compile`` or a PEFT model.
        batches: Dicts of the model's arguments; or what :func:`~qdq_surgery.calibration.collect.collect` made of them.
        method: For all activations with one range per tensor: ``max``, ``percentile``, ``entropy``, ``mse``, or
            ``best``: of max, 99.9, 99.99, 99.999 %, entropy and mse, the one with the smallest squared quantization
            error. Left out, each by its rule; rules that leave it open mean ``max``, or 99.99 % where the default
            descriptor asks for a histogram. Weights are always found by their rule, from the weights as they are now.
        percentile: In percent, with ``method="percentile"``; 99.99 if left out.

    Returns:
        What was done, also kept in the model for its report.

    Raises:
        CalibrationError: The data cannot be used; the model is then as it was before.
        ModelError: The model is not converted.
        OptionError: The method or the percentile is none; a ValueError, too.
    """
    check_method(method, percentile)
    percentile = None if percentile is None else float(percentile)
    model = unwrapped(qmodel)
    activations = activation_quantizers(model)
    asked = None if method is None else CalibratorSpec(method, _percentile(method, percentile))
    methods = {
        name: own_method(each) if asked is None or each.role == "weight" else asked
        for name, each in activations.items()
    }
    if isinstance(batches, Statistics):
        data = batches
    else:
        data = collect(qmodel, batches, histograms=any(each.is_histogram for each in methods.values()))
    found = find_ranges(model, data, activations, methods, weight_quantizers(model))
    share_ranges_found(model, found)
    words = str(asked) if asked is not None else "the rules' methods"
    made = Calibration(words, tuple(each.how for each in found.values()), data.batches, data.rows, data.tokens)
    with all_or_nothing(model):  # nothing has been changed up to here
        set_ranges(found.values())
        set_state(model, replace(state_of(model), calibration=made, saved_report=None))
    return made


def find_ranges(
    model: nn.Module,
    data: Statistics,
    activations: Mapping[str, TensorQuantizer],
    methods: Mapping[str, CalibratorSpec],
    weights: Mapping[str, tuple[TensorQuantizer, Weighted]],
) -> dict[str, FoundRange]:
    """The ranges of ``activations`` from the statistics, then those of ``weights`` from the modules.

    A weight is rounded after its columns took the scales of its input, the new ones where they are found here.

    Args:
        methods: For each activation.

    Raises:
        CalibrationError: A range cannot be found; names the quantizer.
    """
    _check_statistics(data, activations, model)
    found: dict[str, FoundRange] = {}
    linears = {id(each._input_quantizer): each for each in model.modules() if isinstance(each, QuantLinear)}
    for name, quantizer in track(activations.items(), "computing ranges", len(activations)):
        found[name] = _activation_range(name, quantizer, data.seen[name], methods[name], linears.get(id(quantizer)))
    scales = {id(each.quantizer): channel_scale(each.amax) for each in found.values() if each.quantizer.scaled}
    for name, (quantizer, module) in track(weights.items(), "weights", None):
        scale = scales.get(id(module._input_quantizer), module.channel_scale)
        found[name] = weight_range(name, quantizer, module.weight, scale)
    return found


def set_ranges(found: Iterable[FoundRange]) -> None:
    """Give the quantizers what was found for them; a range that is learned, or is to be by its rule, is a parameter."""
    for each in found:
        quantizer = each.quantizer
        learn = quantizer.learns or (quantizer.spec is not None and quantizer.spec.learn)
        quantizer.set_range(each.amax)
        quantizer.learn_amax(learn)


def check_method(method: str | None, percentile: float | None) -> None:
    """Whether there is such a method, and the percentile goes with it.

    Raises:
        OptionError: There is none, or it does not.
    """
    if method is not None:
        check_method_name(method)
    if percentile is not None:
        if not takes_percentile(method):
            raise OptionError(f"percentile={percentile} goes with method='percentile' only, and method is {method!r}")
        if not is_number(percentile) or not 0 < percentile <= 100:
            raise OptionError(f"percentile {percentile!r} is outside (0, 100]; give for example 99.99")
        if percentile < LEAST_PERCENTILE:
            raise OptionError("; ".join(doubtful_percentile(percentile)))


def _percentile(method: str, percentile: float | None) -> float | None:
    return DEFAULT_PERCENTILE if percentile is None and takes_percentile(method) else percentile


def own_method(quantizer: TensorQuantizer) -> CalibratorSpec:
    """The method of a quantizer's rule, or of its descriptor where the rule leaves it open."""
    spec = quantizer.spec
    if spec is not None:
        return CalibratorSpec("max") if spec.calibrator.name == "histogram" else spec.calibrator
    # A default descriptor says at most that there is to be a histogram, and pytorch-quantization's own default with one
    # is a percentile.
    if isinstance(quantizer._calibrator, HistogramCalibrator):
        return CalibratorSpec("percentile")
    return CalibratorSpec("max")


def _check_statistics(data: Statistics, activations: Mapping[str, TensorQuantizer], model: nn.Module) -> None:
    missing = [name for name in activations if name not in data.seen]
    if missing:
        raise CalibrationError(
            f"the statistics know nothing of {len(missing)} quantizers (first: {missing[0]}): they were collected from "
            "another model, or while these were disabled; collect them again"
        )
    modules = {name for name, _ in model.named_modules()}
    beyond = [name for name in data.seen if name.rpartition(".")[0] not in modules]
    if beyond:
        raise CalibrationError(
            f"the statistics are of another model: this {type(model).__name__} has no {beyond[0].rpartition('.')[0]}, "
            f"and they know {beyond[0]}; collect them from this model"
        )
    for name, quantizer in activations.items():
        seen = data.seen[name]
        if (quantizer._axis is None) != (seen.amax.ndim == 0):
            raise CalibrationError(
                f"the statistics of {name} are of ranges with the shape {tuple(seen.amax.shape)}, but its axis is "
                f"{quantizer._axis}; collect them again from this model"
            )
        if quantizer.grid.zero_point and seen.lowest is None:
            raise CalibrationError(
                f"the statistics of {name} do not know how far its values reach below 0, as its grid with a zero point "
                "needs; collect them again from this model"
            )


def _activation_range(
    name: str, quantizer: TensorQuantizer, seen: Seen, calibrator: CalibratorSpec, linear: QuantLinear | None
) -> FoundRange:
    if not bool((seen.amax > 0).any()):
        raise CalibrationError(
            f"{name} saw only zeros, from which no range can be found; bring data that reaches it, or disable or "
            "exclude it"
        )
    own = None if quantizer.spec is None else quantizer.spec.calibrator
    if own is not None and quantizer.scaled:
        weight_tops = None if linear is None else linear.weight.detach().float().abs().amax(0)
        tops = seen.needed.reshape(-1)
        if weight_tops is not None and len(tops) != len(weight_tops):
            raise CalibrationError(
                f"the statistics of {name} are of {len(tops)} channels, and its linear has {len(weight_tops)} inputs; "
                "collect them from this model"
            )
        amax = own.channel_ranges(tops, None if weight_tops is None else weight_tops.to(tops.device))
        assert own.scale_method is not None
        return _found(name, quantizer, amax, own.scale_method.words.format(value=own.scale_value))
    if quantizer.axes is not None and own is not None and own.by_channel:
        raise CalibrationError(
            f"{name} has one range for each channel of an activation, which {own.name} is not for; write axis: null, "
            "or calibrator: max"
        )
    if quantizer.axes is not None or (seen.histogram is None and not calibrator.is_histogram):
        return _found(name, quantizer, seen.needed, "max")
    if seen.histogram is None:
        raise CalibrationError(
            f"the statistics have no histogram of {name}, which {calibrator} needs; collect with histograms=True"
        )
    value, words = choose(seen.histogram, calibrator.name, quantizer.grid, percentile=calibrator.percentile)
    found = _found(name, quantizer, torch.tensor(seen.reaching(value)), words)
    error = relative_error(*seen.histogram.table(), found.how.amax, quantizer.grid)
    return replace(found, how=replace(found.how, error=error))


def _found(name: str, quantizer: TensorQuantizer, amax: Tensor, words: str) -> FoundRange:
    """A range, at most the spec's ``max_amax``; the method in words says so where it made a difference."""
    limited = quantizer.limited(amax)
    if quantizer.spec is not None and not torch.equal(limited, amax):
        words = f"{words}, at most {quantizer.spec.max_amax:g}"
    return FoundRange(quantizer, limited, Range(name, words, float(limited.max())))


def weight_range(name: str, quantizer: TensorQuantizer, weight: Tensor, scale: Tensor | None = None) -> FoundRange:
    """The range of a weight, by its rule's method.

    Args:
        scale: (in_features,), by which its columns are multiplied before they are rounded.

    Raises:
        CalibrationError: The weight has a NaN or an infinite value.
    """
    if not bool(weight.isfinite().all()):
        raise CalibrationError(f"{name}: the weight has a NaN or an infinite value")
    if scale is not None:
        weight = weight.detach().float() * scale.to(weight.device)
    method = own_method(quantizer)
    if quantizer.axes is not None and method.by_channel is not None:
        amax = method.by_channel(weight.detach(), quantizer.axes[0], quantizer.grid)
        return _found(name, quantizer, amax, str(method))
    calibrator = quantizer.fresh_calibrator(histogram=method.is_histogram)
    calibrator.collect(weight.detach())
    if isinstance(calibrator, HistogramCalibrator):
        assert calibrator.histogram is not None
        value, words = choose(calibrator.histogram, method.name, quantizer.grid, percentile=method.percentile)
        return _found(name, quantizer, torch.tensor(value), words)
    largest = calibrator.compute_amax()
    assert largest is not None
    return _found(name, quantizer, largest, "max")


def share_ranges_found(model: PreTrainedModel, found: dict[str, FoundRange]) -> None:
    """Give the quantizers of each group that the plan names the largest of their ranges, in ``found``.

    Raises:
        CalibrationError: One of them has a range for each channel, or their grids differ.
    """
    for group in plan_of(model).shared:
        members = sorted(name for name, each in found.items() if planned_name(name, each.quantizer) in group)
        if len(members) < 2:
            continue
        wide = [name for name in members if found[name].amax.numel() > 1]
        if wide:
            raise CalibrationError(
                f"{wide[0]} has {found[wide[0]].amax.numel()} ranges, one per channel, so it cannot share one with "
                f"{len(members) - 1} others; write axis: null in its spec"
            )
        grids = {found[name].quantizer.grid.full for name in members}
        if len(grids) > 1:
            raise CalibrationError(
                f"{members[0]} shares its range with quantizers of another grid, so they would have no step in common; "
                "give them the same num_bits and unsigned"
            )
        largest = torch.stack([found[name].amax.reshape(()).cpu() for name in members]).max()
        for name in members:  # one limit holds for all
            largest = found[name].quantizer.limited(largest)
        for name in members:
            how = found[name].how
            words = how.method if how.amax == float(largest) else f"{how.method}, shared"
            how = replace(how, method=words, amax=float(largest), error=None)
            found[name] = replace(found[name], amax=largest.clone(), how=how)
