"""Scales per channel in a model: what they save, what they leave alone, and that everything else still holds."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_TYPE, batch_for, build
from comparing import assert_same
from outlier_model import CHANNELS, OUTLIER, spoiled
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.errors import CalibrationError, ModelError
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.surgery.model_state import state_of

BATCH = batch_for(spoiled(), (4, 10), mask=True)


@functools.cache
def _calibrated(rules: str) -> PreTrainedModel:
    qmodel = qs.convert(spoiled(), rules)
    qs.calibrate(qmodel, [BATCH])
    return qmodel


def calibrated(rules: str = "qdqbert-scaled") -> PreTrainedModel:
    return copy.deepcopy(_calibrated(rules))


def ranges(qmodel: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if each.amax is None else each.amax.detach().clone() for name, each in qs.quantizers(qmodel).items()
    }


def assert_equal_ranges(found: nn.Module, wanted: nn.Module) -> None:
    ours, theirs = ranges(found), ranges(wanted)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value is not None, name
        assert ours[name] is not None, name
        assert torch.equal(ours[name], value), name


#: It sees the hidden states with their outliers.
SITE = "encoder.layer.1.attention.self.query"


def seen(qmodel: PreTrainedModel) -> Tensor:
    """What the linear at :data:`SITE` is given, (tokens, channels), without padding."""
    found: list[Tensor] = []
    linear = qmodel.get_submodule(SITE)
    hook = linear.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
    with torch.no_grad(), qs.quantization_disabled(qmodel):
        qmodel(**BATCH)
    hook.remove()
    return found[0][BATCH["attention_mask"].bool()]


def error(qmodel: PreTrainedModel) -> float:
    """What rounding changes in the channels that are no outliers, as a share of their values."""
    given = seen(qmodel)
    rest = [channel for channel in range(given.shape[-1]) if channel not in CHANNELS]
    with torch.no_grad():
        rounded = qs.quantizers(qmodel)[f"{SITE}._input_quantizer"](given)
    return float((rounded - given)[:, rest].norm() / given[:, rest].norm())


# What they are for ----------------------------------------------------------------------------------------------------


def test_outlier_channels_no_longer_cost_the_others_their_steps() -> None:
    # 60 times the others leaves them two of 127 steps.
    assert error(calibrated("qdqbert")) > 0.1
    assert error(calibrated("qdqbert-scaled")) < 0.01


def test_the_scales_are_those_of_the_outlier_channels() -> None:
    qmodel = calibrated()
    for name, quantizer in qs.quantizers(qmodel).items():
        if name.endswith(("query._input_quantizer", "intermediate.dense._input_quantizer")) and "layer.1" in name:
            scale = quantizer.channel_scale
            assert scale is not None
            assert sorted(scale.topk(2).indices.tolist()) == list(CHANNELS), name
            assert float(scale.topk(2).values.min()) > OUTLIER / 4
            assert float(scale.median()) == 1.0


@pytest.mark.parametrize("features", [(7, 5), (32, 16)])
def test_a_linear_multiplies_integers_that_one_step_each_belongs_to(features: tuple[int, int]) -> None:
    """By brute force: the integers of both operands, multiplied, times one step for the input and one for each row."""
    inputs, outputs = features
    qmodel = calibrated()
    linear = next(each for each in qmodel.modules() if isinstance(each, QuantLinear))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        linear.weight = nn.Parameter(torch.randn(outputs, inputs, generator=generator))
        linear.bias = nn.Parameter(torch.zeros(outputs))
        given = torch.randn(9, inputs, generator=generator)
        given[:, 2] *= 50.0
        tops = given.abs().amax(0)
        scale = tops / tops.min()
        assert linear._input_quantizer is not None
        assert linear._weight_quantizer is not None
        linear._input_quantizer.reset_amax()
        linear._input_quantizer.set_range(tops)
        linear._weight_quantizer.reset_amax()
        linear._weight_quantizer.set_range((linear.weight * scale).abs().amax(1, keepdim=True))
        found = linear(given)
    step, rows = tops.min() / 127, (linear.weight * scale).abs().amax(1) / 127
    left = (given / scale / step).round().clamp(-128, 127)
    right = (linear.weight * scale / rows[:, None]).round().clamp(-128, 127)
    wanted = (left @ right.T) * step * rows
    # Float32 sums of products of integers; a tie may fall the other way.
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-4)


# What holds as ever ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", BY_TYPE)
def test_with_the_quantizers_off_it_is_the_float_model(model_type: str) -> None:
    model = build(model_type, next(head for head in BY_TYPE[model_type].heads() if head.endswith("Model")))
    qmodel = qs.convert(model, "qdqbert-scaled")
    chunks = model.config.to_dict().get("chunk_size_feed_forward")
    batch = batch_for(model, (3, 8), mask=not chunks)
    qs.calibrate(qmodel, [batch])
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in qmodel.state_dict().items() if name in weights)
    assert any(each.scaled for each in qs.quantizers(qmodel).values())
    with qs.quantization_disabled(qmodel):
        for training in (False, True):
            assert_same(model.train(training), qmodel.train(training), batch_for(model, (2, 5), mask=not chunks))


def test_weights_are_untouched_and_come_back() -> None:
    model, qmodel = spoiled(), calibrated()
    for name, weight in model.state_dict().items():
        assert torch.equal(qmodel.state_dict()[name], weight), name
    restored = qmodel.dequantize()
    assert restored.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(restored(**BATCH).last_hidden_state, _eager(model))


def _eager(model: PreTrainedModel) -> Tensor:
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        found: Tensor = model(**BATCH).last_hidden_state
    return found


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    qmodel = calibrated()
    qmodel.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert_equal_ranges(again, qmodel)
    with torch.no_grad():
        assert torch.equal(again(**BATCH).last_hidden_state, qmodel(**BATCH).last_hidden_state)


def test_one_quantizer_alone_is_in_the_units_of_its_tensor() -> None:
    """Whichever of a linear's two is disabled, nothing is left that only the other one would take back."""
    qmodel = calibrated()
    linear = qmodel.get_submodule(SITE)
    assert isinstance(linear, QuantLinear)
    given = seen(qmodel)
    wanted = torch.nn.functional.linear(given, linear.weight, linear.bias)
    for off in (linear._weight_quantizer, linear._input_quantizer):
        assert off is not None
        off.disable()
        # One operand in float: what is left is the rounding of the other.
        with torch.no_grad():
            assert float((linear(given) - wanted).norm() / wanted.norm()) < 0.02
        off.enable()


