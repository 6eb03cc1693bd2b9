"""What there is to say of each quantizer, from the model and from whatever results are given."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from qdq_surgery.calibration.collect import Seen, planned_name
from qdq_surgery.calibration.ranges import Calibration, Range
from qdq_surgery.checkpoint.report import calibration_of
from qdq_surgery.html_report.bars import Bars, of_channels, of_values, share_beyond
from qdq_surgery.html_report.given import Given
from qdq_surgery.numerics.range_methods import relative_error
from qdq_surgery.prove.parity import SiteCheck
from qdq_surgery.quantize.provenance import Provenance
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.sensitivity.parts import SITE, sites_of
from qdq_surgery.sensitivity.result import Cost
from qdq_surgery.surgery.model_state import quantizers
from qdq_surgery.text.layer_names import layer_in, star

__all__ = ["Card", "Figures", "calibration_now", "cards_of"]


@dataclass(frozen=True)
class Figures:
    """The numbers of one quantizer, in its tensor's units or as shares; ``None`` where nothing tells.

    Attributes:
        amax: The range, of several the largest.
        step: The distance of two neighbors, of several the largest.
        channels: How many ranges or scales there are.
        error: Squared quantization error as a share of the squares.
        clipped: Share of the values whose magnitude is beyond the range.
        largest: The largest magnitude that was seen.
        values: How many values were seen.
        alone, left, gain: Of :class:`~qdq_surgery.sensitivity.result.Cost`.
    """

    amax: float | None = None
    step: float | None = None
    channels: int = 1
    error: float | None = None
    clipped: float | None = None
    largest: float | None = None
    values: int | None = None
    alone: float | None = None
    left: float | None = None
    gain: float | None = None


@dataclass(frozen=True)
class Card:
    """One quantizer.

    Attributes:
        name: Its qualified name in the model.
        planned: The name that its plan has for it.
        site: The name with a star for the layer.
        layer: Index of the encoder layer; ``None`` outside.
        origin: Why it is there; ``None`` for one that somebody put in by hand.
        facts: Label and text, in the order in which they are read.
        bars: Its histogram, if there is one.
    """

    name: str
    planned: str
    site: str
    layer: int | None
    origin: Provenance | None
    figures: Figures
    facts: tuple[tuple[str, str], ...]
    bars: Bars | None

    @property
    def rule(self) -> str:
        """The rule's name; a dash without one."""
        return "-" if self.origin is None else self.origin.rule

    @property
    def operand(self) -> str:
        """What is quantized, such as ``matmul(q)``; a dash where nobody knows."""
        return "-" if self.origin is None else self.origin.operand

    @property
    def role(self) -> str:
        """``input`` or ``weight``."""
        return "input" if self.origin is None else self.origin.role

    @property
    def words(self) -> str:
        """All by which it can be looked for."""
        origin = () if self.origin is None else (self.origin.rule, self.origin.why, self.origin.source)
        return " ".join((self.name, self.site, self.role, self.operand, *origin)).lower()

    def to_json(self) -> dict[str, Any]:
        """What the page shows of it."""
        made = {"name": self.name, "site": self.site, "layer": self.layer, "facts": self.facts}
        return {**made, "figures": vars(self.figures), "bars": None if self.bars is None else vars(self.bars)}


@dataclass(frozen=True)
class _Known:
    """What the results say, by quantizer."""

    ranges: Mapping[str, Range] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)
    checks: Mapping[str, SiteCheck] = field(default_factory=dict)


def calibration_now(model: PreTrainedModel) -> Calibration | None:
    """What the model's last calibration did, with the ranges as they are now."""
    found = calibration_of(model)
    now = None if found is None else found.now(model)
    return now if isinstance(now, Calibration) else None


def cards_of(model: PreTrainedModel, given: Given) -> tuple[Card, ...]:
    """One for each quantizer, in the order of the model."""
    found, calibration = quantizers(model), calibration_now(model)
    costs = () if given.sensitivity is None else given.sensitivity.of(SITE)
    parity = given.parity or (None if given.export is None else given.export.parity)
    checks = [] if parity is None else [site for check in parity.checks for site in check.sites]
    known = _Known(
        {} if calibration is None else {each.quantizer: each for each in calibration.ranges},
        {cost.name: cost for cost in costs},
        {each.quantizer: each for each in sorted(checks, key=lambda each: (each.wrong, each.ties))},
    )
    layers = {name: None if site is None else site.layer for name, site in sites_of(model, found).items()}
    return tuple(_card(name, each, layers[name], given, known) for name, each in found.items())


def _card(name: str, quantizer: TensorQuantizer, layer: int | None, given: Given, known: _Known) -> Card:
    planned = planned_name(name, quantizer)
    seen = None if given.statistics is None else given.statistics.seen.get(name)
    layer = layer_in(name) if layer is None and quantizer.provenance is None else layer
    figures = _figures(quantizer, seen, known.ranges.get(name), known.costs.get(name))
    words = dict(_facts(name, quantizer, figures, given, known))
    return Card(
        name,
        planned,
        star(name, layer),
        layer,
        quantizer.provenance,
        figures,
        tuple(words.items()),
        _bars(quantizer, seen),
    )


