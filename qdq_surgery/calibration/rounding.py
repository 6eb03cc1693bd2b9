"""Weights rounded so that products keep, instead of each value to the nearest integer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdq_surgery.calibration.collect import Statistics, activation_quantizers, collect, unwrapped, weight_quantizers
from qdq_surgery.errors import CalibrationError
from qdq_surgery.numerics.adaptive_rounding import adapted_integers, product_error
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.safety.transaction import all_or_nothing
from qdq_surgery.text.progress import track
from qdq_surgery.text.view import Column, Line, Part, Result, Table, data_words, line, number

__all__ = ["RoundedWeight", "Rounding", "round_weights"]

#: The most steps that int8 holds.
_FARTHEST = 127


@dataclass(frozen=True)
class RoundedWeight:
    """The rounding of one weight.

    Attributes:
        quantizer: Its qualified name.
        nearest: Squared error of the product with each value at the nearest integer, as a share of the product's
            squares; over the calibration's tokens.
        adapted: The same with the rounding that it has now; the same number where none was better.
        moved: The share of its values that are not at the nearest integer.
    """

    quantizer: str
    nearest: float
    adapted: float
    moved: float


@dataclass(frozen=True, repr=False)
class Rounding(Result):
    """What :func:`round_weights` did.

    Attributes:
        weights: One entry for each weight.
        left: Weights that are rounded to the nearest, because no quantizer sees what they are multiplied with.
        batches, rows, tokens: How much data it was; padding is no token.
    """

    weights: tuple[RoundedWeight, ...]
    left: tuple[str, ...]
    batches: int
    rows: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """As plain data; ``schema`` is the version of this form."""
        return {"schema": 1, **asdict(self)}

    def _title(self) -> Line:
        data = data_words(self.batches, self.rows, self.tokens)
        return line(f"{len(self.weights)} weights rounded for their products, from {data}")

    def _parts(self) -> Iterable[Part]:
        columns = (Column("quantizer"), number("error, nearest"), number("error, adapted"), number("values moved"))
        yield Table(columns, tuple(map(_row, self.weights)))
        if self.left:
            yield f"{len(self.left)} weights are rounded to the nearest, as no quantizer sees their linear's input:"
            yield from (f"  {name}" for name in self.left)


def _row(each: RoundedWeight) -> tuple[str, ...]:
    return each.quantizer, f"{100 * each.nearest:.4f} %", f"{100 * each.adapted:.4f} %", f"{100 * each.moved:.1f} %"


def round_weights(qmodel: nn.Module, batches: Iterable[Mapping[str, Any]] | Statistics) -> Rounding:
    """Choose the integers of linears' weights by what their products lose, on data (GPTQ, arXiv 2210.17323).

    Rounding each value to the nearest integer is best for the value; for the product it is not, since errors add up
    where inputs go together. Here a value may go further, to take back what others cost. Only the rounding changes:
    weights, ranges and scales stay, and a runtime runs the same operators on other integers. The quantizer keeps how
    many steps each value is moved by (int8, as large as the weight), also in a checkpoint.

    Call it last: a range that is set anew, as :func:`~qdq_surgery.calibrate`, :func:`~qdq_surgery.equalize` and
    :func:`~qdq_surgery.recalibrate_weights` do, is rounded to the nearest again. It holds for the weights as they are:
    after training, or when adapters were merged into them, call it or :func:`~qdq_surgery.recalibrate_weights` again.

    Args:
        qmodel: A calibrated model, alone or in DistributedDataParallel, ``torch.compile`` or a PEFT model.
        batches: Dicts of the model's arguments; or what :func:`~qdq_surgery.collect` made of them with
            ``moments=True``, which :func:`~qdq_surgery.calibrate` can have, too: one pass then does for both. There
            should be several times as many tokens as the widest linear has inputs.

    Returns:
        The error of each weight's product before and after, on this data.

    Raises:
        CalibrationError: The model is not calibrated, or the data cannot be used; the model is then as it was before.
        ModelError: The model is not converted.
    """
    model = unwrapped(qmodel)
    # (What an embedding looks up is multiplied by nothing: nearest is best.)
    weights = {n: (q, each) for n, (q, each) in weight_quantizers(model).items() if isinstance(each, QuantLinear)}
    names = {id(each): name for name, each in activation_quantizers(model).items()}
    inputs = {name: names.get(id(linear._input_quantizer)) for name, (_, linear) in weights.items()}
    if not any(inputs.values()):
        raise CalibrationError("no linear has a quantizer on its weight and one on its input that are both enabled")
    without = [name for name, (quantizer, _) in weights.items() if inputs[name] is not None and quantizer.amax is None]
    if without:
        raise CalibrationError(f"{without[0]} has no range to round by; calibrate the model first")
    data = batches if isinstance(batches, Statistics) else collect(qmodel, batches, histograms=False, moments=True)
    found: dict[str, tuple[Tensor | None, RoundedWeight]] = {}
    for name, (quantizer, linear) in track(weights.items(), "rounding weights", len(weights)):
        source = inputs[name]
        if source is not None:
            with torch.autocast(linear.weight.device.type, enabled=False):
                found[name] = _rounded(name, quantizer, linear, _moments(data, source, linear.in_features))
    with all_or_nothing(model):
        for name, (steps, _) in found.items():
            weights[name][0].set_rounding(steps)
    left = tuple(name for name, source in inputs.items() if source is None)
    return Rounding(tuple(each for _, each in found.values()), left, data.batches, data.rows, data.tokens)


def _moments(data: Statistics, name: str, channels: int) -> Tensor:
    seen = data.seen.get(name)
    if seen is None or seen.moments is None or len(seen.moments) != channels:
        raise CalibrationError(
            f"the statistics have no moments of {name}, by which the weight behind it is rounded; collect them from "
            "this model with moments=True"
        )
    return seen.moments


def _rounded(
    name: str, quantizer: TensorQuantizer, linear: QuantLinear, moments: Tensor
) -> tuple[Tensor | None, RoundedWeight]:
    """The steps that each value is moved by, ``None`` where nearest is best; and what that does."""
    weight, scale = linear.weight.detach().float(), linear.channel_scale
    moments = moments.to(weight.device)
    if scale is not None:
        weight, moments = weight * scale, moments / (scale[:, None] * scale)
    step, grid = quantizer.step_size, quantizer.grid
    assert step is not None
    step, nearest = step.detach(), quantizer.integers(weight)
    unclipped = torch.where(step > 0, weight / step, 0.0).round()
    lowest = grid.full.qmin if quantizer.use_fb_fake_quant else grid.qmin
    wanted = adapted_integers(weight, moments, step, lowest, grid.qmax)
    # (A value beyond the range is moved from where it is.)
    steps = (wanted - unclipped).clamp(-_FARTHEST, _FARTHEST)
    steps = torch.where(wanted == nearest, 0.0, steps)
    both = nearest, quantizer.integers(weight + steps * step)
    before, after = (product_error(each * step - weight, weight, moments) for each in both)
    if not after < before:
        return None, RoundedWeight(name, before, before, 0.0)
    return steps.to(torch.int8), RoundedWeight(name, before, after, float((steps != 0).float().mean()))