def test_training_moves_weights_and_not_the_scales() -> None:
    qmodel = calibrated().train()
    before = ranges(qmodel)
    learned = qs.learn_ranges(qmodel, weights=True)
    assert learned
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=1e-3)
    qmodel(**BATCH).last_hidden_state.square().mean().backward()
    optimizer.step()
    for name, quantizer in qs.quantizers(qmodel).items():
        if quantizer.scaled:
            assert not quantizer.learns
            assert torch.equal(ranges(qmodel)[name], before[name]), name  # type: ignore[arg-type]
    gradients = [each.weight.grad for each in qmodel.modules() if isinstance(each, QuantLinear)]
    assert all(each is not None and bool(each.isfinite().all()) and bool(each.any()) for each in gradients)


def test_weights_recalibrated_after_training_know_the_scales() -> None:
    qmodel = calibrated()
    wanted = copy.deepcopy(qmodel)
    for quantizer in qs.quantizers(qmodel).values():
        if quantizer.role == "weight":
            assert quantizer.amax is not None
            quantizer.set_range(quantizer.amax * 3)
    qs.recalibrate_weights(qmodel)
    assert_equal_ranges(qmodel, wanted)


def test_half_precision_runs() -> None:
    qmodel = calibrated()
    with torch.no_grad():
        wanted = qmodel(**BATCH).last_hidden_state
        found = qmodel.to(torch.bfloat16)(**BATCH).last_hidden_state
    assert found.dtype == torch.bfloat16
    # bfloat16 has 8 bits.
    assert float((found.float() - wanted).norm() / wanted.norm()) < 0.03


def test_compiled_it_computes_the_same() -> None:
    """A layer, whose linears are all scaled; after a call in which it is recorded."""
    qmodel = calibrated()
    with torch.no_grad():
        wanted = qmodel(**BATCH).last_hidden_state
        torch._dynamo.reset()
        qmodel.encoder.layer[1].compile(backend="aot_eager", fullgraph=True)
        # A fused multiplication may round once where eager rounds twice, so that a tie falls the other way.
        torch.testing.assert_close(qmodel(**BATCH).last_hidden_state, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("site", "shape", "wanted"),
    [
        (f"{SITE}._input_quantizer", (31,), r"\(32,\)"),
        (f"{SITE}._input_quantizer", (1,), r"\(32,\)"),
        ("encoder.layer.0.output.add_local_input_quantizer", (1, 1, 32), "one axis"),
    ],
)
def test_a_checkpoint_whose_scales_do_not_fit_is_refused(
    site: str, shape: tuple[int, ...], wanted: str, tmp_path: Path
) -> None:
    calibrated().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors[f"{site}._amax"] = torch.ones(shape)
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    with pytest.raises(ModelError, match=rf"range of {site} does not fit: the range has the shape .* wanted {wanted}"):
        AutoModel.from_pretrained(tmp_path)


