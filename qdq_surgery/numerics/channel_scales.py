"""A scale for each channel of an activation: what lets one step serve channels that differ by a hundred times.

Encoders have a few channels that are 20 to 100 times as large as the others (outlier channels: arXiv 2109.12948). With
one step for all, that step is theirs, and the others are lost. So each channel is divided by a number ``m`` of its own
before it is rounded, and what comes behind takes ``m`` back: the columns of a linear's weight, which are multiplied by
it before they are rounded, or a product behind the pair. Nothing is added to a linear's cost, and without rounding
nothing changes.

Such a scale and the range are one vector: the range of each channel is ``m`` times the range of what is rounded. So a
method here goes from each channel's largest magnitude to each channel's range, and ``m`` is that over the smallest.

What else there is to know of a method stands in :data:`SCALE_METHODS`; a new one is a function and its entry.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SCALE_METHODS", "ScaleMethod", "channel_scale", "outlier_ranges", "smooth_ranges"]

#: Ranges of one tensor differ by at most this: a channel that was 0 in all data has one, too.
_WIDEST = 2.0**20

#: What the logarithm of a number that is a power already may be too large by.
_EXACT = 1e-6


def outlier_ranges(tops: Tensor, _: Tensor | None = None, threshold: float = 1.5) -> Tensor:
    """Ranges that only outlier channels have of their own; all others share the range of the threshold.

    Their scale is 1, that of an outlier ``top / (threshold * median of the tops)``, rounded up to a power of the square
    root of 2. So no scale is close to 1: OpenVINO takes ranges that differ by a few percent for equal.

    Args:
        tops: (channels,), each channel's largest magnitude; at least one is above 0.
        threshold: How many times as large as the median channel, of those above 0, an outlier is.

    Returns:
        (channels,), float32, all above 0.
    """
    middle = tops[tops > 0].median() * threshold
    # Where no channel is so large, one range for all does not have to be larger than the largest of them.
    # (And a median that is next to nothing would make an infinite scale.)
    lowest = torch.minimum(middle, tops.max()).float().clamp(min=_least(tops))
    halves = (2.0 * (tops.float() / lowest).clamp(min=1.0).log2() - _EXACT).ceil()
    return _above_zero(lowest * (halves / 2.0).exp2())


def smooth_ranges(tops: Tensor, weight_tops: Tensor | None = None, alpha: float = 0.5) -> Tensor:
    """Ranges by which activations and weights share the difficulty (SmoothQuant, arXiv 2211.10438).

    The scale of a channel is ``top^alpha / weight top^(1 - alpha)``; without a weight ``top^alpha``.

    Args:
        tops: (channels,), each channel's largest magnitude.
        weight_tops: (channels,), the largest magnitude of each column of the weight.
        alpha: 0 leaves all to the activation, 1 to the weight.
    """
    known = _above_zero(tops)
    scale = known**alpha
    if weight_tops is not None:
        scale = scale / _above_zero(weight_tops) ** (1.0 - alpha)
    return _above_zero(scale * (known / scale).max())


def max_ranges(tops: Tensor, _: Tensor | None = None) -> Tensor:
    """Each channel's own largest magnitude: all channels become equally large."""
    return _above_zero(tops)


def channel_scale(ranges: Tensor) -> Tensor:
    """``m`` from each channel's range, same shape: 1 for the smallest, above 1 for the others."""
    return ranges / ranges.min()


def _above_zero(values: Tensor) -> Tensor:
    values = values.float()
    return values.clamp(min=_least(values))


def _least(values: Tensor) -> float:
    return max(float(values.max()) / _WIDEST, torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class ScaleMethod:
    """One way from the channels' largest magnitudes to their ranges.

    Attributes:
        find: From ``tops``, ``weight_tops`` and the method's option to ranges, all of the shape (channels,).
        words: What reports call it, a format of its option.
        option: The name of its option, if it has one; as in :class:`~qdq_surgery.rules.quant_spec.CalibratorSpec`.
        limits: What the option may be.
    """

    find: Callable[..., Tensor]
    words: str
    option: str | None = None
    limits: tuple[float, float] = (0.0, 0.0)

    def default(self) -> Any:
        """What the option is where it is left out; ``None`` without an option."""
        return None if self.option is None else inspect.signature(self.find).parameters[self.option].default


#: The methods for ``axis: -1``, by the name of their calibrator.
SCALE_METHODS: dict[str, ScaleMethod] = {
    "max": ScaleMethod(max_ranges, "max by channel"),
    "outliers": ScaleMethod(outlier_ranges, "outliers above {value:g} medians", "threshold", (1.0, 1000.0)),
    "smooth": ScaleMethod(smooth_ranges, "smooth, alpha {value:g}", "alpha", (0.0, 1.0)),
}
