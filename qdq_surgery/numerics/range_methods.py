"""From a histogram to a range: the methods as pure functions, and the error that a range causes.

Each chooses the bin that pytorch-quantization 2.1.3 chooses on the same histogram, and none has a loop: all candidates
are read from prefix sums. A histogram is given as ``counts`` (n,), int64, and ``edges`` (n + 1,), float64, evenly
spaced from 0, on the CPU; a range is a float in the units of the edges.

What else there is to know of a method stands in :data:`~qdq_surgery.numerics.range_choice.RANGE_METHODS`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import torch
from torch import Tensor

from qdq_surgery.errors import OptionError
from qdq_surgery.numerics.fake_quant import fake_quant
from qdq_surgery.numerics.grid import INT8, Grid

__all__ = [
    "DEFAULT_PERCENTILE",
    "START_BIN",
    "channel_mse_amax",
    "entropy_amax",
    "max_amax",
    "mse_amax",
    "percentile_amax",
    "relative_error",
]

DEFAULT_PERCENTILE = 99.99

#: The smallest candidate, in bins.
START_BIN = 128

#: Divergences that are closer than this are equal; sums of floats in another order differ by less.
_TIE = 1e-12

#: Entries of a table that are made at once.
_BLOCK = 1 << 19


def max_amax(counts: Tensor, edges: Tensor) -> float:
    """The range of all values: the upper edge of the last bin."""
    return float(edges[counts.numel()])


def percentile_amax(counts: Tensor, edges: Tensor, percentile: float = DEFAULT_PERCENTILE) -> float:
    """The range that ``percentile`` percent of the magnitudes do not exceed.

    Counted in whole numbers: the first bin where the sum reaches the percentile. The range is that bin's lower edge, as
    in pytorch-quantization, but for the first bin, whose lower edge is no range, and for 100 percent: the upper edge.

    Args:
        percentile: In percent, (0, 100]. Read as the decimal number that it is written as.
    """
    if not 0 < percentile <= 100:
        raise OptionError(f"percentile {percentile} is outside (0, 100]; give for example 99.99")
    sums = counts.cumsum(0)
    wanted = math.ceil(Fraction(repr(float(percentile))) * int(sums[-1]) / 100)
    index = int(torch.searchsorted(sums, max(wanted, 1)))
    return float(edges[index + 1 if index == 0 or percentile == 100 else index])


def entropy_amax(
    counts: Tensor, edges: Tensor, grid: Grid = INT8, *, start_bin: int = START_BIN, stride: int = 1
) -> float:
    """The range whose quantized distribution diverges least from the clipped one (Kullback-Leibler).

    A candidate keeps the first i bins; the counts beyond are added to the last of them. Quantizing merges the bins into
    levels and spreads each level's counts evenly over its nonempty bins. As in TensorRT's calibration, the first bin is
    given the count of the second. Of equal candidates the last is taken.

    Args:
        grid: Its integers from 0 on are the levels, 2^(bits - 1) of them, or 2^bits if it is unsigned.
        start_bin, stride: Candidates are start_bin, start_bin + stride, ... bins.
    """
    size = counts.numel()
    if size <= start_bin:
        return float(edges[-1])
    bins = counts.double().clone()
    bins[0] = bins[1]
    levels = grid.levels
    candidates = torch.arange(start_bin, size + 1, stride)
    inside, nonempty, own = _sums(bins), _sums((bins > 0).double()), _sums(torch.xlogy(bins, bins))
    total = inside[-1]
    tail = total - inside[candidates]
    last = bins[candidates - 1]
    # Sum of p log p: the last bin holds the tail too.
    reference = own[candidates] - torch.xlogy(last, last) + torch.xlogy(last + tail, last + tail)
    cross = torch.empty_like(tail)
    for part, bounds in _blocks(_level_bounds, len(candidates), levels, start_bin, stride):
        level_counts = inside[bounds].diff(dim=1)
        means = level_counts / nonempty[bounds].diff(dim=1).clamp_(min=1)
        # Sum of p log q: p of a level is its counts, and the tail goes to the last level.
        cross[part] = torch.xlogy(level_counts, means).sum(1) + torch.xlogy(tail[part], means[:, -1])
    divergence = (reference - cross) / total + (inside[candidates] / total).log()
    # A tail that falls into an empty bin is a value that the quantized distribution calls impossible.
    divergence[((last == 0) & (tail > 0)) | (inside[candidates] == 0)] = math.inf
    best = torch.nonzero(divergence <= divergence.min() + _TIE).max()
    return float(edges[candidates[best]])


def mse_amax(counts: Tensor, edges: Tensor, grid: Grid = INT8, *, start_bin: int = START_BIN, stride: int = 1) -> float:
    """The range with the smallest squared error, every value standing in the middle of its bin.

    Args:
        grid: It is symmetric: of its integers only the highest decides.
        start_bin, stride: Candidates are the middles of the bins start_bin, start_bin + stride, ...
    """
    size = counts.numel()
    if size <= start_bin:
        return float(edges[-1])
    qmax = grid.qmax
    weights = counts.double()
    middles = torch.arange(size, dtype=torch.float64) + 0.5  # in bin widths
    candidates = torch.arange(start_bin, size, stride)
    steps = grid.step(candidates.double() + 0.5)
    # The error of level k is the sum of c (x - k step)^2. With suffix sums from each level's first bin on:
    # sum k c x = sum over k of suffix(c x), and sum k^2 c = sum over k of (2k - 1) suffix(c).
    zeroth, first = (_suffix_sums(weights * power) for power in (torch.ones(()), middles))
    linear = torch.empty(len(candidates), dtype=torch.float64)
    square = torch.empty(len(candidates), dtype=torch.float64)
    odd = 2.0 * torch.arange(1, qmax + 1, dtype=torch.float64) - 1.0
    for part, bounds in _blocks(_first_bins, len(candidates), qmax, start_bin, stride):
        bounds = bounds.clamp(max=size)
        linear[part] = first[bounds].sum(1)
        square[part] = zeroth[bounds] @ odd
    error = (weights * middles.square()).sum() - 2.0 * steps * linear + steps.square() * square
    best = int(candidates[int(error.argmin())])
    return float(edges[best] + edges[best + 1]) / 2.0


#: Shares of a channel's largest magnitude that are tried: so many evenly from the lowest to 1, then so many around the
#: best, twice.
_LOWEST_SHARE, _COARSE, _FINE = 0.25, 25, 9


def channel_mse_amax(weight: Tensor, axis: int, grid: Grid = INT8) -> Tensor:
    """The range of each channel with the smallest squared error, found on the weights themselves.

    Args:
        weight: Any shape.
        axis: The channels.

    Returns:
        Float32, 1 in every axis but ``axis``. No channel's error is larger than with its largest magnitude.
    """
    shape = [size if place == axis else 1 for place, size in enumerate(weight.shape)]
    rows = weight.detach().float().movedim(axis, 0).flatten(1)
    top = rows.abs().amax(1, keepdim=True)

    def error(share: Tensor) -> Tensor:
        return (fake_quant(rows, top * share, grid) - rows).square_().sum(1, keepdim=True)

    best = torch.ones_like(top)
    least = error(best)
    low, step = torch.full_like(top, _LOWEST_SHARE), (1.0 - _LOWEST_SHARE) / (_COARSE - 1)
    for points in (_COARSE, _FINE, _FINE):
        for point in range(points):
            share = (low + point * step).clamp_(max=1.0)
            found = error(share)
            better = found < least
            best, least = torch.where(better, share, best), torch.where(better, found, least)
        low, step = best - step, 2.0 * step / (_FINE - 1)
    return (top * best).reshape(shape)


def relative_error(counts: Tensor, edges: Tensor, amax: float, grid: Grid = INT8) -> float:
    """The squared error of a range as a share of the data's squares: the inverse of the signal-to-noise ratio.

    Every value stands in the middle of its bin, and both signs end at the highest integer. 0 for data that is 0.
    """
    middles = (edges[:-1] + edges[1:]) / 2.0
    step = grid.step(amax)
    rounded = (middles / step).round_().clamp_(max=grid.qmax).mul_(step) if step > 0 else torch.zeros_like(middles)
    weights = counts.double()
    power = float((weights * middles.square()).sum())
    return float((weights * (rounded - middles).square()).sum()) / power if power > 0 else 0.0


def _sums(values: Tensor) -> Tensor:
    """Prefix sums with a leading 0: entry i is the sum of the first i values."""
    return torch.cat([torch.zeros(1, dtype=values.dtype), values.cumsum(0)])


def _suffix_sums(values: Tensor) -> Tensor:
    """Entry i is the sum of all values from i on; one more entry, 0, at the end."""
    sums = _sums(values)
    return sums[-1] - sums


def _blocks(
    table: Callable[[int, int, int, int], Tensor], count: int, columns: int, start: int, stride: int
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a table, a block at a time: which candidates, and their rows.

    Blocks begin at the same candidates whatever the number of bins, so that all histograms share them.
    """
    rows = max(1, _BLOCK // columns)
    for first in range(0, count, rows):
        part = slice(first, min(first + rows, count))
        yield part, table(start + first * stride, rows, stride, columns)[: part.stop - first]


@functools.lru_cache(maxsize=4)
def _level_bounds(start: int, rows: int, stride: int, levels: int) -> Tensor:
    """(rows, levels + 1): the first bin of each level when i bins are divided evenly, ceil(j i / levels)."""
    candidates = torch.arange(start, start + rows * stride, stride).unsqueeze(1)
    return (candidates * torch.arange(levels + 1) + (levels - 1)) // levels


@functools.lru_cache(maxsize=4)
def _first_bins(start: int, rows: int, stride: int, qmax: int) -> Tensor:
    """(rows, qmax): the first bin whose middle is rounded to the integer k = 1 .. qmax or higher.

    With amax in the middle of bin i, bin b is rounded to qmax (2b + 1) / (2i + 1). That is never half-way between two
    integers: it would be k + 1/2 with 2 qmax (2b + 1) = (2k + 1) (2i + 1), even on the left and odd on the right.
    """
    candidates = torch.arange(start, start + rows * stride, stride).unsqueeze(1)
    odd = 2 * torch.arange(1, qmax + 1) - 1
    return (odd * (2 * candidates + 1) + 2 * qmax) // (4 * qmax)
