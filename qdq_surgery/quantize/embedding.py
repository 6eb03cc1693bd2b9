"""The embedding with a quantizer on its table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qdq_surgery.errors import CalibrationError
from qdq_surgery.numerics.fake_quant import exporting_to_onnx
from qdq_surgery.quantize.export_node import is_tagged
from qdq_surgery.quantize.misfits import rounding_misfit
from qdq_surgery.quantize.quantizer import SMALLEST_LEARNED, TensorQuantizer

__all__ = ["QuantEmbedding"]


class QuantEmbedding(nn.Embedding):
    """What an ``nn.Embedding`` becomes, in place: same object, same parameters, same hooks.

    ``_weight_quantizer`` is a child, as that of a linear. Rows are looked up, and then rounded by the ranges of their
    rows: to the bit what a table that is rounded as a whole gives, and a small part of the work.
    """

    _weight_quantizer: TensorQuantizer
    #: For code that asks linears: nothing is done to what an embedding is given.
    _input_quantizer = None
    channel_scale = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Embedding gives it)
        """(...) integers to (..., embedding_dim), as nn.Embedding does, of rounded rows.

        Raises:
            CalibrationError: The table has other rows than its ranges are for.
        """
        quantizer = self._weight_quantizer
        if quantizer.quantizes:
            self._check_rows()
        if _by_row(quantizer, self.weight):
            rows: Tensor = super().forward(input)
            return quantizer._rounded(rows, self.ranges_of(input, rows))
        table: Tensor = quantizer(self.weight)
        return functional.embedding(
            input, table, self.padding_idx, None, scale_grad_by_freq=self.scale_grad_by_freq, sparse=self.sparse
        )

    def ranges_of(self, input: Tensor, rows: Tensor) -> Tensor:  # noqa: A002
        """The range of each of ``rows``, (..., 1); where there is one for all of them, or for each column, that.

        Args:
            input: Their numbers.
        """
        quantizer = self._weight_quantizer
        if quantizer.amax is None and quantizer.axes == (0,):
            return rows.detach().abs().amax(-1, keepdim=True) * (quantizer._scale_amax or 1.0)
        amax: Tensor = quantizer._get_amax(self.weight)
        if quantizer.learns and torch.is_grad_enabled():
            amax.data.clamp_(min=SMALLEST_LEARNED)  # an optimizer knows of no limit
        return functional.embedding(input, amax) if amax.ndim == 2 and amax.shape[0] > 1 else amax

    def _check_rows(self) -> None:
        """Whether there is a range for each row: a table may have been made longer."""
        quantizer = self._weight_quantizer
        amax = quantizer.amax
        problem = None if amax is None else quantizer.misfit(amax.shape, self.weight.shape)
        if problem is not None:
            raise CalibrationError(
                f"the table of {quantizer._name()} has other rows than its ranges are for ({problem}); call "
                "qdq_surgery.recalibrate_weights, or calibrate the model again"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}weight" in state_dict:
            self._weight_quantizer.set_rounding(None)  # as in a linear
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        name = f"{prefix}_weight_quantizer._amax"
        amax, steps = state_dict.get(name), state_dict.get(f"{prefix}_weight_quantizer._rounding")
        if amax is not None and amax.ndim > 0:
            problem = self._weight_quantizer.misfit(amax.shape, self.weight.shape)
            if problem is not None:
                args[-1].append(f"{name}: {problem}")  # torch's list of errors, which it raises at the end
        if steps is not None:
            problem = rounding_misfit(steps.dtype, steps.shape)
            args[-1].append(f"{prefix}_weight_quantizer._rounding: {problem}")


def _by_row(quantizer: TensorQuantizer, table: Tensor) -> bool:
    """Whether rows can be rounded after they were looked up, and nobody wants to see the whole table."""
    watched = quantizer._if_calib or quantizer._forward_hooks or quantizer._forward_pre_hooks
    odd = quantizer._modules or not quantizer._fake_quant or quantizer.use_fb_fake_quant  # clips, integers, no rows
    by_row = quantizer.rounding is None and (quantizer.amax is not None or quantizer.axes == (0,))
    inside = is_tagged() or exporting_to_onnx(table)
    return quantizer.quantizes and by_row and not odd and not watched and not inside