def _figures(quantizer: TensorQuantizer, seen: Seen | None, how: Range | None, cost: Cost | None) -> Figures:
    amax, step = quantizer.amax, quantizer.step_size
    scale = quantizer.channel_scale
    if amax is not None and scale is not None:
        step = quantizer.grid.step(amax.detach().flatten() / scale)
    top = None if amax is None else float(amax.detach().max())
    histogram = None if seen is None or amax is None or amax.numel() > 1 else seen.histogram
    error, clipped = None if how is None else how.error, None
    if histogram is not None and top is not None and math.isfinite(top):
        error = relative_error(*histogram.table(), top, quantizer.grid)
        clipped = share_beyond(histogram, top)
    return Figures(
        amax=_finite(top),
        step=None if step is None else _finite(float(step.detach().max())),
        channels=1 if amax is None else amax.numel(),
        error=_finite(error),
        clipped=clipped,
        largest=None if seen is None else _finite(float(seen.amax.max())),
        values=None if seen is None or seen.histogram is None else seen.histogram.total,
        alone=None if cost is None else _finite(cost.alone),
        left=None if cost is None else _finite(cost.left),
        gain=None if cost is None else _finite(cost.gain),
    )


def _finite(value: float | None) -> float | None:
    """A number that JSON has."""
    return value if value is not None and math.isfinite(value) else None


def _bars(quantizer: TensorQuantizer, seen: Seen | None) -> Bars | None:
    amax = quantizer.amax
    if seen is not None and seen.histogram is not None:
        return of_values(seen.histogram, None if amax is None or amax.numel() > 1 else _finite(float(amax.detach())))
    if quantizer.scaled and seen is not None:
        mark = None if amax is None else _finite(float(amax.detach().min()))
        return of_channels(seen.amax, f"the largest magnitudes of {seen.amax.numel():,} channels", mark)
    if amax is not None and amax.numel() > 1:
        return of_channels(amax, f"the ranges of {amax.numel():,} channels")
    return None


def _facts(
    name: str, quantizer: TensorQuantizer, figures: Figures, given: Given, known: _Known
) -> Iterator[tuple[str, str]]:
    origin = quantizer.provenance
    if origin is not None:
        yield "rule", f"{origin.rule} of {origin.rules}"
        yield "why", origin.why
        if origin.declared:
            yield "declared at", origin.declared
        yield "operand", f"{origin.operand} at {origin.source}"
        yield "asked for", origin.descriptor
    if not quantizer.enabled:
        yield "state", "disabled: values pass as they are"
    yield "integers", str(quantizer.grid)
    yield from _range_facts(quantizer, figures, known.ranges.get(name))
    if figures.error is not None:
        yield "error", f"{100 * figures.error:.4g} % of the squares"
    if figures.clipped is not None:
        yield "clipped", f"{100 * figures.clipped:.3g} % of {figures.values:,} values"
    if figures.largest is not None:
        yield "largest seen", f"{figures.largest:.4g}"
    yield from _measured_facts(name, given, known)


def _range_facts(quantizer: TensorQuantizer, figures: Figures, how: Range | None) -> Iterator[tuple[str, str]]:
    amax = quantizer.amax
    if amax is None:
        yield "range", "none yet: it is found anew for each tensor, until the model is calibrated"
        return
    if figures.amax is None or figures.step is None:
        yield "range", f"{float(amax.detach().max())}, with which it gives nothing: calibrate the model again"
        return
    if figures.channels > 1:
        low, high = (float(each) for each in torch.aminmax(amax.detach()))
        spread = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        yield "range", f"{spread}, one for each of {figures.channels} channels"
    else:
        yield "range", f"{figures.amax:.6g}, one for the tensor"
    what = "one step, and a scale for each channel" if quantizer.scaled else "the largest" * (figures.channels > 1)
    yield "step", f"{figures.step:.4g}{', ' if what else ''}{what}"
    if how is not None:
        yield "found by", how.method
    if quantizer.learns:
        yield "trained", "the range is a parameter"


def _measured_facts(name: str, given: Given, known: _Known) -> Iterator[tuple[str, str]]:
    cost = known.costs.get(name)
    if cost is not None and given.sensitivity is not None:
        yield "in INT8 alone", f"{given.sensitivity.metric} {cost.alone:.3g} at the output"
        yield "in float alone", f"{given.sensitivity.metric} {cost.left:.3g}, a gain of {cost.gain:.3g}"
        if cost.outliers:
            yield "outliers", ", ".join(f"channel {at} ({ratio:.3g} x)" for at, ratio in cost.outliers.items())
    for scales in () if given.equalization is None else given.equalization.scales:
        if scales.quantizer == name:
            yield "scaled", f"{len(scales.outliers)} of {scales.channels} channels, {scales.method}"
    for weight in () if given.rounding is None else given.rounding.weights:
        if weight.quantizer == name:
            yield "rounding", f"error of the product {100 * weight.nearest:.4f} % to the nearest"
            yield "adapted", f"{100 * weight.adapted:.4f} %, {100 * weight.moved:.1f} % of the values moved"
    check = known.checks.get(name)
    if check is not None:
        same = "agrees" if not check.wrong else f"{check.wrong:,} differ, by up to {check.worst:.3g} steps"
        yield "on the runtime", f"{same}; {check.ties:,} ties of {check.elements:,} values"
    findings = given.findings or (None if given.export is None else given.export.findings)
    for number, finding in enumerate(() if findings is None else findings.of(name)):
        yield f"lint {number + 1}", f"{finding.verdict} {finding.fusion}: {finding.reason}"
