"""Tables of positions, which are the same for every row of the batch.

Nothing in them is padding, and each row of the batch has the whole of one: a table counts once for each row, as it
would if the rows ran alone. Some grow with the text: DeBERTa's holds two positions for each token of the longest. A
shorter row would have had less of it, and counts that part: which part, a run with longer texts shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qdq_surgery.padding.axes import Axes, Axis, Size

__all__ = ["Slice", "grown", "slices"]

_SIDES = ("start", "middle", "end")


@dataclass(frozen=True)
class Slice:
    """Part of a table.

    Attributes:
        ranges: (axis, start, length), for each axis that grows.
        times: How many rows of the batch have just this part.
    """

    ranges: tuple[tuple[int, int, int], ...]
    times: int

    def of(self, values: Tensor) -> Tensor:
        """This part of the table ``values``."""
        for axis, start, length in self.ranges:
            values = values.narrow(axis, start, length)
        return values


def grown(first: Tensor, second: Tensor, sizes: tuple[Size, Size]) -> Axes | None:
    """What the axes of a table stand for; ``None`` if it grows in a way that is not known.

    Args:
        first, second: The same table in runs of two sizes.
    """
    places = [place for place in range(first.ndim) if first.shape[place] != second.shape[place]]
    for chosen in itertools.product(*(list(_growths(first.shape[i], second.shape[i], sizes)) for i in places)):
        axes: list[Axis | None] = [None] * first.ndim
        part = second
        for place, axis in zip(places, chosen, strict=True):
            axes[place] = axis
            part = part.narrow(place, _start(axis, second.shape[place], first.shape[place]), first.shape[place])
        # Products of other shapes: float32 rounding.
        if torch.allclose(part, first, rtol=1e-3, atol=1e-5 * float(first.abs().max())):
            return tuple(axes)
    return None


def _growths(a: int, b: int, sizes: tuple[Size, Size]) -> Iterator[Axis]:
    for text, (one, other) in enumerate(zip(sizes[0].lengths, sizes[1].lengths, strict=True)):
        for repeat in (1, 2):
            beside = a - repeat * one
            if beside == b - repeat * other:
                for side in _SIDES:
                    yield Axis("table", repeat, text, ((-1, beside),), side=side)


def _start(axis: Axis, whole: int, part: int) -> int:
    return {"start": 0, "middle": (whole - part) // 2, "end": whole - part}[axis.side]


def slices(axes: Axes, padded: Sequence[Tensor | None], size: Size, shape: Sequence[int]) -> list[Slice] | None:
    """The parts of a table that the rows of a batch have; ``None`` if it is longer than it should be.

    Args:
        padded: (rows, tokens) of each text, true where padded; ``None`` if nothing of it is.
        shape: Of the table.
    """
    growing = [(place, axis) for place, axis in enumerate(axes) if axis is not None]
    used = {axis.text: _used(padded[axis.text], size, axis.text) for _, axis in growing}
    counts: dict[tuple[int, ...], int] = {}
    for row in range(size.batch):
        key = tuple(used[axis.text][row] for _, axis in growing)
        if all(key):  # a row without a token has no table
            counts[key] = counts.get(key, 0) + 1
    found = []
    for key, times in counts.items():
        ranges = []
        for (place, axis), tokens in zip(growing, key, strict=True):
            beside = axis.parts[0][1]
            if shape[place] > axis.repeat * size.lengths[axis.text] + beside:
                return None
            length = min(axis.repeat * tokens + beside, shape[place])  # a table may have an end
            ranges.append((place, _start(axis, shape[place], length), length))
        found.append(Slice(tuple(ranges), times))
    return found


def _used(padded: Tensor | None, size: Size, text: int) -> list[int]:
    """Tokens of each row of the batch, of the longest where it has several."""
    if padded is None:
        return [size.lengths[text]] * size.batch
    longest: list[int] = (~padded).sum(1).reshape(size.batch, -1).amax(1).tolist()
    return longest
