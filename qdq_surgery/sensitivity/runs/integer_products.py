"""Linears that multiply integers while a model is measured, where both their operands are in INT8.

Fake quantization multiplies numbers that stand for integers, in float. The integers themselves are several times as
fast, and their sums are exact. Both give the same to the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qdq_surgery.integers.choice import make_product, unsupported
from qdq_surgery.integers.input_grid import InputGrid
from qdq_surgery.integers.product import Product
from qdq_surgery.integers.weight import to_integers, why_float
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.safety.transaction import put_back_after

__all__ = ["integer_products"]

_FORWARD = "forward"


@contextmanager
def integer_products(model: nn.Module) -> Iterator[None]:
    """While it holds, linears of float32 multiply integers whenever both their quantizers quantize.

    Weights and ranges must not change meanwhile. Linears stay as they are where this machine has no kernel for them,
    where a grid has other than 8 bits, and where somebody looks at what a quantizer is given.
    """
    linears = [each for each in model.modules() if isinstance(each, QuantLinear) and _fits(each)]

    def put_back() -> None:
        for linear in linears:
            linear.__dict__.pop(_FORWARD, None)

    rounded = _Rounded()
    with put_back_after(put_back):
        for linear in linears:
            linear.__dict__[_FORWARD] = _in_integers(linear, linear.forward, rounded)
        yield


class _Rounded:
    """The integers of the tensor that was rounded last: queries, keys and values read one tensor, by equal grids."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, Any, Tensor] | None = None

    def of(self, values: Tensor, grid: InputGrid, key: Any) -> Tensor:
        """What ``grid``, which has this key, makes of them."""
        if values.is_inference():  # nobody counts what is written to it
            return grid(values)  # type: ignore[no-any-return]
        last = self._last
        if last is not None and last[0] is values and last[1] == values._version and last[2] == key:
            return last[3]
        made: Tensor = grid(values)
        self._last = values, values._version, key, made
        return made


def _fits(linear: QuantLinear) -> bool:
    inputs, weight = linear._input_quantizer, linear._weight_quantizer
    if inputs is None or weight is None or why_float(linear) is not None:
        return False
    plain = all(each._num_bits == 8 and not each.learns and not _watched(each) for each in (inputs, weight))
    return plain and linear.weight.dtype == torch.float32 and unsupported(linear.weight.device, torch.float32) is None


def _watched(quantizer: TensorQuantizer) -> bool:
    return bool(quantizer._forward_hooks or quantizer._forward_pre_hooks)


def _in_integers(
    linear: QuantLinear, forward: Callable[[Tensor], Tensor], rounded: _Rounded
) -> Callable[[Tensor], Tensor]:
    quantizers = [each for each in (linear._input_quantizer, linear._weight_quantizer) if each is not None]
    made: list[tuple[InputGrid, Any, Product]] = []

    def run(input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Linear gives it)
        casts = input.dtype != torch.float32 or torch.is_autocast_enabled(input.device.type)
        if casts or not all(each.quantizes and not each._if_calib for each in quantizers):
            return forward(input)
        if not made:
            made.append(_made(linear))
        grid, key, product = made[0]
        if not bool(input.sum().isfinite()):  # no integer stands for what is no number
            return forward(input)
        return product(rounded.of(input, grid, key), linear.bias, torch.float32, "")

    return run


def _made(linear: QuantLinear) -> tuple[InputGrid, Any, Product]:
    assert linear._input_quantizer is not None
    grid = InputGrid(linear._input_quantizer)
    product = make_product(*to_integers(linear), grid.step, grid.zero_point)
    grid.stored = product.stored
    return grid, (grid.key, grid.stored), product
