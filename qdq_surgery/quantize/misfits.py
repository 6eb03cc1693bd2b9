"""Why what a file or a state dict has for a quantizer cannot be that quantizer's, in words; ``None`` where it can."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["range_misfit", "rounding_misfit", "scales_misfit"]


def scales_misfit(shape: Sequence[int], channels: int | None = None) -> str | None:
    """Of ranges that are scales: one for each channel.

    Args:
        shape: That of the ranges.
        channels: How many channels what the quantizer sees has, if that is known.
    """
    found = tuple(shape)
    if len(found) == 1 and channels in (None, *found):
        return None
    wanted = "one axis" if channels is None else str((channels,))
    return f"the range has the shape {found}, wanted {wanted}, one for each channel"


def range_misfit(shape: Sequence[int], axes: Sequence[int] | None, weight: Sequence[int] | None = None) -> str | None:
    """Of a range, or of one for each channel with 1 in every other axis.

    Args:
        shape: That of the range.
        axes: Along which each channel has its own; ``None``: one range for the whole tensor.
        weight: The shape of the weight that is quantized, if that is known.
    """
    found = tuple(shape)
    if axes is None:
        return None if found in ((), (1,)) else f"the range has the shape {found}, wanted (), one for the whole tensor"
    rank = len(found) if weight is None else len(weight)
    if any(not -rank <= axis < rank for axis in axes):
        return f"the range has the shape {found}, which has no axis {max(axes)}"
    kept = {axis % rank for axis in axes}
    sizes = found if weight is None else weight
    shaped = tuple(size if axis in kept else 1 for axis, size in enumerate(sizes))
    if found == shaped:
        return None
    listed = ", ".join(map(str, axes))
    return f"the range has the shape {found}, wanted {shaped}, one for each channel of axis {listed}"


def rounding_misfit(dtype: torch.dtype, shape: Sequence[int], weight: Sequence[int] | None = None) -> str | None:
    """Of an adapted rounding.

    Args:
        dtype, shape: Those of the rounding.
        weight: The shape of the weight that is quantized; ``None``: it is no linear's weight.
    """
    if weight is None:
        return "an adapted rounding is for the weight of a linear"
    if dtype != torch.int8:
        return f"the rounding is in {str(dtype).removeprefix('torch.')}, wanted int8"
    if tuple(shape) != tuple(weight):
        return f"the rounding has the shape {tuple(shape)}, and the weight {tuple(weight)}"
    return None
