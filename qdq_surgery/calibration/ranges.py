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
    activation_quantizers,
    collect,
    planned_name,
    unwrapped,
    weight_quantizers,
)
from qdq_surgery.errors import CalibrationError, OptionError
from qdq_surgery.numerics.range_methods import relative_error
from qdq_surgery.quantize.calibrators import (
    DEFAULT_PERCENTILE,
    METHODS,
    ChannelMseCalibrator,
    HistogramCalibrator,
    MaxCalibrator,
    choose,
)
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.rules.quant_spec import LEAST_PERCENTILE, CalibratorSpec, doubtful_percentile
from qdq_surgery.safety.transaction import all_or_nothing
from qdq_surgery.surgery.model_state import plan_of, quantizers
from qdq_surgery.text.progress import track
from qdq_surgery.text.view import Column, Line, Part, Result, Table, line, number

__all__ = [
    "CALIBRATION_ATTRIBUTE",
    "Calibration",
    "Range",
    "calibrate",
    "check_method",
    "share_ranges_found",
    "weight_range",
]

#: Where a calibrated model keeps its :class:`Calibration`.
CALIBRATION_ATTRIBUTE = "_qdq_calibration"


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
        """The same with the ranges that the model has by now: training may have moved them."""
        ranges, found = [], quantizers(qmodel)
        for each in self.ranges:
            amax = found[each.quantizer].amax
            top = each.amax if amax is None else float(amax.detach().max())
            moved = replace(each, amax=top, method=f"{each.method}, trained", error=None)
            ranges.append(each if top == each.amax else moved)
        return replace(self, ranges=tuple(ranges))

    def _title(self) -> Line:
        data = f"{self.tokens} tokens in {self.rows} rows ({self.batches} batches)"
        return line(f"{len(self.ranges)} ranges by {self.method}, from {data}")

    def _parts(self) -> Iterable[Part]:
        columns = (Column("quantizer"), Column("method", wraps=False), number("amax"), number("error"))
        errors = ("" if each.error is None else f"{100 * each.error:.3f} %" for each in self.ranges)
        rows = zip(self.ranges, errors, strict=True)
        yield Table(columns, tuple((r.quantizer, r.method, f"{r.amax:.4g}", error) for r, error in rows))


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
    model = unwrapped(qmodel)
    activations = activation_quantizers(model)
    asked = None if method is None else CalibratorSpec(method, _percentile(method, percentile))
    methods = {
        name: _own_method(each) if asked is None or _is_weight(each) else asked for name, each in activations.items()
    }
    if isinstance(batches, Statistics):
        data = batches
    else:
        data = collect(qmodel, batches, histograms=any(each.name != "max" for each in methods.values()))
    _check_statistics(data, activations)
    found: dict[str, tuple[TensorQuantizer, Tensor, Range]] = {}
    for name, quantizer in track(activations.items(), "computing ranges", len(activations)):
        found[name] = (quantizer, *_activation_range(name, quantizer, data.seen[name], methods[name]))
    for name, (quantizer, weight) in track(weight_quantizers(model).items(), "weights", None):
        found[name] = (quantizer, *weight_range(name, quantizer, weight))
    share_ranges_found(model, found)
    words = str(asked) if asked is not None else "the rules' methods"
    made = Calibration(words, tuple(each for *_, each in found.values()), data.batches, data.rows, data.tokens)
    with all_or_nothing(model):  # nothing has been changed up to here
        for quantizer, amax, _ in found.values():
            learn = quantizer.learns or (quantizer.spec is not None and quantizer.spec.learn)
            quantizer.set_range(amax)
            quantizer.learn_amax(learn)
        vars(model)[CALIBRATION_ATTRIBUTE] = made
    return made


def _is_weight(quantizer: TensorQuantizer) -> bool:
    return quantizer.provenance is not None and quantizer.provenance.role == "weight"


def check_method(method: str | None, percentile: float | None) -> None:
    """Whether there is such a method, and the percentile goes with it.

    Raises:
        OptionError: There is none, or it does not.
    """
    if method is not None and method not in METHODS:
        raise OptionError(f"unknown calibration method '{method}'; write one of {', '.join(METHODS)}")
    if percentile is not None:
        if method != "percentile":
            raise OptionError(f"percentile={percentile} goes with method='percentile' only, and method is {method!r}")
        if not 0 < percentile <= 100:
            raise OptionError(f"percentile {percentile} is outside (0, 100]; give for example 99.99")
        if percentile < LEAST_PERCENTILE:
            raise OptionError("; ".join(doubtful_percentile(percentile)))


def _percentile(method: str, percentile: float | None) -> float | None:
    if method != "percentile":
        return None
    return DEFAULT_PERCENTILE if percentile is None else percentile


def _own_method(quantizer: TensorQuantizer) -> CalibratorSpec:
    spec = quantizer.spec
    if spec is not None:
        return CalibratorSpec("max") if spec.calibrator.name == "histogram" else spec.calibrator
    # A default descriptor says at most that there is to be a histogram, and pytorch-quantization's own default with one
    # is a percentile.
    if isinstance(quantizer._calibrator, HistogramCalibrator):
        return CalibratorSpec("percentile")
    return CalibratorSpec("max")


