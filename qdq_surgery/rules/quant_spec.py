"""How a tensor is quantized, as frozen, typed data that checks itself: bits, axis, calibrator, limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qdq_surgery.errors import RuleFileError
from qdq_surgery.numerics.channel_scales import SCALE_METHODS, ScaleMethod
from qdq_surgery.numerics.grid import Grid
from qdq_surgery.numerics.range_choice import RANGE_METHODS, method_names, takes_percentile

__all__ = ["LAST_AXIS", "LEAST_PERCENTILE", "CalibratorSpec", "QuantSpec", "calibrator_names", "doubtful_percentile"]

#: Below it most values would be cut off: nobody wants that, and whoever writes it means a share, or the other end.
LEAST_PERCENTILE = 50.0

#: The ``axis`` of an activation whose channels have a scale each, see :mod:`~qdq_surgery.numerics.channel_scales`.
LAST_AXIS = -1

#: What ``max_amax`` may be. A range up to 2^-24 counts as 0, so that a limit there would set everything to 0; from
#: 2^-23 to 2^126 both the steps of a grid of 16 bits and their reciprocals are normal numbers in float32.
_MAX_AMAX = 2.0**-23, 2.0**126


def doubtful_percentile(percentile: float) -> tuple[str, str]:
    """What is wrong with a percentile below :data:`LEAST_PERCENTILE`, and what was meant."""
    # 0.9999 is a share, 0.01 is what is to be cut off.
    meant = percentile * 100 if LEAST_PERCENTILE / 100 < percentile <= 1 else 100 - percentile
    found = f"percentile {percentile:g} would cut off {100 - percentile:g} % of the values"
    return found, f"did you mean {meant:.6g}?"


def calibrator_names() -> tuple[str, ...]:
    """What a rule file may write.

    The range methods, ``best``, ``histogram``, which leaves it to the caller, and the methods for a scale per channel.
    """
    first, *others = method_names()
    return (first, "histogram", *others, *(name for name in SCALE_METHODS if name != first))


@dataclass(frozen=True)
class CalibratorSpec:
    """How a range is found from data.

    Attributes:
        name: One of :func:`calibrator_names`.
        percentile: In percent, (0, 100]; only for ``percentile``.
        num_bins: How many bins at least lie between 0 and the largest magnitude; only for the histogram methods.
        threshold: From how many times the median channel a channel is an outlier; only for ``outliers``.
        alpha: How much of a channel's size its scale takes, [0, 1]; only for ``smooth``.
    """

    name: str = "max"
    percentile: float | None = None
    num_bins: int | None = None
    threshold: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.name not in calibrator_names():
            raise RuleFileError(f"unknown calibrator '{self.name}'", f"write one of {', '.join(calibrator_names())}")
        if self.percentile is not None:
            if not takes_percentile(self.name):
                raise RuleFileError(
                    f"calibrator '{self.name}' takes no percentile", "remove it, or write name: percentile"
                )
            if not 0 < self.percentile <= 100:
                raise RuleFileError(f"percentile {self.percentile} is outside (0, 100]", "write for example 99.99")
            if self.percentile < LEAST_PERCENTILE:
                raise RuleFileError(*doubtful_percentile(self.percentile))
        if self.num_bins is not None:
            if not self.is_histogram:
                raise RuleFileError(
                    f"calibrator '{self.name}' keeps no histogram, so num_bins means nothing", "remove it"
                )
            if not 128 <= self.num_bins <= 1 << 20:
                raise RuleFileError(f"num_bins {self.num_bins} is outside 128 to 1048576", "write for example 2048")
        for option in ("threshold", "alpha"):
            self._check_option(option, getattr(self, option))

    def _check_option(self, option: str, value: float | None) -> None:
        if value is None:
            return
        method = self.scale_method
        if method is None or method.option != option:
            owner = next(name for name, each in SCALE_METHODS.items() if each.option == option)
            raise RuleFileError(f"calibrator '{self.name}' takes no {option}", f"remove it, or write name: {owner}")
        least, most = method.limits
        if not least <= value <= most:
            raise RuleFileError(
                f"{option} {value:g} is outside {least:g} to {most:g}", f"write for example {method.default():g}"
            )

    @property
    def scale_method(self) -> ScaleMethod | None:
        """Its way from the channels' largest magnitudes to a scale for each, if it has one."""
        return SCALE_METHODS.get(self.name)

    @property
    def is_histogram(self) -> bool:
        """Whether it is computed from a histogram, and not from the largest magnitude alone."""
        if self.name in RANGE_METHODS:
            return RANGE_METHODS[self.name].histogram
        return self.scale_method is None

    def channel_ranges(self, tops: Tensor, weight_tops: Tensor | None) -> Tensor:
        """Each channel's range from its largest magnitude, (channels,); only with a :attr:`scale_method`."""
        assert self.scale_method is not None
        value = self.scale_value
        options = {} if value is None else {str(self.scale_method.option): value}
        return self.scale_method.find(tops, weight_tops, **options)

    @property
    def scale_value(self) -> float | None:
        """The option of its :attr:`scale_method`, given or by default; ``None`` if that has none."""
        assert self.scale_method is not None
        given = self.threshold if self.alpha is None else self.alpha
        default: float | None = self.scale_method.default()
        return default if given is None else given

    @property
    def by_channel(self) -> Callable[[Tensor, int, Grid], Tensor] | None:
        """Its way from a weight to a range for each channel, if it has one."""
        return RANGE_METHODS[self.name].by_channel if self.name in RANGE_METHODS else None

    def __str__(self) -> str:
        options = [f"{self.percentile:g}%"] if self.percentile is not None else []
        options += [f"{self.num_bins} bins"] if self.num_bins is not None else []
        options += [f"{self.threshold:g}"] if self.threshold is not None else []
        options += [f"alpha {self.alpha:g}"] if self.alpha is not None else []
        return f"{self.name}({', '.join(options)})" if options else self.name


