"""Tiny models, converted, calibrated and frozen, and how far two outputs are apart."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from architectures import BASE, batch_for, build, tensors_of
from torch import Tensor
from transformers import PreTrainedModel

import qdq_surgery as qs

__all__ = ["apart", "calibrated", "frozen", "outputs"]


def _widen(model: PreTrainedModel) -> None:
    """A few channels behind the GELU are many times the others, and have scales of their own, as in trained models."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("intermediate.dense"):
                module.weight[:3] *= torch.tensor([[4.0], [8.0], [16.0]])


@functools.lru_cache(maxsize=4)
def _calibrated(model_type: str, head: str, rules: str, options: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    model = build(model_type, head, **dict(options))
    if (model_type, rules) == ("bert", "pytorch"):
        _widen(model)
    qmodel = qs.convert(model, rules)
    qs.calibrate(qmodel, [batch_for(model, (4, 9))])
    return qmodel


def calibrated(
    model_type: str = "bert", rules: str = "linear-only", head: str | None = None, **options: Any
) -> PreTrainedModel:
    """A calibrated model of one's own."""
    made = _calibrated(model_type, head or BASE[model_type], rules, tuple(sorted(options.items())))
    return copy.deepcopy(made)


@functools.lru_cache(maxsize=4)
def _frozen(model_type: str, rules: str, head: str | None, options: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    return qs.freeze(calibrated(model_type, rules, head, **dict(options)), inplace=True)


def frozen(
    model_type: str = "bert", rules: str = "linear-only", head: str | None = None, **options: Any
) -> PreTrainedModel:
    """The same, frozen: a copy of one that was."""
    return copy.deepcopy(_frozen(model_type, rules, head, tuple(sorted(options.items()))))


def outputs(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors that ``model`` returns, by name."""
    with torch.no_grad():
        return tensors_of(model(**batch))


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two outputs, over the largest value of its tensor."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max().clamp(min=1e-30)) for name in one)
