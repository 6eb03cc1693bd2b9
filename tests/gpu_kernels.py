"""Kernels of NVIDIA GPUs on a CPU: what ``torch._int_mm`` refuses there, what Triton's kernels compute; and models."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor

from qdq_surgery.integers import choice, triton_product
from qdq_surgery.integers.int_mm import IntMMProduct
from qdq_surgery.integers.product import ACTIVATIONS
from qdq_surgery.integers.triton_product import TritonProduct
from qdq_surgery.safety import torch_private

__all__ = ["KERNELS", "int_mm_as_on_cuda", "take_kernel", "triton_in_torch"]

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


def _linear(
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
    """What the kernel computes, with what it demands."""
    assert stored.dtype == weight.dtype == torch.int8
    assert stored.is_contiguous()
    assert weight.is_contiguous()
    assert stored.shape[1] == weight.shape[1]
    assert stored.shape[1] % 16 == 0
    sums = stored.int() @ weight[: len(factor)].int().t()
    values = (sums if excess is None else sums - excess) * factor
    values = values if bias is None else values + bias
    values = ACTIVATIONS[activation](values) if activation else values
    if following is None:
        return values.to(dtype)
    return _round_to_int8(values, following, -zero_point, 255 - zero_point, zero_point - 128)


def _round_to_int8(values: Tensor, factor: Tensor, lowest: int, highest: int, zero: int) -> Tensor:
    return ((values.float() * factor).round().clamp(lowest, highest) + zero).to(torch.int8)


#: Triton's kernels, in torch's operators.
triton_in_torch = types.SimpleNamespace(linear=_linear, round_to_int8=_round_to_int8)


def take_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the test runs, products on the CPU are those of one of :data:`KERNELS`, or of ``Triton``."""
    if kernel == "Triton":
        monkeypatch.setitem(choice.PRODUCTS, "cpu", (TritonProduct,))
        monkeypatch.setattr(triton_product, "kernels", lambda: triton_in_torch)
    if kernel == "_int_mm":
        monkeypatch.setitem(choice.PRODUCTS, "cpu", (IntMMProduct,))
        monkeypatch.setattr(torch_private, "int_mm", int_mm_as_on_cuda)