@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is quantized: the field's ``QuantDescriptor``, as data.

    Attributes:
        num_bits: Width of the integer grid, 2 to 16.
        axis: The kept, per-channel axis; ``None`` is one range for the whole tensor, -1 a scale for each channel of an
            activation, which a linear's weight takes back.
        unsigned: Grid [0, 2^b - 1] in place of the signed one.
        narrow_range: Grid [-(2^(b-1) - 1), ...], so without the lowest integer.
        calibrator: How the range is found.
        max_amax: The most that calibration may find, in the units of the tensor (clip-gelu: 10 behind a GELU).
        zero_point: How many integers of an unsigned grid lie below 0.
        learn: Whether training moves the range on, from where calibration put it (LSQ, arXiv 1902.08153).
    """

    num_bits: int = 8
    axis: int | None = None
    unsigned: bool = False
    narrow_range: bool = False
    calibrator: CalibratorSpec = CalibratorSpec()
    max_amax: float | None = None
    learn: bool = False
    zero_point: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 16:
            raise RuleFileError(f"num_bits {self.num_bits} is outside 2 to 16", "write for example 8")
        if self.axis is not None and not LAST_AXIS <= self.axis <= 3:
            raise RuleFileError(
                f"axis {self.axis} is outside -1 to 3",
                "write 0 for a linear's output channels, -1 for a scale per channel of an activation, or null",
            )
        self._check_scaled()
        if self.axis is not None and self.calibrator.is_histogram and not self.calibrator.by_channel:
            weights = ", ".join(name for name, each in RANGE_METHODS.items() if each.by_channel)
            raise RuleFileError(
                f"calibrator '{self.calibrator.name}' needs one range per tensor, but axis is {self.axis}",
                f"write axis: null, or calibrator: max (for weights also {weights})",
            )
        if self.max_amax is not None and not 0 < self.max_amax < float("inf"):
            raise RuleFileError(f"max_amax {self.max_amax} is no range", "write a number above 0, for example 10")
        if self.max_amax is not None and not _MAX_AMAX[0] <= self.max_amax <= _MAX_AMAX[1]:
            raise RuleFileError(
                f"max_amax {self.max_amax:g} is outside {_MAX_AMAX[0]:.3g} to {_MAX_AMAX[1]:.3g}, where float32 has "
                "steps for a grid",
                "write for example 10",
            )
        if self.unsigned and self.narrow_range:
            raise RuleFileError("narrow_range drops the lowest signed integer, but the grid is unsigned", "remove one")
        if self.zero_point and not self.unsigned:
            raise RuleFileError(
                "zero_point says how many integers of an unsigned grid lie below 0, but the grid is signed",
                "write unsigned: true, or remove it",
            )
        highest = 2**self.num_bits // 2
        if not 0 <= self.zero_point <= highest:
            raise RuleFileError(f"zero_point {self.zero_point} is outside 0 to {highest}", "write for example 32")

    def _check_scaled(self) -> None:
        method = self.calibrator.scale_method
        if self.scaled and method is None:
            raise RuleFileError(
                f"calibrator '{self.calibrator.name}' finds no scale for each channel, but axis is {LAST_AXIS}",
                f"write calibrator: {', '.join(SCALE_METHODS)}, or axis: null",
            )
        if self.scaled and self.learn:
            raise RuleFileError(
                "a scale per channel is not learned: the weight is rounded by it, too", "remove learn, or the axis"
            )
        if not self.scaled and self.calibrator.name not in (*method_names(), "histogram"):
            axis = "null" if self.axis is None else self.axis
            raise RuleFileError(
                f"calibrator '{self.calibrator.name}' finds a scale for each channel, but axis is {axis}",
                f"write axis: {LAST_AXIS}",
            )

    @property
    def scaled(self) -> bool:
        """Whether each channel of an activation has a scale."""
        return self.axis == LAST_AXIS

    @property
    def grid(self) -> Grid:
        """The integers."""
        return Grid(self.num_bits, self.unsigned, self.narrow_range, self.zero_point)

    def __str__(self) -> str:
        axis = "per-tensor" if self.axis is None else "scaled" if self.scaled else f"axis {self.axis}"
        options = [f"up to {self.max_amax:g}"] if self.max_amax is not None else []
        options += ["learned"] if self.learn else []
        return " ".join([str(self.grid), axis, str(self.calibrator), *options])
