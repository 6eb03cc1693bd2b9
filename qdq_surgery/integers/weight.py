"""The weight of a quantized linear as integers, and which linears integers are the same for."""

from __future__ import annotations

import torch
from torch import Tensor

from qdq_surgery.numerics.fake_quant import SMALLEST_AMAX
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.quantize.quantizer import TensorQuantizer

__all__ = ["to_integers", "weight_steps", "why_float"]

_FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64


def to_integers(linear: QuantLinear) -> tuple[Tensor, Tensor]:
    """The weight of a calibrated linear as fake quantization rounds it.

    Returns:
        int8, (out_features, in_features), and what an integer of each row is worth, float32, (out_features,).
    """
    quantizer, scale = linear._weight_quantizer, linear.channel_scale
    assert quantizer is not None
    weight = linear.weight.detach().float()
    if scale is not None:
        weight = weight * scale
    integers = quantizer.integers(quantizer.moved(weight))
    return integers.to(torch.int8), weight_steps(quantizer, weight.shape[0])


def weight_steps(quantizer: TensorQuantizer, rows: int) -> Tensor:
    """What an integer of each row is worth, float32, (rows,)."""
    assert quantizer.amax is not None
    amax = quantizer.amax.detach().float()
    steps = torch.where(amax <= SMALLEST_AMAX, torch.ones_like(amax), quantizer.grid.step(amax))
    return steps.reshape(-1).expand(rows).contiguous()


def why_float(linear: QuantLinear) -> str | None:
    """Why a product of integers would not be what a calibrated linear computes; ``None`` if it would.

    How many bits its grids have is another question: kernels have 8.
    """
    sides = {"input": linear._input_quantizer, "weight": linear._weight_quantizer}
    for side, quantizer in sides.items():
        if quantizer is None:
            return f"no rule quantizes its {side}"
        if not quantizer.quantizes:
            return f"its {side} quantizer is disabled"
        if quantizer._modules or not quantizer._fake_quant:
            return f"its {side} quantizer clips, or gives integers, by a descriptor of its own"
    assert linear._input_quantizer is not None
    assert linear._weight_quantizer is not None
    return _misfit(linear, linear._input_quantizer, linear._weight_quantizer)


def _misfit(linear: QuantLinear, inputs: TensorQuantizer, weight: TensorQuantizer) -> str | None:
    amax, rows = weight.amax, linear.weight.shape[0]
    if "forward" in vars(linear):
        return "it has a forward of its own, set on the instance"
    if not inputs.scaled and inputs.amax is not None and inputs.amax.numel() != 1:
        return "its input has ranges along an axis, other than a scale for each channel (axis: -1)"
    if weight.grid.unsigned:
        return "its weight is on an unsigned grid, and integer products have int8 weights"
    if amax is not None and amax.numel() != 1 and tuple(amax.shape) != (rows, 1):
        return "its weight has ranges along another axis than that of the outputs"
    return None if linear.weight.dtype in _FLOATS else f"its weight is {linear.weight.dtype}"
