"""From float to the integers that a product takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qdq_surgery.errors import ModelError
from qdq_surgery.integers.product import SIGNED, Rounding
from qdq_surgery.numerics import cuda_kernels
from qdq_surgery.numerics.fake_quant import SMALLEST_AMAX
from qdq_surgery.quantize.quantizer import TensorQuantizer

__all__ = ["InputGrid"]


class InputGrid(nn.Module):
    """The grid of one activation: what a calibrated quantizer becomes in front of an integer product.

    Args:
        quantizer: A calibrated quantizer of 8 bits, with one range or with one for each channel of the last axis.

    Attributes:
        factor: What values are multiplied by before they are rounded, float32: () or (channels,).
        step: What an integer is worth, float32, ().
        zero_point: The integer that means 0, where they are stored as uint8.
        lowest, highest: The limits of the integers, counted from that one.
        stored: What integers are stored as: uint8, or int8, in which each is 128 less.
        in_one_pass: What rounds to them on a GPU; ``None`` if torch's operators do.
        order: The order in which the product reads the channels, int64, (channels,); ``None`` for their own.
    """

    factor: Tensor
    step: Tensor
    order: Tensor | None
    #: Whether a tensor was looked at on a GPU, which would be waited for each time.
    _looked = False

    def __init__(self, quantizer: TensorQuantizer) -> None:
        super().__init__()
        amax = quantizer.amax
        assert amax is not None
        grid = quantizer.grid.full if quantizer.use_fb_fake_quant else quantizer.grid
        self.zero_point = grid.zero_point if grid.unsigned else SIGNED
        self.lowest, self.highest = grid.qmin, grid.qmax
        self.stored = torch.uint8
        self.in_one_pass: Rounding | None = None
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
        self.register_buffer("order", None, persistent=False)
        self.eval()

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for grids that make the same integers of the same values."""
        return (self.zero_point, self.lowest, self.highest, *self.factor.reshape(-1).tolist(), float(self.step))

    def forward(self, inputs: Tensor) -> Tensor:
        """Any shape (..., channels), floating point, to integers; what are some has been through here, and passes.

        Raises:
            ModelError: It wants gradients.
            TypeError: There are negative values, and the grid has none, as fake quantization does.
        """
        if inputs.dtype == self.stored:
            return inputs
        if inputs.requires_grad and torch.is_grad_enabled():
            raise ModelError(
                "integers pass no gradients on, and its input wants gradients; call model.eval() and torch.no_grad(), "
                "or train the quantized model"
            )
        stored = self._rounded(inputs)
        return stored if self.order is None else stored.index_select(-1, self.order)

    def _rounded(self, inputs: Tensor) -> Tensor:
        zero = self.zero_point - (SIGNED if self.stored == torch.int8 else 0)
        if torch.compiler.is_compiling():
            # What inductor merges into whatever made the values.
            integers = (inputs.float() * self.factor).round().clamp(self.lowest, self.highest)
            return (integers + zero).to(self.stored)
        self._refuse_negative(inputs)
        if cuda_kernels.runs(inputs, self.factor):
            if self.in_one_pass is not None:
                return self.in_one_pass(inputs, self.factor, self.lowest, self.highest, zero)
            return cuda_kernels.to_integers(inputs, self.factor, self.lowest, self.highest, zero).to(self.stored)
        # In place: what costs is memory that is touched for the first time.
        integers = (inputs.float() * self.factor).round_().clamp_(self.lowest, self.highest)
        if self.stored == torch.int8:
            return (integers.add_(zero) if zero else integers).to(torch.int8)
        # By way of int8: torch casts to it in half the time.
        signed = integers if zero == SIGNED else integers.sub_(SIGNED - zero)
        return signed.to(torch.int8).view(torch.uint8).bitwise_xor_(SIGNED)

    def _refuse_negative(self, inputs: Tensor) -> None:
        elsewhere = inputs.device.type != "cpu"
        if not self.never_negative or (elsewhere and self._looked):
            return
        if bool((inputs < 0).any()):
            raise TypeError("negative values in a tensor that is to be quantized to an unsigned grid")
        self._looked = elsewhere

    def dequantize(self, integers: Tensor) -> Tensor:
        """What stored integers stand for, float32: values over the channels' scales, of which the weight has them."""
        zero = self.zero_point - (SIGNED if integers.dtype == torch.int8 else 0)
        return (integers.float() - zero) * self.step

    def extra_repr(self) -> str:
        """Step, zero point, and how many steps there are."""
        scales = "" if self.factor.ndim == 0 else f", a scale for each of {self.factor.numel()} channels"
        return f"step {float(self.step):.4g}, zero at {self.zero_point}{scales}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputGrid:
        # It goes to another device, and to no other type: a factor in bfloat16 would have 8 bits.
        device = fn(torch.empty(0, device=self.factor.device)).device
        kept = {name: buffer if buffer is None else buffer.to(device) for name, buffer in self._buffers.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(kept)
        return self
