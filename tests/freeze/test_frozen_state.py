"""A frozen model says what it is, to this package and to transformers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch_for, build
from frozen_models import apart, calibrated, frozen, outputs
from torch import nn
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.errors import ModelError
from qdq_surgery.freeze.frozen_state import frozen_state


@pytest.mark.parametrize(
    "call",
    [
        qs.learn_ranges,
        qs.recalibrate_weights,
        lambda model: qs.calibrate(model, [batch_for(model, (2, 5))]),
        lambda model: qs.export_onnx(model, "model.onnx"),
        lambda model: qs.explain(model, "encoder"),
        lambda model: qs.sensitivity(model, [batch_for(model, (2, 5))]),
        lambda model: qs.diff(build("bert", "BertModel"), model),
        qs.freeze,
    ],
)
def test_what_needs_quantizers_says_that_it_is_frozen(call: Callable[[Any], object]) -> None:
    with pytest.raises(
        qs.ModelError, match=r"this BertModel is frozen: .* use the quantized model that it was made of"
    ):
        call(frozen())


@pytest.mark.parametrize("rules", ["linear-only", "qdqbert"])
def test_it_is_not_converted_again(rules: str) -> None:
    with pytest.raises(
        qs.ModelError, match=r"quantized by the method 'qdq_surgery_frozen' already|holds quantizers already"
    ):
        qs.convert(frozen("bert", rules))


def test_states_are_read_and_not_loaded() -> None:
    model = frozen()
    state = model.state_dict()
    assert state["encoder.layer.0.output.dense._weight_quantizer._integers"].dtype == torch.int8
    with pytest.raises(qs.ModelError, match="its weights are fixed; load into the quantized model"):
        model.load_state_dict(state)


def test_saved_before_and_frozen_after_loading(tmp_path: Path) -> None:
    qmodel = calibrated(num_hidden_layers=1)
    qmodel.save_pretrained(tmp_path)
    again = qs.freeze(type(qmodel).from_pretrained(tmp_path))
    batch = batch_for(qmodel, (2, 5))
    with torch.no_grad():
        assert torch.equal(again(**batch)[0], qs.freeze(qmodel)(**batch)[0])


def test_it_has_no_float_form() -> None:
    with pytest.raises(qs.ModelError, match="holds no float weights; dequantize the quantized model"):
        frozen().dequantize()


def test_it_is_not_trained() -> None:
    model = frozen()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.hf_quantizer.is_trainable is False
    with pytest.raises(qs.ModelError, match="frozen, for inference only, and it is in training mode"):
        model.train()(**batch_for(model, (2, 5)))


def test_only_a_frozen_model_has_a_state() -> None:
    model = frozen("bert", "qdqbert")
    assert frozen_state(model).plan.rules.name == "qdqbert"
    for other in (calibrated(), build("bert", "BertModel")):
        assert isinstance(other, PreTrainedModel)
        with pytest.raises(qs.ModelError, match=r"is not frozen; call qdq_surgery.freeze"):
            frozen_state(other)


@pytest.mark.parametrize("where", [torch.float16, torch.float64, "meta"])
@pytest.mark.parametrize("copied", [False, True])
def test_where_it_cannot_go_nothing_of_it_goes(where: Any, copied: bool) -> None:
    model = frozen(num_hidden_layers=1)
    model = copy.deepcopy(model) if copied else model
    batch = batch_for(model, (2, 5))
    wanted = outputs(model, batch)
    for moved in (model, nn.Sequential(model)):
        with pytest.raises(ModelError, match="is frozen"):
            moved.to(where)
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    assert apart(outputs(model, batch), wanted) == 0.0
    again = pickle.loads(pickle.dumps(model))
    with pytest.raises(ModelError, match="is frozen"):
        again.to(torch.float16)
    assert apart(outputs(again, batch), wanted) == 0.0
    assert {each.dtype for each in model.to(torch.bfloat16).parameters()} == {torch.bfloat16}
