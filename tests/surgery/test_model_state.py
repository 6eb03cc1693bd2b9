"""The state of a converted model: one attribute, one type, replaced as a whole."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from torch import nn
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.errors import ModelError
from qdq_surgery.safety.transaction import all_or_nothing
from qdq_surgery.surgery.apply import restore
from qdq_surgery.surgery.model_state import (
    ModelState,
    is_converted,
    plan_of,
    quantized_forwards,
    refuse_lost,
    set_state,
    state_of,
)

INPUTS = {"input_ids": torch.arange(3, 9)[None]}


def calibrated() -> tuple[PreTrainedModel, qs.Calibration]:
    qmodel = qs.convert(build("bert", "BertModel"), inplace=True)
    return qmodel, qs.calibrate(qmodel, [INPUTS])


def test_a_converted_model_has_one_attribute_more_than_transformers_knows() -> None:
    model, (qmodel, _) = build("bert", "BertModel"), calibrated()
    more = {"_qdq_state", "hf_quantizer", "quantization_method", "save_pretrained"}
    assert vars(qmodel).keys() - vars(model).keys() == more


def test_it_holds_the_plan_and_the_calibration() -> None:
    qmodel, made = calibrated()
    assert state_of(qmodel).calibration is made
    assert state_of(qmodel).saved_report is None
    assert plan_of(qmodel) is state_of(qmodel).plan
    assert len(plan_of(qmodel).sites) == len(made.ranges)


def test_it_cannot_be_changed_in_place() -> None:
    qmodel, _ = calibrated()
    with pytest.raises(dataclasses.FrozenInstanceError):
        state_of(qmodel).calibration = None  # type: ignore[misc]


def test_what_fails_leaves_the_state_as_it_was() -> None:
    qmodel, _ = calibrated()
    before = state_of(qmodel)

    def fail() -> None:
        with all_or_nothing(qmodel):
            set_state(qmodel, ModelState(before.plan))
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail()
    assert state_of(qmodel) is before


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_have_a_state_of_their_own(duplicate: Callable[[Any], Any]) -> None:
    qmodel, made = calibrated()
    twin = duplicate(qmodel)
    assert state_of(twin).calibration == made
    assert state_of(twin).plan == plan_of(qmodel)
    set_state(twin, None)
    assert is_converted(qmodel)


def test_a_float_model_has_none() -> None:
    model = build("bert", "BertModel")
    assert not is_converted(model)
    with pytest.raises(ModelError, match="not converted"):
        state_of(model)


def test_a_restored_model_has_none() -> None:
    qmodel, _ = calibrated()
    restore(qmodel)
    assert not is_converted(qmodel)
    assert not any(quantized_forwards(module) for module in qmodel.modules())
    assert not [name for module in qmodel.modules() for name in vars(module) if name.startswith("_qdq_")]


def test_blocks_tell_what_they_run() -> None:
    qmodel, _ = calibrated()
    assert [*quantized_forwards(qmodel.get_submodule("encoder.layer.0.attention.self"))] == ["attention"]
    assert [*quantized_forwards(qmodel.get_submodule("encoder.layer.0.output"))] == ["forward"]
    assert quantized_forwards(nn.Linear(2, 2)) == {}


LOSE: dict[str, Callable[[PreTrainedModel], Any]] = {
    "another linear": lambda model: setattr(model.encoder.layer[0].output, "dense", nn.Linear(48, 32)),
    "no quantizer": lambda model: setattr(model.encoder.layer[0].output.dense, "_input_quantizer", None),
}


@pytest.mark.parametrize("name", LOSE)
def test_a_quantizer_that_was_lost_is_missed(name: str, tmp_path: Path) -> None:
    """What was to be in INT8 would be in float without a word."""
    qmodel, _ = calibrated()
    LOSE[name](qmodel)
    words = r"has lost encoder\.layer\.0\.output\.dense\._input_quantizer .rule 'encoder-linear'. since its conversion"
    with pytest.raises(ModelError, match=words):
        qs.export_onnx(qmodel, tmp_path / "model.onnx")
    assert not any(tmp_path.iterdir())
    for use in (qs.freeze, lambda lost: qs.calibrate(lost, [INPUTS]), lambda lost: qs.sensitivity(lost, [INPUTS])):
        with pytest.raises(ModelError, match=words):
            use(qmodel)


def test_a_layer_that_was_taken_out_is_not_missed() -> None:
    qmodel, made = calibrated()
    qmodel.encoder.layer = qmodel.encoder.layer[:1]
    refuse_lost(qmodel, "the file")
    assert len(made.now(qmodel).ranges) == 20
