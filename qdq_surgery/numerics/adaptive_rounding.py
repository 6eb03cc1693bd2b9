"""Rounding a weight so that its product keeps, instead of each of its values.

A value may go to the farther of its two neighbors, or further, where that takes back what the values before it have
cost: GPTQ (arXiv 2210.17323), with the columns in the order of how much comes through them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["adapted_integers", "product_error"]

#: What is added to each channel's own moment, as a share of their mean; more where that is not enough to divide by.
_DAMPING = (0.01, 0.1, 1.0)

#: Columns that are rounded one by one before what they cost is passed on to all others.
_COLUMNS = 64


def adapted_integers(weight: Tensor, moments: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
    """Integers whose product with the inputs is near that of ``weight``.

    Args:
        weight: (out, in), float32.
        moments: (in, in), float32: the sum of x x^T over the inputs x that the weight is multiplied with.
        step: The distance of two integers; broadcasts to ``weight``. A row whose step is 0 becomes 0.
        qmin, qmax: The ends of the grid.

    Returns:
        Shape of ``weight``, float32, whole numbers.
    """
    order = moments.diagonal().argsort(descending=True, stable=True)
    left = weight[:, order]
    factor = _inverse_factor(moments[order][:, order])
    steps = step.expand_as(weight)[:, order]
    inverse = torch.where(steps > 0, 1.0 / steps, 0.0)
    found = torch.empty_like(left)
    for start in range(0, weight.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, weight.shape[1])
        costs = torch.empty_like(left[:, start:stop])
        for at in range(start, stop):
            value = left[:, at]
            found[:, at] = (value * inverse[:, at]).round().clamp(qmin, qmax)
            cost = (value - found[:, at] * steps[:, at]) / factor[at, at]
            left[:, at + 1 : stop] -= cost[:, None] * factor[at, at + 1 : stop]
            costs[:, at - start] = cost
        left[:, stop:] -= costs @ factor[start:stop, stop:]
    back = torch.empty_like(found)
    back[:, order] = found
    return back


def product_error(error: Tensor, weight: Tensor, moments: Tensor) -> float:
    """Squares of what ``error``, added to ``weight``, adds to the product, as a share of the product's own squares.

    Args:
        error, weight: (out, in), float32.
        moments: As for :func:`adapted_integers`.
    """
    whole = float(((weight @ moments) * weight).sum())
    return float(((error @ moments) * error).sum()) / whole if whole > 0 else 0.0


def _inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, with enough on the diagonal that there is one."""
    mean = moments.diagonal().mean().clamp(min=torch.finfo(moments.dtype).tiny)
    for share in _DAMPING:
        damped = moments / mean + share * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
    return torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
