"""On NVIDIA GPUs of the Hopper generation: the product in Triton, with all that is done to its sums in one kernel.

cuBLASLt runs int8 there by kernels of the generation before, slower than bf16 (torch 2.11, CUDA 13). Where Triton is
missing, on other GPUs, and for a compiler, ``torch._int_mm`` multiplies.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qdq_surgery.integers.product import SIGNED, Rounding
from qdq_surgery.integers.rows import RowsProduct

__all__ = ["TritonProduct", "kernels", "to_integers"]

#: The generation whose own instructions Triton multiplies int8 by, and on which that was measured.
_HOPPER = 9


class TritonProduct(RowsProduct):
    """The product through :func:`~qdq_surgery.integers.triton_kernels.linear`."""

    kernel = "Triton int8"
    inexact = "Triton's int8 product is wrong on this GPU"
    multiple = 16
    rounds = True

    @classmethod
    def suits(cls, device: torch.device) -> bool:
        """As there: a Hopper GPU, and Triton is installed."""
        there = device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available()
        return (
            there
            and torch.cuda.get_device_capability(device)[0] == _HOPPER
            and importlib.util.find_spec("triton") is not None
        )

    @classmethod
    def rounding(cls) -> Rounding:
        """As there."""
        return to_integers

    def __call__(self, stored: Tensor, bias: Tensor | None, dtype: torch.dtype, activation: str) -> Tensor:
        """As there."""
        if torch.compiler.is_compiling():
            return self.in_operators(stored, bias, dtype, activation)
        return self._product(stored, bias, dtype, activation, None, 0)

    def rounded(self, stored: Tensor, bias: Tensor | None, activation: str, factor: Tensor, zero_point: int) -> Tensor:
        """As there, by its epilogue; ``factor`` may be (out_features,)."""
        if torch.compiler.is_compiling():
            values = self.in_operators(stored, bias, torch.float32, activation) * factor
            return (values.round().clamp(-zero_point, 255 - zero_point) + (zero_point - SIGNED)).to(torch.int8)
        return self._product(stored, bias, torch.int8, activation, factor, zero_point)

    def _product(
        self,
        stored: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        activation: str,
        factor: Tensor | None,
        zero_point: int,
    ) -> Tensor:
        outer, inner = self.shape
        given = stored.reshape(-1, inner)
        if inner % self.multiple:
            given = functional.pad(given, (0, -inner % self.multiple))
        own = self.rows, self.factor, self.excess, None if bias is None else bias.detach()
        result: Tensor = kernels().linear(given.contiguous(), *own, dtype, activation, factor, zero_point)
        return result.reshape(*stored.shape[:-1], outer)


def to_integers(values: Tensor, factor: Tensor, lowest: int, highest: int, zero: int) -> Tensor:
    """``clamp(round(values * factor), lowest, highest) + zero``, int8, in one pass over memory."""
    result: Tensor = kernels().round_to_int8(values, factor, lowest, highest, zero)
    return result


def kernels() -> Any:
    """The module of kernels, which imports Triton."""
    from qdq_surgery.integers import triton_kernels

    return triton_kernels
