"""How a tensor is quantized, as frozen, typed data that checks itself: bits, axis, calibrator, limits."""

from __future__ import annotations

from dataclasses import dataclass

from qdq_surgery.errors import RuleFileError

__all__ = ["CALIBRATORS", "LEAST_PERCENTILE", "CalibratorSpec", "QuantSpec", "doubtful_percentile"]

#: Calibration methods. All but ``max`` are computed from a histogram; ``histogram`` leaves the method to the caller,
#: ``best`` takes, of the others, the one with the smallest quantization error.
CALIBRATORS = ("max", "histogram", "percentile", "entropy", "mse", "best")

#: Below it most values would be cut off: nobody wants that, and whoever writes it means a share, or the other end.
LEAST_PERCENTILE = 50.0

#: What ``max_amax`` may be. A range up to 2^-24 counts as 0, so that a limit there would set everything to 0; from
#: 2^-23 to 2^126 both the steps of a grid of 16 bits and their reciprocals are normal numbers in float32.
_MAX_AMAX = 2.0**-23, 2.0**126


def doubtful_percentile(percentile: float) -> tuple[str, str]:
    """What is wrong with a percentile below :data:`LEAST_PERCENTILE`, and what was meant."""
    # 0.9999 is a share, 0.01 is what is to be cut off.
    meant = percentile * 100 if LEAST_PERCENTILE / 100 < percentile <= 1 else 100 - percentile
    found = f"percentile {percentile:g} would cut off {100 - percentile:g} % of the values"
    return found, f"did you mean {meant:.6g}?"


@dataclass(frozen=True)
class CalibratorSpec:
    """How a range is found from data.

    Attributes:
        name: One of :data:`CALIBRATORS`.
        percentile: In percent, (0, 100]; only for ``percentile``.
        num_bins: How many bins at least lie between 0 and the largest magnitude; only for the histogram methods.
    """

    name: str = "max"
    percentile: float | None = None
    num_bins: int | None = None

    def __post_init__(self) -> None:
        if self.name not in CALIBRATORS:
            raise RuleFileError(f"unknown calibrator '{self.name}'", f"write one of {', '.join(CALIBRATORS)}")
        if self.percentile is not None:
            if self.name != "percentile":
                raise RuleFileError(
                    f"calibrator '{self.name}' takes no percentile", "remove it, or write name: percentile"
                )
            if not 0 < self.percentile <= 100:
                raise RuleFileError(f"percentile {self.percentile} is outside (0, 100]", "write for example 99.99")
            if self.percentile < LEAST_PERCENTILE:
                raise RuleFileError(*doubtful_percentile(self.percentile))
        if self.num_bins is not None:
            if self.name == "max":
                raise RuleFileError("calibrator 'max' keeps no histogram, so num_bins means nothing", "remove it")
            if not 128 <= self.num_bins <= 1 << 20:
                raise RuleFileError(f"num_bins {self.num_bins} is outside 128 to 1048576", "write for example 2048")

    @property
    def is_histogram(self) -> bool:
        """Whether it needs a histogram: every method but ``max`` does."""
        return self.name != "max"

    def __str__(self) -> str:
        options = [f"{self.percentile:g}%"] if self.percentile is not None else []
        options += [f"{self.num_bins} bins"] if self.num_bins is not None else []
        return f"{self.name}({', '.join(options)})" if options else self.name


@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is quantized: the field's ``QuantDescriptor``, as data.

    Attributes:
        num_bits: Width of the integer grid, 2 to 16.
        axis: The kept, per-channel axis; ``None`` is one range for the whole tensor.
        unsigned: Grid [0, 2^b - 1] in place of the signed one.
        narrow_range: Grid [-(2^(b-1) - 1), ...], so without the lowest integer.
        calibrator: How the range is found.
        max_amax: The most that calibration may find, in the units of the tensor (clip-gelu: 10 behind a GELU).
        learn: Whether training moves the range on, from where calibration put it (LSQ, arXiv 1902.08153).
    """

    num_bits: int = 8
    axis: int | None = None
    unsigned: bool = False
    narrow_range: bool = False
    calibrator: CalibratorSpec = CalibratorSpec()
    max_amax: float | None = None
    learn: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 16:
            raise RuleFileError(f"num_bits {self.num_bits} is outside 2 to 16", "write for example 8")
        if self.axis is not None and not 0 <= self.axis <= 3:
            raise RuleFileError(
                f"axis {self.axis} is outside 0 to 3", "write 0 for a linear's output channels, or null"
            )
        if self.axis is not None and self.calibrator.name not in ("max", "mse"):
            raise RuleFileError(
                f"calibrator '{self.calibrator.name}' needs one range per tensor, but axis is {self.axis}",
                "write axis: null, or calibrator: max (for weights also mse)",
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

    def __str__(self) -> str:
        grid = f"{'u' if self.unsigned else ''}int{self.num_bits}{' narrow' if self.narrow_range else ''}"
        axis = "per-tensor" if self.axis is None else f"axis {self.axis}"
        options = [f"up to {self.max_amax:g}"] if self.max_amax is not None else []
        options += ["learned"] if self.learn else []
        return " ".join([grid, axis, str(self.calibrator), *options])
