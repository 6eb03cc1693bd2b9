"""Ranges in training: fixed, learned, or found again from the weights."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from architectures import build
from pytorch_quantization import nn as quant_nn
from torch import Tensor, nn
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.errors import CalibrationError, ModelError
from qdq_surgery.numerics.range_methods import channel_mse_amax
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec
from qdq_surgery.surgery.model_state import state_of

Batch = dict[str, Any]
CLASSIFIER = "BertForSequenceClassification"
LAYER = "bert.encoder.layer.0."
IDS = torch.randint(3, 60, (8, 6), generator=torch.Generator().manual_seed(0))
BATCH: Batch = {
    "input_ids": IDS,
    "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2] * 4),
    "labels": (IDS[:, 0] > 30).long(),
}
DATA = {name: value for name, value in BATCH.items() if name != "labels"}


@functools.cache
def _calibrated(rules: str, **options: Any) -> PreTrainedModel:
    qmodel = qs.convert(build("bert", CLASSIFIER, num_hidden_layers=1, **options), rules, inplace=True)
    qs.calibrate(qmodel, [DATA])
    return qmodel


def calibrated(rules: str = "qdqbert", **options: Any) -> PreTrainedModel:
    """A copy, as conversion takes longer."""
    return copy.deepcopy(_calibrated(rules, **options))


def ranges(qmodel: nn.Module) -> dict[str, Tensor]:
    return {name: each.amax.detach().clone() for name, each in qs.quantizers(qmodel).items() if each.amax is not None}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert wanted
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def train(qmodel: nn.Module, steps: int = 12, lr: float = 2e-3) -> list[float]:
    """A loop as anyone writes it; the loss of each step."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in qmodel.parameters() if p.requires_grad], lr=lr)
    qmodel.train()
    losses = []
    for _ in range(steps):
        loss = qmodel(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    qmodel.eval()
    return losses


# Fixed ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_a_plain_loop_lowers_the_loss(learned: bool) -> None:
    qmodel = calibrated(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if learned:
        qs.learn_ranges(qmodel, weights=True)
    before = ranges(qmodel)
    losses = train(qmodel)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.7 * losses[0]
    if not learned:
        assert_equal(ranges(qmodel), before)
        assert not any(name.endswith("._amax") for name, _ in qmodel.named_parameters())
    else:
        moved = [name for name, amax in ranges(qmodel).items() if not torch.equal(amax, before[name])]
        assert len(moved) > 0.9 * len(before)
        assert all(bool((amax > 0).all()) for amax in ranges(qmodel).values())


def test_weights_get_gradients_through_the_quantizers() -> None:
    qmodel = calibrated()
    qmodel(**BATCH).loss.backward()
    linears = {name: m for name, m in qmodel.named_modules() if isinstance(m, quant_nn.QuantLinear)}
    assert len(linears) == 6
    for name, linear in linears.items():
        assert linear.weight.grad is not None
        assert bool(linear.weight.grad.abs().sum() > 0), name


# Learned -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [False, True], ids=["activations", "weights-too"])
def test_learn_ranges(weights: bool) -> None:
    qmodel = calibrated()
    before, report = ranges(qmodel), state_of(qmodel).calibration
    with torch.no_grad():
        outputs = qmodel(**DATA).logits
    names = set(qmodel.state_dict())
    parameters = qs.learn_ranges(qmodel, weights=weights)
    found = qs.quantizers(qmodel)
    wanted = {name for name in found if weights or not name.endswith("_weight_quantizer")}
    assert {name for name, each in found.items() if each.learns} == wanted
    assert len(parameters) == len(wanted) == (20 if weights else 14)
    assert {id(each) for each in parameters} == {id(found[name].amax) for name in wanted}
    assert {id(each) for each in parameters} <= {id(each) for each in qmodel.parameters()}
    assert all(each.requires_grad and each.dtype == torch.float32 for each in parameters)
    assert_equal(ranges(qmodel), before)
    assert set(qmodel.state_dict()) == names
    assert state_of(qmodel).calibration is report
    with torch.no_grad():
        assert torch.equal(qmodel(**DATA).logits, outputs)
    # Again: the same parameters, as an optimizer may hold them.
    assert {id(each) for each in qs.learn_ranges(qmodel, weights=weights)} == {id(each) for each in parameters}


def test_learned_ranges_get_gradients_and_the_same_outputs() -> None:
    fixed = calibrated(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    learned = calibrated(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    parameters = qs.learn_ranges(learned, weights=True)
    loss, wanted = learned(**BATCH).loss, fixed(**BATCH).loss
    assert torch.equal(loss, wanted)
    loss.backward()
    wanted.backward()
    assert all(each.grad is not None and bool(each.grad.isfinite().all()) for each in parameters)
    assert sum(bool((each.grad != 0).any()) for each in parameters if each.grad is not None) > 0.9 * len(parameters)
    # The weights' gradients do not depend on who moves the range: inside it passes, at its edge and beyond, LSQ's
    # estimate and pytorch-quantization's differ, but max leaves nothing beyond.
    others = dict(fixed.named_parameters())
    for name, each in learned.named_parameters():
        if not name.endswith("._amax"):
            assert torch.allclose(each.grad, others[name].grad, rtol=1e-3, atol=1e-5), name


def test_disabled_quantizers_do_not_learn() -> None:
    qmodel = calibrated()
    found = qs.quantizers(qmodel)
    name = f"{LAYER}output.dense._input_quantizer"
    found[name].disable()
    found[name].reset_amax()
    assert len(qs.learn_ranges(qmodel)) == 13
    assert not found[name].learns


def test_a_quantizer_without_a_range_cannot_learn() -> None:
    qmodel = calibrated()
    found = qs.quantizers(qmodel)
    name = f"{LAYER}output.dense._input_quantizer"
    found[name].reset_amax()
    with pytest.raises(CalibrationError, match=rf"{name} has no range to learn from: calibrate the model first"):
        qs.learn_ranges(qmodel)
    assert not any(each.learns for each in found.values())


def test_a_weight_without_a_range_matters_only_if_weights_learn() -> None:
    qmodel = calibrated()
    name = f"{LAYER}output.dense._weight_quantizer"
    qs.quantizers(qmodel)[name].reset_amax()
    with pytest.raises(CalibrationError, match=name):
        qs.learn_ranges(qmodel, weights=True)
    assert len(qs.learn_ranges(qmodel)) == 14


def test_fix_ranges() -> None:
    qmodel = calibrated()
    qs.learn_ranges(qmodel, weights=True)
    train(qmodel, steps=3)
    moved = ranges(qmodel)
    qs.fix_ranges(qmodel)
    assert not any(each.learns for each in qs.quantizers(qmodel).values())
    assert_equal(ranges(qmodel), moved)
    train(qmodel, steps=3)
    assert_equal(ranges(qmodel), moved)
    qs.fix_ranges(qmodel)
    assert_equal(ranges(qmodel), moved)


def test_fix_ranges_of_a_model_that_has_none() -> None:
    qmodel = qs.convert(build("bert", CLASSIFIER, num_hidden_layers=1), inplace=True)
    qs.fix_ranges(qmodel)
    assert ranges(qmodel) == {}


def test_calibrating_again_keeps_ranges_learned() -> None:
    qmodel = calibrated()
    before = ranges(qmodel)
    qs.learn_ranges(qmodel)
    train(qmodel, steps=2, lr=1e-2)
    assert not torch.equal(ranges(qmodel)[f"{LAYER}output.dense._input_quantizer"], torch.zeros(()))
    qs.calibrate(qmodel, [DATA], "max")
    assert sum(each.learns for each in qs.quantizers(qmodel).values()) == 14
    fresh = qs.convert(build("bert", CLASSIFIER, num_hidden_layers=1), inplace=True)
    fresh.load_state_dict({k: v for k, v in qmodel.state_dict().items() if not k.endswith("._amax")}, strict=False)
    qs.calibrate(fresh, [DATA], "max")
    assert_equal(ranges(qmodel), ranges(fresh))
    assert any(not torch.equal(amax, before[name]) for name, amax in ranges(qmodel).items())


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_a_state_dict_goes_into_a_fresh_conversion(learned: bool) -> None:
    qmodel = calibrated()
    if learned:
        qs.learn_ranges(qmodel, weights=True)
    train(qmodel, steps=2)
    fresh = qs.convert(build("bert", CLASSIFIER, seed=1, num_hidden_layers=1), inplace=True)
    fresh.load_state_dict(qmodel.state_dict())
    assert_equal(ranges(fresh), ranges(qmodel))
    with torch.no_grad():
        assert torch.equal(fresh(**DATA).logits, qmodel(**DATA).logits)


# Found again ---------------------------------------------------------------------------------------------------------


def test_recalibrate_weights() -> None:
    qmodel = calibrated()
    before = ranges(qmodel)
    train(qmodel, steps=3)
    assert_equal(ranges(qmodel), before)
    qs.recalibrate_weights(qmodel)
    after = ranges(qmodel)
    modules = dict(qmodel.named_modules())
    for name, amax in after.items():
        if name.endswith("_weight_quantizer"):
            weight = modules[name.rpartition(".")[0]].weight.detach()
            assert torch.equal(amax, weight.abs().amax(1, keepdim=True)), name
            assert not torch.equal(amax, before[name]), name
        else:
            assert torch.equal(amax, before[name]), name


def test_recalibrate_weights_by_their_rule() -> None:
    rules = qs.load_rules("qdqbert")
    spec = QuantSpec(axis=0, calibrator=CalibratorSpec("mse"), max_amax=0.5)
    rules = dataclasses.replace(rules, specs={**rules.specs, "weight": spec})
    qmodel = qs.convert(build("bert", CLASSIFIER, num_hidden_layers=1), rules, inplace=True)
    qs.calibrate(qmodel, [DATA])
    with torch.no_grad():
        linear = qmodel.bert.encoder.layer[0].intermediate.dense
        linear.weight.mul_(3.0)
    qs.recalibrate_weights(qmodel)
    wanted = channel_mse_amax(linear.weight.detach(), 0)
    assert bool((wanted > 0.5).any())
    assert bool((wanted < 0.5).any())
    assert torch.equal(linear._weight_quantizer.amax, wanted.clamp(max=0.5))


def test_recalibrate_weights_keeps_groups_equal() -> None:
    qmodel = calibrated("fuse-qkv")
    attention = qmodel.bert.encoder.layer[0].attention.self
    with torch.no_grad():
        attention.key.weight.mul_(5.0)
    qs.recalibrate_weights(qmodel)
    largest = max(getattr(attention, which).weight.detach().abs().max() for which in ("query", "key", "value"))
    for which in ("query", "key", "value"):
        amax = getattr(attention, which)._weight_quantizer.amax
        assert amax.shape == ()
        assert float(amax) == float(largest), which


def test_recalibrate_weights_leaves_learned_and_disabled_ranges() -> None:
    qmodel = calibrated()
    found = qs.quantizers(qmodel)
    learned, disabled = f"{LAYER}output.dense._weight_quantizer", f"{LAYER}intermediate.dense._weight_quantizer"
    found[learned].learn_amax()
    found[disabled].disable()
    before = ranges(qmodel)
    with torch.no_grad():
        for parameter in qmodel.bert.encoder.parameters():
            if parameter.ndim > 1 and parameter.shape[1] > 1:
                parameter.mul_(2.0)
    qs.recalibrate_weights(qmodel)
    after = ranges(qmodel)
    for name in (learned, disabled):
        assert torch.equal(after[name], before[name])
    name = f"{LAYER}attention.self.query._weight_quantizer"
    assert torch.equal(after[name], 2.0 * before[name])  # a power of two: exact


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_recalibrate_weights_that_are_no_numbers(value: float) -> None:
    qmodel = calibrated()
    before = ranges(qmodel)
    with torch.no_grad():
        qmodel.bert.encoder.layer[0].attention.self.query.weight.mul_(2.0)
        qmodel.bert.encoder.layer[0].output.dense.weight[1, 1] = value
    with pytest.raises(CalibrationError, match=rf"{LAYER}output\.dense\._weight_quantizer: the weight has a NaN"):
        qs.recalibrate_weights(qmodel)
    assert_equal(ranges(qmodel), before)


@pytest.mark.parametrize("call", [qs.learn_ranges, qs.fix_ranges, qs.recalibrate_weights], ids=lambda c: c.__name__)
def test_a_model_that_is_not_converted(call: Any) -> None:
    with pytest.raises(ModelError, match="is not converted"):
        call(build("bert", CLASSIFIER, num_hidden_layers=1))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "data-parallel"])
def test_wrapped_models(wrap: Any) -> None:
    qmodel = calibrated()
    wrapped = wrap(qmodel)
    assert len(qs.learn_ranges(wrapped)) == 14
    qs.recalibrate_weights(wrapped)
    qs.fix_ranges(wrapped)
    assert not any(each.learns for each in qs.quantizers(qmodel).values())


# Precision and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_autocast(learned: bool) -> None:
    qmodel = calibrated(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if learned:
        qs.learn_ranges(qmodel, weights=True)
    reference = float(qmodel(**BATCH).loss.detach())
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            loss = qmodel(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    # bfloat16 has 8 bits of mantissa; the loss is about 1.
    assert losses[0] == pytest.approx(reference, abs=0.1)
    assert losses[-1] < losses[0]
    assert all(bool(p.isfinite().all()) for p in qmodel.parameters())
    assert all(amax.dtype == torch.float32 for amax in ranges(qmodel).values())


def checkpoint(qmodel: PreTrainedModel, reentrant: bool) -> None:
    # Older transformers lack the first name, 5.23 deprecates the second.
    enable = getattr(qmodel, "activation_checkpointing_enable", None) or qmodel.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(learned: bool, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        qmodel = calibrated()  # with dropout
        if learned:
            qs.learn_ranges(qmodel, weights=True)
        if checkpointing:
            checkpoint(qmodel, reentrant)
            qmodel.enable_input_require_grads()
        qmodel.train()
        torch.manual_seed(3)
        qmodel(**BATCH).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in qmodel.named_parameters() if p.grad is not None})
    assert_equal(gradients[1], gradients[0])
    assert sum(name.endswith("._amax") for name in gradients[0]) == (20 if learned else 0)


def test_quantizers_are_run_again_when_checkpointed() -> None:
    # What the test above compares: a block that runs twice.
    qmodel = calibrated()
    checkpoint(qmodel, reentrant=False)
    calls: list[int] = []
    quantizer = qs.quantizers(qmodel)[f"{LAYER}attention.self.matmul_q_input_quantizer"]
    quantizer.register_forward_hook(lambda *_: calls.append(1))
    qmodel.train()
    qmodel(**BATCH).loss.backward()
    assert len(calls) == 2
