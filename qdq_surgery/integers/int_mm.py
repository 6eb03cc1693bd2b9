"""On NVIDIA GPUs: ``torch._int_mm``, int8 times int8 to int32, through cuBLASLt or a template of inductor.

What comes behind the sums (zero points, scales, bias, activation) is written in torch's operators: a compiler makes one
pass over memory of it, or none where it takes its own template for the product. Without a compiler it is one pass, one
more for an activation, and one more for activations with a zero point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdq_surgery.integers.product import ACTIVATIONS
from qdq_surgery.integers.rows import RowsProduct

__all__ = ["IntMMProduct"]


class IntMMProduct(RowsProduct):
    """The product through ``torch._int_mm``."""

    kernel = "torch._int_mm"
    inexact = "torch._int_mm is wrong on this GPU"
    multiple = 8

    def __call__(self, stored: Tensor, bias: Tensor | None, dtype: torch.dtype, activation: str) -> Tensor:
        """As there. A compiled product rounds to ``dtype`` behind the activation, another one in front of it, too."""
        if torch.compiler.is_compiling():
            return self.in_operators(stored, bias, dtype, activation)
        result = self._eager(self.sums(stored), bias, dtype, activation)
        return result.reshape(*stored.shape[:-1], self.shape[0])

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
