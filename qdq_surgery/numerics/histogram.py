"""An exact histogram of magnitudes that can be added up in any order: over tensors, batches and machines.

The grid depends on the data only through a power of two: equal bins over [0, 2^exponent), where 2^exponent is the
first power above the largest magnitude. Such grids nest. When a larger value comes, bins are added up in pairs until
the new range fits, and every count stays exact: the histogram of all values is the same whatever came first. (A grid
that the first batch decides, as in pytorch-quantization 2.1.3, makes the result depend on the order of the data; and
its counts, float32, stop at 2^24.)

Nothing here waits for the device: no value is read back, so a GPU can run ahead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BINS", "Histogram", "largest"]

#: Bins in a grid. The largest magnitude lies in its upper half, so at least half of them are in use.
BINS = 4096

#: Magnitudes below 2^-64 are counted as if the range were that.
_LOWEST = -64

#: Values that are counted at once on a CPU.
_PIECE = 1 << 17

_EXPONENT_BIAS = 127
_MANTISSA_BITS = 23


def largest(values: Tensor, invalid: Tensor | None = None) -> Tensor:
    """The largest magnitude, float32, shape (); NaN if there is one.

    Args:
        invalid: What does not count, with as many axes as ``values``, to which it broadcasts.
    """
    if values.numel() == 0:
        return torch.zeros((), device=values.device)
    if invalid is None:
        low, high = torch.aminmax(values)
        return torch.maximum(high, -low).float()
    # First over the axes that the mask does not know, so that only a small tensor is masked.
    free = [axis for axis in range(values.ndim) if invalid.shape[axis] == 1 and values.shape[axis] != 1]
    if free:
        low, high = torch.amin(values, free, keepdim=True), torch.amax(values, free, keepdim=True)
        values = torch.maximum(high, -low)
    return torch.where(invalid, 0.0, values).abs().max().float()


@dataclass
class Histogram:
    """Counts of magnitudes.

    Attributes:
        counts: (bins,), int64.
        exponent: (), int32: the grid spans [0, 2^exponent).
        amax: (), float32: the largest magnitude itself; NaN or infinite if such a value came.
    """

    counts: Tensor
    exponent: Tensor
    amax: Tensor

    @classmethod
    def of(cls, values: Tensor, invalid: Tensor | None = None, bins: int = BINS) -> Histogram:
        """The histogram of one tensor.

        Args:
            values: Any shape, floating point.
            invalid: What does not count, with as many axes as ``values``, to which it broadcasts.
            bins: A power of two.
        """
        values = values.detach()
        if values.dtype != torch.float32:
            values = values.float()
        amax = largest(values, invalid)
        top = torch.finfo(torch.float32).max
        exponent = torch.frexp(torch.nan_to_num(amax, nan=0.0, posinf=top)).exponent.clamp(min=_LOWEST)
        exponent = torch.where(amax == 0, _LOWEST, exponent)  # so that nothing does not coarsen the grid
        counts = torch.zeros(bins, dtype=torch.int64, device=values.device)
        if values.device.type == "cpu" and not math.isfinite(
            float(amax)
        ):  # such values have no bin; amax tells of them
            return cls(counts, exponent, amax)
        scale = _power_of_two(int(math.log2(bins)) - exponent)
        for part, left_out in _parts(values, invalid):
            # A product with a power of two is exact, and so is cutting it off: bin i holds [i, i + 1) widths.
            index = (part * scale).to(torch.int32).abs_()
            if left_out is not None:
                index.masked_fill_(left_out, bins)
            counts += _count(index.reshape(-1), bins)
        return cls(counts, exponent, amax)

    def __add__(self, other: Histogram) -> Histogram:
        exponent = torch.maximum(self.exponent, other.exponent)
        counts = self._on(exponent) + other._on(exponent)
        return Histogram(counts, exponent, torch.maximum(self.amax, other.amax))

    def repeated(self, times: int) -> Histogram:
        """The histogram of the same data so many times, at least once."""
        return self if times == 1 else Histogram(self.counts * times, self.exponent, self.amax)

    def _on(self, exponent: Tensor) -> Tensor:
        """The counts on the grid of ``exponent``, which is as coarse as this one or coarser."""
        if exponent.device.type == "cpu" and bool(exponent == self.exponent):
            return self.counts
        shift = (exponent - self.exponent).clamp(max=31)
        place = torch.arange(self.counts.numel(), device=self.counts.device) >> shift
        return torch.zeros_like(self.counts).scatter_add_(0, place, self.counts)

    def rescaled(self, exponent: Tensor) -> Histogram:
        """The same data on a coarser grid."""
        return Histogram(self._on(exponent), exponent, self.amax)

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    def table(self) -> tuple[Tensor, Tensor]:
        """Counts (n,), int64, and edges (n + 1,), float64, on the CPU, up to the bin of the largest magnitude."""
        counts = self.counts.cpu()
        width = 2.0 ** (int(self.exponent) - int(math.log2(counts.numel())))
        used = int(counts.nonzero().max()) + 1 if bool(counts.any()) else 1
        return counts[:used], torch.arange(used + 1, dtype=torch.float64) * width


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float32, exactly: written into the exponent's bits."""
    return ((exponent.to(torch.int32) + _EXPONENT_BIAS) << _MANTISSA_BITS).view(torch.float32)


def _parts(values: Tensor, invalid: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The tensor in pieces that a CPU's cache holds, each with its part of the mask; whole on another device."""
    if values.device.type != "cpu" or values.ndim < 2 or values.numel() <= _PIECE:
        yield values, invalid
        return
    rows = max(1, _PIECE * values.shape[0] // values.numel())
    for start in range(0, values.shape[0], rows):
        piece = slice(start, start + rows)
        yield values[piece], invalid if invalid is None or invalid.shape[0] == 1 else invalid[piece]


def _count(index: Tensor, bins: int) -> Tensor:
    """How often each bin occurs in ``index``; ``bins`` and what lies beyond stands for what does not count."""
    if index.device.type == "cpu":
        return torch.bincount(index, minlength=bins + 1)[:bins]
    # bincount would ask the device for the largest index, and wait for the answer.
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=index.device)
    index = index.clamp_(0, bins).long()
    return counts.scatter_add_(0, index, torch.ones((), dtype=torch.int64, device=index.device).expand_as(index))[:bins]
