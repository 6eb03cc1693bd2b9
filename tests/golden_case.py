"""What the real QDQBERT computes in one case (reference_run.py), and how it is compared."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

import qdq_surgery as qs

#: Where transformers itself changed between 4.40.2 and 5, nothing of ours can be equal to the bit.
ACROSS_VERSIONS = 1e-6


class Golden:
    """What the real one computes in one case: tensors by group."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.meta = file.metadata()
            # Copies lie as torch lays its tensors, not wherever the file has them: kernels round by where data lies.
            self.tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)

    def group(self, name: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{name}/"): v for k, v in self.tensors.items() if k.startswith(f"{name}/")}

    def config(self) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(self.meta["config"])
        return made

    def model(self) -> PreTrainedModel:
        head = getattr(transformers, self.meta["head"])
        model = head(transformers.BertConfig(**self.config(), attn_implementation="eager")).eval()
        missing, unexpected = model.load_state_dict(self.group("weights"), strict=False)
        assert not missing
        assert not unexpected
        return model

    def converted(self) -> PreTrainedModel:
        return qs.convert(self.model(), inplace=True)

    def calibrated(self) -> PreTrainedModel:
        """A copy of its own: conversion takes longer."""
        return copy.deepcopy(self._calibrated)

    @functools.cached_property
    def _calibrated(self) -> PreTrainedModel:
        qmodel = self.converted()
        for name, quantizer in qs.quantizers(qmodel).items():
            quantizer.amax = self.group("amax")[name]
        return qmodel

    def arguments(self) -> dict[str, Tensor]:
        return {**self.group("batch"), **self.group("memory")}


def flat(output: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in output.items():
        if isinstance(value, Tensor):
            found[name] = value.detach()
        elif name in ("hidden_states", "attentions", "cross_attentions"):
            found.update({f"{name}.{index}": item.detach() for index, item in enumerate(value)})
    return found


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert wanted
    assert set(wanted) <= set(found)
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        difference = float((found[name] - value).abs().max())
        assert difference <= tolerance, f"{name} differs by {difference}"


def target_of(golden: Golden, output: Any) -> Tensor:
    """What 4.40.2 differentiates: the loss."""
    if "loss" not in output:
        return output.last_hidden_state.pow(2).sum()
    if golden.meta["head"] == "BertLMHeadModel":
        # transformers 5 shifts the labels instead of the logits, which sums the same numbers in another order.
        logits, labels = output.logits[:, :-1, :].contiguous(), golden.group("batch")["labels"][:, 1:].contiguous()
        return torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))
    return output.loss
