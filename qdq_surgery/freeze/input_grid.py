"""From float to the integers that a product takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qdq_surgery.numerics.fake_quant import SMALLEST_AMAX
from qdq_surgery.quantize.quantizer import TensorQuantizer

__all__ = ["InputGrid"]

#: What a signed integer is stored with: uint8 is the one type that oneDNN takes everywhere.
_SIGNED = 128


class InputGrid(nn.Module):
    """The grid of one activation: what a calibrated quantizer becomes in front of an integer product.

    Args:
        quantizer: A calibrated quantizer of 8 bits, with one range or with one for each channel of the last axis.

    Attributes:
        factor: What values are multiplied by before they are rounded, float32: () or (channels,).
        step: What an integer is worth, float32, ().
        zero_point: The stored integer that means 0.
        lowest, highest: The limits of the stored integers.
    """

    factor: Tensor
    step: Tensor

    def __init__(self, quantizer: TensorQuantizer) -> None:
        super().__init__()
        amax = quantizer.amax
        assert amax is not None
        grid = quantizer.grid.full if quantizer.use_fb_fake_quant else quantizer.grid
        self.zero_point = grid.zero_point if grid.unsigned else _SIGNED
        self.lowest, self.highest = grid.qmin + self.zero_point, grid.qmax + self.zero_point
        self.never_negative = grid.unsigned and not grid.zero_point
        ranges = amax.detach().float().reshape(-1)
        if bool((ranges == ranges[0]).all()):
            ranges = ranges[0]
        # As fake quantization divides: a range that is next to nothing makes everything 0.
        factor = torch.where(ranges <= SMALLEST_AMAX, 0.0, torch.full_like(ranges, grid.qmax) / ranges)
        least = ranges.min()
        step = torch.where(least <= SMALLEST_AMAX, torch.ones_like(least), least / grid.qmax)
        self.register_buffer("factor", factor.clone(), persistent=False)
        self.register_buffer("step", step.clone(), persistent=False)
        self.eval()

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for grids that make the same integers of the same values."""
        return (self.zero_point, self.lowest, self.highest, *self.factor.reshape(-1).tolist(), float(self.step))

    def forward(self, inputs: Tensor) -> Tensor:
        """Any shape (..., channels), floating point, to uint8; what is uint8 has been through here, and passes.

        Raises:
            TypeError: There are negative values, and the grid has none, as fake quantization does.
        """
        if inputs.dtype == torch.uint8:
            return inputs
        work = inputs.float()
        low, high = self.lowest - self.zero_point, self.highest - self.zero_point
        if torch.compiler.is_compiling():
            # What inductor merges into whatever made the values.
            return ((work * self.factor).round().clamp(low, high) + self.zero_point).to(torch.uint8)
        if self.never_negative and bool((work < 0).any()):
            raise TypeError("negative values in a tensor that is to be quantized to an unsigned grid")
        # In place: what costs is memory that is touched for the first time.
        integers = (work * self.factor).round_().clamp_(low, high)
        if self.zero_point != _SIGNED:
            return integers.add_(self.zero_point).to(torch.uint8)
        return integers.to(torch.int8).view(torch.uint8).bitwise_xor_(_SIGNED)

    def dequantize(self, integers: Tensor) -> Tensor:
        """What stored integers stand for, float32: values over the channels' scales, of which the weight has them."""
        return (integers.float() - self.zero_point) * self.step

    def extra_repr(self) -> str:
        """Step, zero point, and how many steps there are."""
        scales = "" if self.factor.ndim == 0 else f", a scale for each of {self.factor.numel()} channels"
        return f"step {float(self.step):.4g}, zero at {self.zero_point}{scales}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputGrid:
        # A factor in bfloat16 would have 8 bits; and there is one device.
        kept = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(kept)
        return self
