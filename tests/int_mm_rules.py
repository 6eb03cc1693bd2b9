"""What ``torch._int_mm`` refuses on an NVIDIA GPU, refused on a CPU, too; and frozen models that multiply by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qdq_surgery.integers import choice
from qdq_surgery.integers.int_mm import IntMMProduct
from qdq_surgery.safety import torch_private

__all__ = ["KERNELS", "int_mm_as_on_cuda", "take_kernel"]

#: What products on a CPU can be made to run on.
KERNELS = ["oneDNN", "_int_mm"]


def int_mm_as_on_cuda(one: Tensor, other: Tensor, **more: Any) -> Tensor:
    """``torch._int_mm`` with the checks of torch's CUDA code, and the one layout that cuBLASLt has kernels for."""
    assert one.dtype == other.dtype == torch.int8
    assert one.ndim == other.ndim == 2
    assert one.shape[0] > 16, f"{one.shape[0]} rows"
    assert one.shape[1] > 0, "nothing to sum over"
    assert one.shape[1] % 8 == 0, f"sums over {one.shape[1]}"
    assert other.shape[1] > 0, "no columns"
    assert other.shape[1] % 8 == 0, f"{other.shape[1]} columns"
    assert one.is_contiguous(), "rows first"
    assert other.t().is_contiguous(), "columns first"
    return torch._int_mm(one, other, **more)


def take_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the test runs, products on the CPU are those of one of :data:`KERNELS`."""
    if kernel == "_int_mm":
        monkeypatch.setitem(choice.PRODUCTS, "cpu", IntMMProduct)
        monkeypatch.setattr(torch_private, "int_mm", int_mm_as_on_cuda)
