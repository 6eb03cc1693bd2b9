"""Channels that are many times as large as the others, in what the float model hands from operator to operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qdq_surgery.sensitivity.output_error import real_rows

__all__ = ["ChannelTops", "Tokens", "outliers"]

#: An outlier is more than this many times the median channel.
_OUTLIER = 4.0
#: How many are named.
_NAMED = 3


class Tokens:
    """Which tokens of the batch that runs are none of padding.

    Attributes:
        mask: (rows, tokens); ``None`` if nothing is padded.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None


class ChannelTops:
    """A calibrator: the largest magnitude of each channel.

    Attributes:
        tops: (channels,); ``None`` while nothing was seen, or where it could not be told what is padding.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._known = True
        self.tops: Tensor | None = None

    def collect(self, inputs: Tensor) -> None:
        """See a tensor, whose last axis are the channels."""
        rows = real_rows(inputs.detach(), self._tokens.mask) if inputs.ndim > 1 else None
        if rows is None or (self.tops is not None and len(self.tops) != rows.shape[1]):
            self._known = False
        if not self._known or rows is None:
            self.tops = None
        elif len(rows):
            found = rows.abs().amax(0).float()
            self.tops = found if self.tops is None else torch.maximum(self.tops, found)


def outliers(tops: Iterable[Tensor | None]) -> Mapping[int, float]:
    """How many times the median channel each outlier is, the largest first.

    Args:
        tops: Of one quantizer or of several, of which the largest counts; those of several widths have none in common.
    """
    known = [each for each in tops if each is not None]
    if len({len(each) for each in known}) != 1:
        return {}
    top = torch.stack(known).amax(0)
    if not bool((top > 0).any()):
        return {}
    ratios = top / top[top > 0].median()
    order = ratios.argsort(descending=True, stable=True)[:_NAMED].tolist()
    return {channel: float(ratios[channel]) for channel in order if float(ratios[channel]) > _OUTLIER}
