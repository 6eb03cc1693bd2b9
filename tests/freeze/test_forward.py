"""A block without quantizers runs its original code where no graph holds, and computes the same."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from frozen_models import calibrated, frozen
from torch import nn
from transformers.cache_utils import DynamicCache

import qdq_surgery as qs
from qdq_surgery.freeze.forward import _MOST_REFUSED, FrozenForward

ATTENTION = "encoder.layer.0.attention.self"


def forward_of(model: Any) -> tuple[nn.Module, FrozenForward]:
    block = model.get_submodule(ATTENTION)
    return block, vars(block)["_qdq_forward"]


def states(batch: int = 2, tokens: int = 5) -> torch.Tensor:
    return torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_call_of_a_new_kind_is_recorded() -> None:
    block, own = forward_of(frozen())
    before = len(own.variants.found)
    for _ in range(2):
        block(states(), attention_mask=None, is_causal=False)
    assert len(own.variants.found) == before + 1
    assert "query_input_grid" in own.variants.found[0].source


@torch.no_grad()
def test_a_call_that_cannot_be_recorded_runs_the_original_and_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen()
    block, own = forward_of(model)
    tried: list[int] = []
    record = FrozenForward._compile_for

    def counting(*args: Any) -> Any:
        tried.append(1)
        return record(*args)

    monkeypatch.setattr(FrozenForward, "_compile_for", counting)
    wanted, _ = block(states(), attention_mask=None)
    tried.clear()
    for _ in range(3):
        cache = DynamicCache(config=model.config)
        found, _ = block(states(), attention_mask=None, past_key_values=cache)
        # The block's own code is an encoder's: it takes the cache or leaves it, and computes the same.
        assert torch.allclose(found, wanted, atol=1e-6)
    assert tried == [1]
    assert len(own.refused) == 1 <= _MOST_REFUSED


@torch.no_grad()
def test_with_quantizers_of_its_own_a_block_refuses_as_before() -> None:
    """DeBERTa's attention multiplies in its own forward: without its graph the quantizers would be passed by."""
    model = frozen("deberta-v2", "qdqbert", num_hidden_layers=1)
    block, own = forward_of(model)
    assert type(own) is FrozenForward
    assert own.edits
    with pytest.raises(qs.TraceError, match="is handed a object as argument"):
        own(block, (states(), object()), {})


@torch.no_grad()
def test_copies_and_pickles() -> None:
    model = frozen()
    block, own = forward_of(model)
    wanted, _ = block(states(), attention_mask=None)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other, forward = forward_of(again)
        assert type(forward) is FrozenForward
        assert forward is not own
        assert torch.equal(other(states(), attention_mask=None)[0], wanted)
        assert forward.variants.found


def test_the_quantized_model_runs_another() -> None:
    qmodel = calibrated()
    assert "_qdq_forward" not in vars(qmodel.get_submodule(ATTENTION))
    qs.freeze(qmodel)
    assert "_qdq_forward" not in vars(qmodel.get_submodule(ATTENTION))
