"""Calibrated models for the tests that take them into other libraries, and which quantizers a call really runs."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from typing import Any

import torch
from architectures import batch_for, build
from torch import Tensor, nn
from torch.utils.data import Dataset
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


# What worker processes run: here, since they import the module that it is in.


def ddp_worker(rank: int, folder: str, qmodel: PreTrainedModel, batches: list[dict[str, Tensor]]) -> None:
    """One of two processes: its half of the data; its gradients, ranges and logits go into ``folder``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    if rank == 1:  # the first process tells the others what ranges are
        for each in qs.quantizers(qmodel).values():
            each.amax.data.mul_(3.0)
    # BertForSequenceClassification uses every parameter; ranges of weights among them.
    parallel = nn.parallel.DistributedDataParallel(qmodel.train())
    parallel(**batches[rank]).loss.backward()
    gradients = {name: each.grad for name, each in qmodel.named_parameters()}
    qmodel.eval()
    with torch.no_grad():
        logits = parallel(**batches[0]).logits
    torch.save((gradients, ranges(qmodel), logits), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


class Scored(Dataset[Tensor]):
    """Logits, from a model that runs where the loader does its work."""

    def __init__(self, qmodel: PreTrainedModel, batches: list[dict[str, Tensor]]) -> None:
        self._qmodel, self._batches = qmodel, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self._qmodel(**self._batches[index]).logits
        return logits
