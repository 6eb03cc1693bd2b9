"""Weights that transformers stores in another form than it runs (three projections as one): ranges stay out of that.

A range is named after the module that its quantizer lies in, and transformers finds what it joins by parts of names. Of
its conversions only the first that fits a name applies, so one that does nothing goes before them.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from qdq_surgery.match.site_names import INTEGERS_SUFFIX, STATE_SUFFIXES

__all__ = ["keep_ranges_apart"]


class _Keep(ConversionOps):  # type: ignore[misc]
    """Nothing is done to a range, there or back."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> _Keep:
        return self


def keep_ranges_apart(model: PreTrainedModel) -> None:
    """Let transformers' conversions of weights pass by the ranges of ``model`` when it is saved."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        # What save_pretrained takes for a model that it has not loaded itself.
        known = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [each for each in known if type(each).__name__ != "PrefixChange"]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    if not converters or any(isinstance(op, _Keep) for each in converters for op in each.operations):
        return
    # The last is the first one backwards.
    apart = [WeightConverter([suffix], [suffix], [_Keep()]) for suffix in (*STATE_SUFFIXES, INTEGERS_SUFFIX)]
    model._weight_conversions = [*conversions, *apart]
