"""The linear with quantizers on its input and its weight."""

from __future__ import annotations

from typing import Any

from pytorch_quantization import nn as quant_nn
from torch import Tensor
from torch.nn import functional

from qdq_surgery.quantize.export_node import is_tagged
from qdq_surgery.quantize.misfits import rounding_misfit
from qdq_surgery.quantize.quantizer import TensorQuantizer

__all__ = ["QuantLinear"]


class QuantLinear(quant_nn.QuantLinear):  # type: ignore[misc]
    """What an ``nn.Linear`` becomes, in place: same object, same parameters, same hooks.

    ``_input_quantizer`` and ``_weight_quantizer`` are children under pytorch-quantization's names; one of them may be
    missing where a rule quantizes only the other operand.
    """

    _input_quantizer: TensorQuantizer | None
    _weight_quantizer: TensorQuantizer | None

    @property
    def channel_scale(self) -> Tensor | None:
        """What each input channel is divided by before it is rounded, (in_features,); ``None``: nothing.

        The columns of the weight are multiplied by it before they are rounded.
        """
        scale: Tensor | None = None if self._input_quantizer is None else self._input_quantizer.channel_scale
        return scale

    def quantized_weight(self) -> Tensor:
        """The weight as it is multiplied with: rounded, or as it is where nothing rounds it."""
        weight: Tensor = self.weight
        quantizer = self._weight_quantizer
        if quantizer is None:
            return weight
        # In a deployment file the weight is stored rounded: its node there stands for the product, too.
        scale = self.channel_scale if quantizer.quantizes and not is_tagged() else None
        if scale is None:
            plain: Tensor = quantizer(weight)
            return plain
        # In float32: a weight in half precision would be rounded before it is rounded.
        rounded: Tensor = quantizer(weight.float() * scale)
        return (rounded / scale).to(weight.dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Linear gives it)
        """(..., in_features) to (..., out_features), as nn.Linear does, with both operands quantized."""
        if self._input_quantizer is not None:
            input = self._input_quantizer(input)  # noqa: A001
        return functional.linear(input, self.quantized_weight(), self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}weight" in state_dict and self._weight_quantizer is not None:
            self._weight_quantizer.set_rounding(None)  # it was of the weight before; the quantizer takes its own
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for own, quantizer in self._modules.items():
            name = f"{prefix}{own}._amax"
            amax = state_dict.get(name)
            # (A number fits everywhere: it is one range for all channels.)
            if isinstance(quantizer, TensorQuantizer) and amax is not None and amax.ndim > 0:
                weight = self.weight.shape if quantizer is self._weight_quantizer else None
                problem = quantizer.misfit(amax.shape, weight, self.in_features)
                if problem is not None:
                    args[-1].append(f"{name}: {problem}")  # torch's list of errors, which it raises at the end
            steps = state_dict.get(f"{prefix}{own}._rounding")
            if isinstance(quantizer, TensorQuantizer) and steps is not None:
                weight = self.weight.shape if quantizer is self._weight_quantizer else None
                problem = rounding_misfit(steps.dtype, steps.shape, weight)
                if problem is not None:
                    args[-1].append(f"{prefix}{own}._rounding: {problem}")
