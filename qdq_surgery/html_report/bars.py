"""A histogram as bars that a person can look at: of what a quantizer saw, or of the ranges of its channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from qdq_surgery.numerics.histogram import Histogram

__all__ = ["CHANNELS", "VALUES", "Bars", "of_channels", "of_values", "share_beyond"]

VALUES: Final = "values"
CHANNELS: Final = "channels"

#: More are not told apart on a screen.
_MOST_BARS = 128
_CHANNEL_BARS = 48


@dataclass(frozen=True)
class Bars:
    """Equal bars from 0 on.

    Attributes:
        what: :data:`VALUES`: magnitudes of what was seen. :data:`CHANNELS`: one number for each channel.
        width: That of one bar, in the units of the tensor.
        counts: The height of each.
        mark: Where the range ends, the same for all; ``None`` if each channel has its own, or there is none yet.
        words: What the bars are of.
    """

    what: str
    width: float
    counts: tuple[int, ...]
    mark: float | None
    words: str


def of_values(histogram: Histogram, mark: float | None) -> Bars:
    """The histogram, bins added up so that there are few enough; every value is in one of them."""
    counts, edges = histogram.table()
    joined = 1
    while -(-counts.numel() // joined) > _MOST_BARS:
        joined *= 2
    words = f"{histogram.total:,} values"
    padded = torch.nn.functional.pad(counts, (0, -counts.numel() % joined))
    return Bars(VALUES, float(edges[1]) * joined, tuple(padded.reshape(-1, joined).sum(1).tolist()), mark, words)


def of_channels(tops: Tensor, words: str, mark: float | None = None) -> Bars:
    """How many channels have a number of which size.

    Args:
        tops: Any shape, one number for each channel; those that are not finite are in no bar.
        words: What these numbers are.
    """
    flat = tops.detach().float().flatten().cpu()
    flat = flat[flat.isfinite()]
    top = float(flat.max()) if flat.numel() else 0.0
    width = top / _CHANNEL_BARS if top > 0 else 1.0
    place = (flat / width).long().clamp(max=_CHANNEL_BARS - 1)
    counts = tuple(torch.bincount(place, minlength=_CHANNEL_BARS).tolist())
    return Bars(CHANNELS, width, counts, mark, words)


def share_beyond(histogram: Histogram, amax: float) -> float:
    """The share of the values whose magnitude is beyond a range, to one bin: those of its own bin count as inside."""
    counts, edges = histogram.table()
    total = int(counts.sum())
    return int(counts[edges[:-1] >= amax].sum()) / total if total and amax > 0 else 0.0
