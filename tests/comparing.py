"""Comparisons that several test files make."""

from __future__ import annotations

from typing import Any

import torch
from architectures import tensors_of
from transformers import PreTrainedModel

import qdq_surgery as qs


def assert_same(model: PreTrainedModel, qmodel: PreTrainedModel, batch: dict[str, Any], **options: Any) -> None:
    """Outputs are equal, and random numbers are drawn alike."""
    with qs.quantization_disabled(qmodel):
        torch.manual_seed(7)
        wanted = tensors_of(model(**batch, **options))
        after = torch.rand(1)
        torch.manual_seed(7)
        found = tensors_of(qmodel(**batch, **options))
        assert torch.equal(torch.rand(1), after)
    assert wanted.keys() == found.keys()
    assert wanted
    for name, value in wanted.items():
        assert torch.equal(found[name], value), f"{name} of {list(batch)}, {options}"