def test_a_scale_of_nothing_is_refused() -> None:
    quantizer = qs.quantizers(calibrated())[f"{SITE}._input_quantizer"]
    assert quantizer.amax is not None
    before = quantizer.amax.clone()
    with pytest.raises(ValueError, match="needs a range above 0 in each, found 0"):
        quantizer.amax = torch.zeros(32)
    assert torch.equal(quantizer.amax, before)


# equalize -------------------------------------------------------------------------------------------------------------


def test_it_finds_what_calibrate_finds() -> None:
    wanted, qmodel = calibrated(), calibrated()
    for quantizer in qs.quantizers(qmodel).values():
        if quantizer.scaled:
            quantizer.reset_amax()
    qs.equalize(qmodel, [BATCH])
    assert_equal_ranges(qmodel, wanted)


def test_doing_it_again_changes_nothing() -> None:
    qmodel = calibrated()
    statistics = qs.collect(qmodel, [BATCH], histograms=False)
    first, before = qs.equalize(qmodel, statistics), copy.deepcopy(qmodel)
    assert qs.equalize(qmodel, statistics).to_json() == first.to_json()
    assert_equal_ranges(qmodel, before)


def test_it_leaves_all_other_ranges_alone() -> None:
    qmodel = calibrated("onnxruntime")
    others = {name for name, each in qs.quantizers(qmodel).items() if "matmul" in name}
    for name in others:
        qs.quantizers(qmodel)[name].amax = 7.0
    qs.equalize(qmodel, [BATCH])
    assert {float(qs.quantizers(qmodel)[name].amax) for name in others} == {7.0}  # type: ignore[arg-type]


def test_the_record_of_the_calibration_stays() -> None:
    qmodel = calibrated("onnxruntime")
    before = state_of(qmodel).calibration
    assert isinstance(before, qs.Calibration)
    qs.equalize(qmodel, [batch_for(qmodel, (2, 7))])
    after = state_of(qmodel).calibration
    assert isinstance(after, qs.Calibration)
    assert [each.quantizer for each in after.ranges] == [each.quantizer for each in before.ranges]
    changed = {new.quantizer for old, new in zip(before.ranges, after.ranges, strict=True) if old != new}
    own = {name for name, each in qs.quantizers(qmodel).items() if each.scaled}
    assert changed & own
    assert changed <= own | {name.replace("_input_", "_weight_") for name in own}


def test_it_tells_the_channels() -> None:
    found = qs.equalize(calibrated(), [BATCH])
    by_name = {each.quantizer: each for each in found.scales}
    inputs = by_name["encoder.layer.1.attention.self.query._input_quantizer"]
    assert list(inputs.outliers)[:2] == sorted(CHANNELS, key=lambda channel: -inputs.outliers[channel])
    assert inputs.channels == 32
    assert "channel 17" in found.to_text()
    data: dict[str, Any] = found.to_json()
    assert (data["schema"], data["rows"], data["weights"]) == (1, 4, 10)


def test_rules_without_scales_are_refused() -> None:
    qmodel = calibrated("qdqbert")
    before = ranges(qmodel)
    with pytest.raises(CalibrationError, match="has a scale per channel by the rules 'qdqbert'; convert by"):
        qs.equalize(qmodel, [BATCH])
    assert {name: float(value.max()) for name, value in before.items() if value is not None} == {
        name: float(value.max()) for name, value in ranges(qmodel).items() if value is not None
    }


def test_the_old_loop_is_refused_where_a_weight_depends_on_the_scales() -> None:
    qmodel = calibrated()
    quantizer = next(each for each in qs.quantizers(qmodel).values() if each.scaled)
    quantizer.enable_calib()
    qmodel(**BATCH)
    with pytest.raises(RuntimeError, match="has a scale per channel, on which its linear's weight depends: call"):
        quantizer.load_calib_amax()


@pytest.mark.parametrize("calibrator", ["max", "outliers", "{name: smooth, alpha: 0.6}"])
def test_every_method_by_a_rule_file(calibrator: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"schema: 1\nname: mine\nextends: qdqbert-scaled\nspecs:\n  scaled: {{axis: -1, calibrator: {calibrator}}}\n",
        encoding="utf-8",
    )
    qmodel = qs.convert(spoiled(), path)
    qs.calibrate(qmodel, [BATCH])
    assert error(calibrated("qdqbert")) > 4 * error(qmodel)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_loads_into_a_model_that_was_just_converted(assign: bool) -> None:
    qmodel = calibrated()
    other = qs.convert(build("bert", "BertModel"), "qdqbert-scaled", inplace=True)
    assert all(each.amax is None for each in qs.quantizers(other).values() if each.scaled)
    other.load_state_dict(qmodel.state_dict(), assign=assign)
    batch = batch_for(qmodel, (3, 8))
    with torch.no_grad():
        assert torch.equal(other(**batch).last_hidden_state, qmodel(**batch).last_hidden_state)  # tolerance 0.0
