"""Statistics of several processes as one. Without ``torch.distributed`` each function gives back what it is given.

Largest values are reduced by maximum and counts by sum, after every histogram is on the coarsest grid of all: the
result is that of one process which saw all data, to the bit, and the same in every process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed

from qdq_surgery.errors import CalibrationError
from qdq_surgery.numerics.histogram import Histogram

__all__ = ["agree", "gather_histograms", "gather_maxima", "gather_moments", "gather_sums"]

_LOWEST_EXPONENT = -(1 << 20)


def _alone() -> bool:
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def agree(error: BaseException | None, names: Sequence[str] = ()) -> None:
    """Go on only if no process has an error and all collect for the same quantizers.

    Raises:
        BaseException: This process's own error.
        CalibrationError: Another process has one, or other quantizers enabled.
    """
    if not _alone():
        words: list[tuple[str | None, list[str]] | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(words, (None if error is None else f"{type(error).__name__}: {error}", [*names]))
        told = [word for word in words if word is not None]
        failed = [(rank, text) for rank, (text, _) in enumerate(told) if text is not None]
        if error is None and failed:
            raise CalibrationError(f"process {failed[0][0]} failed: {failed[0][1]}")
        if error is None and any(others != told[0][1] for _, others in told):
            raise CalibrationError("the processes have different quantizers enabled; enable the same in all")
    if error is not None:
        raise error


def gather_sums(values: Sequence[int], device: torch.device) -> list[int]:
    """The sums of each value over all processes."""
    if _alone():
        return list(values)
    sums = torch.tensor(values, dtype=torch.int64, device=device)
    distributed.all_reduce(sums)
    return [int(value) for value in sums]


def gather_maxima(found: Mapping[str, Tensor | None], device: torch.device) -> dict[str, Tensor]:
    """The largest of each name over all processes; a name that none has a value for is left out.

    Args:
        found: The same names in the same order in every process.
    """
    if _alone():
        return {name: amax for name, amax in found.items() if amax is not None}
    made = {}
    for name, amax in found.items():
        shapes: list[tuple[int, ...] | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(shapes, None if amax is None else tuple(amax.shape))
        shape = next((shape for shape in shapes if shape is not None), None)
        if shape is None:
            continue
        value = torch.zeros(shape, device=device) if amax is None else amax.clone()
        distributed.all_reduce(value, distributed.ReduceOp.MAX)
        made[name] = value
    return made


def gather_moments(
    found: Mapping[str, Tensor | None], sizes: Mapping[str, int], device: torch.device
) -> dict[str, Tensor]:
    """The sums of each name's moments over all processes; a name that none has any for is zero.

    Args:
        found: The same names in the same order in every process.
        sizes: How many channels each has.
    """
    if _alone():
        return {name: moments for name, moments in found.items() if moments is not None}
    made = {}
    for name, moments in found.items():
        total = torch.zeros(sizes[name], sizes[name], device=device) if moments is None else moments.clone()
        distributed.all_reduce(total)
        made[name] = total
    return made


def gather_histograms(found: Mapping[str, Histogram | None], device: torch.device) -> dict[str, Histogram]:
    """The histograms of all processes' data; a name that none has one for is left out.

    Args:
        found: The same names in the same order in every process.
    """
    if _alone() or not found:
        return {name: histogram for name, histogram in found.items() if histogram is not None}
    zero = torch.zeros((), device=device)
    lowest = torch.tensor(_LOWEST_EXPONENT, dtype=torch.int32, device=device)
    amaxes = torch.stack([zero if each is None else each.amax for each in found.values()])
    exponents = torch.stack([lowest if each is None else each.exponent for each in found.values()])
    bins = torch.tensor([0 if each is None else each.counts.numel() for each in found.values()], device=device)
    for tensor in (amaxes, exponents, bins):
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    made = {}
    for index, (name, histogram) in enumerate(found.items()):
        size = int(bins[index])
        if size == 0:
            continue
        exponent = exponents[index]
        counts = torch.zeros(size, dtype=torch.int64, device=device)
        if histogram is not None:
            counts = histogram.rescaled(exponent).counts.clone()
        distributed.all_reduce(counts)
        made[name] = Histogram(counts, exponent, amaxes[index])
    return made
