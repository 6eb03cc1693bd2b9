"""Calibrated models for the tests that take them into other libraries, and which quantizers a call really runs."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from typing import Any

import torch
from architectures import batch_for, build
from torch import Tensor, nn
from transformers import PreTrainedModel

import qdq_surgery as qs

CLASSIFIER = "BertForSequenceClassification"


@functools.cache
def _calibrated(model_type: str, head: str, rules: str, options: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    qmodel = qs.convert(build(model_type, head, **dict(options)), rules, inplace=True)
    batch: dict[str, Any] = batch_for(qmodel, (4, 8))
    if dict(options).get("add_cross_attention"):
        batch.update(memory(4))
    qs.calibrate(qmodel, [batch])
    return qmodel


def calibrated(
    model_type: str = "bert", head: str = CLASSIFIER, rules: str = "qdqbert", **options: Any
) -> PreTrainedModel:
    """A converted model with ranges, a copy of its own: conversion takes longer."""
    return copy.deepcopy(_calibrated(model_type, head, rules, tuple(sorted(options.items()))))


def memory(batch: int, seed: int = 0) -> dict[str, Tensor]:
    """What a decoder with cross-attention attends to; the last row is padded."""
    mask = torch.ones(batch, 5, dtype=torch.long)
    mask[-1, 3:] = 0
    states = torch.randn(batch, 5, 32, generator=torch.Generator().manual_seed(seed))
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def called(model: nn.Module, batch: dict[str, Any], **options: Any) -> Counter[str]:
    """How often each quantizer runs in one call of ``model``."""
    counts: Counter[str] = Counter()
    handles = [
        quantizer.register_forward_hook(lambda *_, name=name: counts.update([name]))
        for name, quantizer in qs.quantizers(model).items()
    ]
    try:
        model(**batch, **options)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def ranges(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all ranges."""
    return {name: each.amax.detach().clone() for name, each in qs.quantizers(model).items()}


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """To the bit."""
    assert found.keys() == wanted.keys()
    assert wanted
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
