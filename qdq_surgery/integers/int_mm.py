"""On NVIDIA GPUs: ``torch._int_mm``, int8 times int8 to int32, through cuBLASLt or a template of inductor.

What comes behind the sums (zero points, scales, bias, activation) is written in torch's operators: a compiler makes one
pass over memory of it, or none where it takes its own template for the product. Without a compiler it is one pass, one
more for an activation, and one more for activations with a zero point.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qdq_surgery.integers.product import ACTIVATIONS, SIGNED, Product
from qdq_surgery.safety import torch_private

__all__ = ["IntMMProduct"]

#: torch wants more than 16 rows; fewer are filled up to this many.
_MOST_REFUSED, _ROWS = 16, 32

#: What both axes of the weight have to be a multiple of.
_MULTIPLE = 8


class IntMMProduct(Product):
    """The weight as rows of int8, of which the transpose is read: that is the layout in which cuBLASLt has kernels.

    Sizes that are no multiples of 8 are filled up with zeros: the weight once, activations in each call (of which only
    in_features is a size; a classifier with 2 outputs costs nothing).
    """

    kernel = "torch._int_mm"
    stored = torch.int8
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    missing = "torch {} multiplies no int8 matrices on this GPU"
    inexact = "torch._int_mm is wrong on this GPU"

    def __init__(self, integers: Tensor, scale: Tensor, step: Tensor, zero_point: int) -> None:
        super().__init__(integers, scale, step, zero_point)
        outer, inner = self.shape
        filled = functional.pad(integers, (0, -inner % _MULTIPLE, 0, -outer % _MULTIPLE))
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

    def __call__(self, stored: Tensor, bias: Tensor | None, dtype: torch.dtype, activation: str) -> Tensor:
        """As there. A compiled product rounds to ``dtype`` behind the activation, another one in front of it, too."""
        sums = self._sums(stored.reshape(-1, self.shape[1]))
        result = (self._lazy if torch.compiler.is_compiling() else self._eager)(sums, bias, dtype, activation)
        return result.reshape(*stored.shape[:-1], self.shape[0])

    def _sums(self, stored: Tensor) -> Tensor:
        """int32, (rows, out_features)."""
        count, (outer, inner) = stored.shape[0], self.shape
        more = _ROWS - count if count <= _MOST_REFUSED else 0
        if more or inner % _MULTIPLE:
            stored = functional.pad(stored, (0, -inner % _MULTIPLE, 0, more))
        sums = torch_private.int_mm(stored.contiguous(), self.rows.t())
        return sums[:count, :outer] if more or outer % _MULTIPLE else sums

    def _lazy(self, sums: Tensor, bias: Tensor | None, dtype: torch.dtype, activation: str) -> Tensor:
        """In float32, for a compiler."""
        if self.excess is not None:
            sums = sums - self.excess
        result = sums * self.factor
        if bias is not None:
            result = result + bias
        return (ACTIVATIONS[activation](result) if activation else result).to(dtype)

    def _eager(self, sums: Tensor, bias: Tensor | None, dtype: torch.dtype, activation: str) -> Tensor:
        """In few passes: torch's operators on GPUs read int32 and write half precision without one for the cast."""
        if self.excess is not None:
            sums = sums.sub_(self.excess)
        result = torch.empty(sums.shape, dtype=dtype, device=sums.device)
        if bias is None:
            torch.mul(sums, self.factor, out=result)
        else:
            torch.addcmul(bias.detach(), sums, self.factor, out=result)
        return ACTIVATIONS[activation](result) if activation else result
