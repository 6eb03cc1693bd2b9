"""Kernels for NVIDIA GPUs in Triton: the int8 product with all that is done to its sums, and the rounding in front.

Imported where Triton is: it comes with torch for CUDA. Each kernel is compiled when it is first called, in a second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["ACTIVATIONS", "linear", "round_to_int8"]

#: What the epilogue computes, by name; the numbers are the kernel's.
ACTIVATIONS = {"": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}

#: Up to so many rows tiles are small.
_FEW = 512

#: Values that one program of the rounding takes.
_BLOCK = 1024


@triton.jit
def _int8_linear(
    stored,
    weight,
    result,
    factor,
    excess,
    bias,
    following,
    rows,
    outer,
    inner,
    inner_stored,
    LOWEST: tl.constexpr,
    ZERO: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_EXCESS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUNDS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    EVEN: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of HIGH rows and WIDE columns."""
    row, column = _own(rows, outer, HIGH, WIDE, GROUP)
    depth = tl.arange(0, DEEP)
    # Rows and columns behind the last one are the first ones once more, and are not stored.
    left = stored + (row % rows).to(tl.int64)[:, None] * inner + depth[None, :]
    right = weight + (column % outer).to(tl.int64)[None, :] * inner_stored + depth[:, None]
    sums = tl.zeros((HIGH, WIDE), dtype=tl.int32)
    for start in range(0, inner, DEEP):
        if EVEN:
            one, other = tl.load(left), tl.load(right)
        else:
            one = tl.load(left, mask=depth[None, :] < inner - start, other=0)
            other = tl.load(right, mask=depth[:, None] < inner - start, other=0)
        sums = tl.dot(one, other, sums, out_dtype=tl.int32)
        left += DEEP
        right += DEEP
    there = column < outer
    if HAS_EXCESS:
        sums -= tl.load(excess + column, mask=there, other=0)[None, :]
    values = sums.to(tl.float32) * tl.load(factor + column, mask=there, other=0.0)[None, :]
    if HAS_BIAS:
        values += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
    values = _activated(values, ACTIVATION)
    at = result + row.to(tl.int64)[:, None] * outer + column[None, :]
    stays = (row[:, None] < rows) & there[None, :]
    if ROUNDS:
        if PER_CHANNEL:
            values *= tl.load(following + column, mask=there, other=0.0)[None, :]
        else:
            values *= tl.load(following)
        tl.store(at, _rounded(values, LOWEST, LOWEST + 255, ZERO), mask=stays)
    else:
        tl.store(at, values.to(result.dtype.element_ty), mask=stays)


@triton.jit
def _own(rows, outer, HIGH: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr):
    """Numbers of a program's rows and columns. Tiles of GROUP rows of tiles follow one another: they share weights."""
    program = tl.program_id(0)
    down, across = tl.cdiv(rows, HIGH), tl.cdiv(outer, WIDE)
    top = (program // (GROUP * across)) * GROUP
    height = min(down - top, GROUP)
    row = (top + (program % (GROUP * across)) % height) * HIGH + tl.arange(0, HIGH)
    column = ((program % (GROUP * across)) // height) * WIDE + tl.arange(0, WIDE)
    return row, column


@triton.jit
def _activated(values, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        values = 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
    elif ACTIVATION == 2:
        inside = 0.7978845608028654 * (values + 0.044715 * values * values * values)
        values = values - values / (tl.exp(2.0 * inside) + 1.0)
    elif ACTIVATION == 3:
        values = tl.maximum(values, 0.0)
    return values


@triton.jit
def _round(values, result, factor, size, channels, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, ZERO: tl.constexpr,
           PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    found = tl.load(values + at, mask=there, other=0.0).to(tl.float32)
    if PER_CHANNEL:
        found *= tl.load(factor + at % channels, mask=there, other=0.0)
    else:
        found *= tl.load(factor)
    tl.store(result + at, _rounded(found, LOWEST, HIGHEST, ZERO), mask=there)


@triton.jit
def _rounded(values, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, ZERO: tl.constexpr):
    """``clamp(round(values), LOWEST, HIGHEST) + ZERO``, int8; halves to the even integer."""
    # Beside 1.5 * 2^23 a float32 has no bits for fractions, and its last bits are the integer's.
    inside = tl.minimum(tl.maximum(values, LOWEST * 1.0), HIGHEST * 1.0) + 12582912.0
    return (inside.to(tl.int32, bitcast=True) + ZERO).to(tl.int8)


def linear(
    stored: Tensor,
    weight: Tensor,
    factor: Tensor,
    excess: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str,
    following: Tensor | None,
    zero_point: int,
) -> Tensor:
    """``activation((stored @ weight.T - excess) * factor + bias)``; rounded for the next product if that has a factor.

    Args:
        stored: int8, (rows, in_features), contiguous, in_features a multiple of 16.
        weight: int8, (out_features or more, in_features), contiguous.
        factor: float32, (out_features,).
        excess: int32, (out_features,).
        bias: Floating point, (out_features,).
        dtype: Of the result, if it is not rounded.
        activation: A name of :data:`ACTIVATIONS`.
        following: How many steps of the next grid are 1, float32, () or (out_features,).
        zero_point: The next grid's integer for 0, as uint8.

    Returns:
        (rows, out_features); int8, 128 less than uint8, if it is rounded.
    """
    (rows, inner), outer = stored.shape, factor.shape[0]
    result = stored.new_empty((rows, outer), dtype=dtype if following is None else torch.int8)
    if rows == 0:
        return result
    high, wide, deep = _tile(rows, outer)
    with torch.cuda.device_of(stored):
        _int8_linear[(triton.cdiv(rows, high) * triton.cdiv(outer, wide),)](
            stored,
            weight,
            result,
            factor,
            factor if excess is None else excess,
            factor if bias is None else bias,
            factor if following is None else following,
            rows,
            outer,
            inner,
            weight.shape[1],
            LOWEST=-zero_point,
            ZERO=zero_point - 128,
            ACTIVATION=ACTIVATIONS[activation],
            HAS_EXCESS=excess is not None,
            HAS_BIAS=bias is not None,
            ROUNDS=following is not None,
            PER_CHANNEL=following is not None and following.ndim > 0,
            EVEN=inner % deep == 0,
            HIGH=high,
            WIDE=wide,
            DEEP=deep,
            GROUP=8,
            num_warps=4,
            num_stages=3,
        )
    return result


def _tile(rows: int, outer: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and how much of in_features is read at a time.

    The fastest of 80 ways on an H200 for 128 and 4,096 rows without an activation, by sizes of BERT-base and large;
    loads of descriptors (TMA) and a persistent grid were none of them.
    """
    if rows <= _FEW:  # there are few tiles, so that they are small
        return 64, 64, 128
    return (128 if outer >= 1024 else 64), 128, 128


def round_to_int8(values: Tensor, factor: Tensor, lowest: int, highest: int, zero: int) -> Tensor:
    """``clamp(round(values * factor), lowest, highest) + zero``, int8, in the shape of ``values``.

    Args:
        values: Floating point, on a GPU.
        factor: float32, () or (channels,), those of the last axis.
    """
    given = values.contiguous()
    result = torch.empty_like(given, dtype=torch.int8)
    if given.numel():
        with torch.cuda.device_of(given):
            _round[(triton.cdiv(given.numel(), _BLOCK),)](
                given, result, factor, given.numel(), given.shape[-1],
                LOWEST=lowest, HIGHEST=highest, ZERO=zero, PER_CHANNEL=factor.ndim > 0, BLOCK=_BLOCK,
            )  # fmt: skip
    return result
