"""The embedding on integers: rows that are stored as int8, and dequantized when they are looked up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from qdq_surgery.errors import ModelError
from qdq_surgery.match.site_names import INTEGERS_SUFFIX
from qdq_surgery.numerics.fake_quant import SMALLEST_AMAX
from qdq_surgery.quantize.embedding import QuantEmbedding

__all__ = ["IntegerEmbedding", "make_integer_embedding"]

#: Whatever casts a model to another dtype leaves these.
_FIXED = ("integers", "divisor")


class IntegerEmbedding(nn.Embedding):
    """What a quantized embedding becomes for inference, in place: same object, same hooks, a quarter of the table.

    What it gives is to the bit what fake quantization gives.

    Attributes:
        weight: ``None``; there is no float table.
        integers: int8, (num_embeddings, embedding_dim).
        divisor: What the integers of each row are divided by, float32, (num_embeddings, 1).
        amax: The ranges that the integers are of, as in a checkpoint.
        dtype: Of the results.
    """

    weight: None  # type: ignore[assignment]
    integers: Tensor
    divisor: Tensor
    amax: Tensor
    dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Embedding gives it)
        """(...) integers to (..., embedding_dim)."""
        rows = functional.embedding(input, self.integers).float()
        return (rows / functional.embedding(input, self.divisor)).to(self.dtype)

    def extra_repr(self) -> str:
        """Sizes, and that these are integers."""
        return f"{self.num_embeddings}, {self.embedding_dim}, int8"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}_weight{INTEGERS_SUFFIX}"] = self.integers
        destination[f"{prefix}_weight_quantizer._amax"] = self.amax

    def _load_from_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        raise ModelError(
            "this model is frozen: its tables are fixed; load into the quantized model, and freeze it again"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerEmbedding:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.integers.device))
        kept = {name: getattr(self, name).to(probe.device) for name in _FIXED}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(kept)
        self.dtype, self.amax = probe.dtype, self.amax.to(probe.device)
        return self


def make_integer_embedding(embedding: QuantEmbedding, integers: Tensor | None = None) -> IntegerEmbedding:
    """Make a calibrated embedding an integer embedding, in place.

    Args:
        integers: Its table, int8, (num_embeddings, embedding_dim), on any device; rounded from its weight if left out.
    """
    quantizer = embedding._weight_quantizer
    amax = quantizer.amax
    assert amax is not None
    dtype = embedding.weight.dtype
    if integers is None:
        integers = quantizer.integers(embedding.weight.detach().float()).to(torch.int8)
    amax = amax.detach().float()
    divisor = torch.where(
        amax <= SMALLEST_AMAX, torch.ones_like(amax), torch.full_like(amax, quantizer.grid.qmax) / amax
    )
    object.__setattr__(embedding, "__class__", IntegerEmbedding)
    made: Any = embedding
    made._modules.pop("_weight_quantizer", None)
    made._parameters["weight"] = None
    made.__dict__.update(dtype=dtype, amax=amax)
    divisor = divisor.reshape(-1, 1).expand(made.num_embeddings, 1).contiguous()
    made._buffers.update(integers=integers.to(amax.device).contiguous(), divisor=divisor)
    made._non_persistent_buffers_set = {*made._non_persistent_buffers_set, *_FIXED}
    assert isinstance(made, IntegerEmbedding)
    return made