def _check_statistics(data: Statistics, activations: Mapping[str, TensorQuantizer]) -> None:
    missing = [name for name in activations if name not in data.seen]
    if missing:
        raise CalibrationError(
            f"the statistics know nothing of {len(missing)} quantizers (first: {missing[0]}): they were collected from "
            "another model, or while these were disabled; collect them again"
        )
    for name, quantizer in activations.items():
        seen = data.seen[name]
        if (quantizer._axis is None) != (seen.amax.ndim == 0):
            raise CalibrationError(
                f"the statistics of {name} are of ranges with the shape {tuple(seen.amax.shape)}, but its axis is "
                f"{quantizer._axis}; collect them again from this model"
            )


def _activation_range(
    name: str, quantizer: TensorQuantizer, seen: Seen, calibrator: CalibratorSpec
) -> tuple[Tensor, Range]:
    if not bool((seen.amax > 0).any()):
        raise CalibrationError(
            f"{name} saw only zeros, from which no range can be found; bring data that reaches it, or disable or "
            "exclude it"
        )
    if quantizer._axis is not None and quantizer.spec is not None and quantizer.spec.calibrator.name == "mse":
        raise CalibrationError(
            f"{name} has one range for each channel of an activation, which mse is not for; write axis: null, or "
            "calibrator: max"
        )
    if quantizer._axis is not None or (seen.histogram is None and calibrator.name == "max"):
        amax, words = _limited(quantizer, seen.amax, "max")
        return amax, Range(name, words, float(amax.max()))
    if seen.histogram is None:
        raise CalibrationError(
            f"the statistics have no histogram of {name}, which {calibrator} needs; collect with histograms=True"
        )
    grid = quantizer._num_bits, quantizer._unsigned
    value, words = choose(seen.histogram, calibrator.name, calibrator.percentile, *grid)
    amax, words = _limited(quantizer, torch.tensor(value), words)
    return amax, Range(name, words, float(amax), relative_error(*seen.histogram.table(), float(amax), *grid))


def _limited(quantizer: TensorQuantizer, amax: Tensor, words: str) -> tuple[Tensor, str]:
    """At most the spec's ``max_amax``, and the method in words, which say so where it made a difference."""
    limited = quantizer.limited(amax)
    if quantizer.spec is None or torch.equal(limited, amax):
        return amax, words
    return limited, f"{words}, at most {quantizer.spec.max_amax:g}"


def weight_range(name: str, quantizer: TensorQuantizer, weight: Tensor) -> tuple[Tensor, Range]:
    """The range of a weight, by its rule's method.

    Raises:
        CalibrationError: The weight has a NaN or an infinite value.
    """
    method = _own_method(quantizer)
    calibrator: Any
    if method.name == "mse" and quantizer._axis is not None:
        axis = quantizer._axis[0] if isinstance(quantizer._axis, (tuple, list)) else quantizer._axis
        calibrator = ChannelMseCalibrator(quantizer._num_bits, axis, quantizer._unsigned, quantizer._narrow_range)
    else:
        calibrator = quantizer.fresh_calibrator(histogram=method.name != "max")
    calibrator.collect(weight.detach())
    if not bool(weight.isfinite().all()):
        raise CalibrationError(f"{name}: the weight has a NaN or an infinite value")
    if isinstance(calibrator, HistogramCalibrator):
        assert calibrator.histogram is not None
        grid = quantizer._num_bits, quantizer._unsigned
        value, words = choose(calibrator.histogram, method.name, method.percentile, *grid)
        amax = torch.tensor(value)
    else:
        amax, words = calibrator.compute_amax(), "max" if isinstance(calibrator, MaxCalibrator) else str(method)
    amax, words = _limited(quantizer, amax, words)
    return amax, Range(name, words, float(amax.max()))


def share_ranges_found(model: PreTrainedModel, found: dict[str, tuple[TensorQuantizer, Tensor, Range]]) -> None:
    """Give the quantizers of each group that the plan names the largest of their ranges, in ``found``.

    Raises:
        CalibrationError: One of them has a range for each channel, or their grids differ.
    """
    for group in plan_of(model).shared:
        members = sorted(name for name, (quantizer, *_) in found.items() if planned_name(name, quantizer) in group)
        if len(members) < 2:
            continue
        wide = [name for name in members if found[name][1].numel() > 1]
        if wide:
            raise CalibrationError(
                f"{wide[0]} has {found[wide[0]][1].numel()} ranges, one per channel, so it cannot share one with "
                f"{len(members) - 1} others; write axis: null in its spec"
            )
        grids = {(found[name][0]._num_bits, found[name][0]._unsigned) for name in members}
        if len(grids) > 1:
            raise CalibrationError(
                f"{members[0]} shares its range with quantizers of another grid, so they would have no step in common; "
                "give them the same num_bits and unsigned"
            )
        largest = torch.stack([found[name][1].reshape(()).cpu() for name in members]).max()
        for name in members:  # one limit holds for all
            largest = found[name][0].limited(largest)
        for name in members:
            quantizer, amax, made = found[name]
            words = made.method if float(amax) == float(largest) else f"{made.method}, shared"
            found[name] = (quantizer, largest.clone(), replace(made, method=words, amax=float(largest), error=None))
