"""Weights that are stored as rows of int8, for kernels of NVIDIA GPUs."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from qdq_surgery.integers.product import ACTIVATIONS, SIGNED, Product
from qdq_surgery.safety import torch_private

__all__ = ["RowsProduct"]

#: torch wants more than 16 rows; fewer are filled up to this many.
_MOST_REFUSED, _ROWS = 16, 32


class RowsProduct(Product):
    """The weight as rows of int8, of which the transpose is read: that is the layout in which GPUs have kernels.

    Sizes that are no multiples of :attr:`multiple` are filled up with zeros: the weight once, activations in each call
    (of which only in_features is a size; a classifier with 2 outputs costs nothing).

    Attributes:
        multiple: What both axes of the weight have to be a multiple of.
    """

    stored = torch.int8
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    missing = "torch {} multiplies no int8 matrices on this GPU"
    multiple: ClassVar[int]

    def __init__(self, integers: Tensor, scale: Tensor, step: Tensor, zero_point: int) -> None:
        super().__init__(integers, scale, step, zero_point)
        outer, inner = self.shape
        filled = functional.pad(integers, (0, -inner % self.multiple, 0, -outer % self.multiple))
        #: int8, (out_features, in_features), each filled up.
        self.rows = filled.contiguous()
        #: What one of the sums is worth, float32, (out_features,).
        self.factor = scale * step
        #: What the zero point adds to each sum, int32, (out_features,); nothing on signed grids.
        self.excess: Tensor | None = None
        if zero_point != SIGNED:
            self.excess = integers.sum(1, dtype=torch.int32) * (zero_point - SIGNED)

    def integers(self) -> Tensor:
        """The integers as they were given, a new tensor."""
        outer, inner = self.shape
        return self.rows[:outer, :inner].clone(memory_format=torch.contiguous_format)

    def buffers(self) -> dict[str, Tensor]:
        """As there."""
        own = {**super().buffers(), "rows": self.rows, "factor": self.factor}
        return own if self.excess is None else {**own, "excess": self.excess}

    def sums(self, stored: Tensor) -> Tensor:
        """Through ``torch._int_mm``, int32, (rows, out_features); its zero point is still in them."""
        stored = stored.reshape(-1, self.shape[1])
        count, (outer, inner) = stored.shape[0], self.shape
        more = _ROWS - count if count <= _MOST_REFUSED else 0
        if more or inner % self.multiple:
            stored = functional.pad(stored, (0, -inner % self.multiple, 0, more))
        sums = torch_private.int_mm(stored.contiguous(), self.rows.t())
        return sums[:count, :outer] if more or outer % self.multiple else sums

    def in_operators(self, stored: Tensor, bias: Tensor | None, dtype: torch.dtype, activation: str) -> Tensor:
        """The product in torch's operators, in float32 behind the sums, for a compiler to merge."""
        sums = self.sums(stored)
        if self.excess is not None:
            sums = sums - self.excess
        result = sums * self.factor
        if bias is not None:
            result = result + bias
        result = (ACTIVATIONS[activation](result) if activation else result).to(dtype)
        return result.reshape(*stored.shape[:-1], self.shape[0])
