"""Grids with a zero point reach less far down than up: their ranges reach down to the lowest value all the same."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from architectures import batch_for, build
from made_quantizers import amax_of, calibrate, from_spec
from torch import Tensor, nn
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.numerics.range_choice import method_names
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec

#: Freshly made, its GELUs give at most 0.3, and go down to -0.17.
SITE = "encoder.layer.0.output.dense._input_quantizer"


@functools.cache
def model() -> PreTrainedModel:
    made = build("bert", "BertModel", num_hidden_layers=1)
    with torch.no_grad():
        made.encoder.layer[0].intermediate.dense.weight.mul_(0.3)
        made.encoder.layer[0].intermediate.dense.bias.fill_(-0.7)
    return made


def values_at(qmodel: nn.Module, quantizer: TensorQuantizer, batch: dict[str, Tensor]) -> Tensor:
    """What it is given, real tokens only."""
    found: list[Tensor] = []
    handle = quantizer.register_forward_pre_hook(lambda _, given: found.append(given[0].detach()))
    with torch.no_grad(), handle:
        qmodel(**batch)
    return found[0][batch["attention_mask"].bool()]


def assert_nothing_is_cut_off(qmodel: nn.Module, batch: dict[str, Tensor]) -> None:
    quantizer = qs.quantizers(qmodel)[SITE]
    with qs.quantization_disabled(qmodel):
        values = values_at(qmodel, quantizer, batch)
    assert values.min() < 2 * -values.max()  # magnitudes alone would make a range that ends before the lowest
    step = quantizer.step_size
    assert step is not None
    lost = (quantizer(values) - values).abs()
    wide = step if quantizer.channel_scale is None else step * quantizer.channel_scale
    assert bool((lost <= 0.5001 * wide).all())  # half a step, and the last bits of a product


@pytest.mark.parametrize("rules", ["onnxruntime", "openvino", "pytorch"])
def test_shipped_rules_cut_no_gelu_off(rules: str) -> None:
    batch = batch_for(model(), (3, 9), mask=True)
    qmodel = qs.convert(model(), rules)
    qs.calibrate(qmodel, [batch])
    assert_nothing_is_cut_off(qmodel, batch)


@pytest.mark.parametrize(("method", "histograms"), [("max", False), *((method, True) for method in method_names())])
def test_by_every_method(method: str, histograms: bool) -> None:
    rules = qs.load_rules("onnxruntime")
    spec = QuantSpec(unsigned=True, zero_point=32)
    batch = batch_for(model(), (3, 9), mask=True)
    qmodel = qs.convert(model(), dataclasses.replace(rules, specs={**rules.specs, "gelu": spec}))
    statistics = qs.collect(qmodel, [batch], histograms=histograms)
    qs.calibrate(qmodel, statistics, method)
    assert_nothing_is_cut_off(qmodel, batch)
    if histograms:
        compared = statistics.compare()[SITE].values()
        needed = float(statistics.seen[SITE].needed)
        assert needed > float(statistics.seen[SITE].amax)
        assert all(each["amax"] >= needed for each in compared)


@pytest.mark.parametrize("method", ["max", "percentile", "entropy", "mse"])
def test_calibrated_by_a_loop_of_ones_own(method: str) -> None:
    """As pytorch-quantization's own scripts do it."""
    target = from_spec(QuantSpec(unsigned=True, zero_point=32, calibrator=CalibratorSpec(method)))
    values = torch.tensor([0.3, -0.16, 0.1])
    calibrate(target, [values, 0.5 * values])
    target.load_calib_amax()
    assert float(amax_of(target)) == pytest.approx(0.16 * 223 / 32, rel=1e-6)
    calibrate(target, [10 * values])
    target.load_calib_amax()
    assert float(amax_of(target)) == pytest.approx(1.6 * 223 / 32, rel=1e-6)


def test_padding_does_not_count() -> None:
    rules = qs.load_rules("onnxruntime")
    embeds = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    short = {"inputs_embeds": embeds, "attention_mask": mask}
    spoiled = {"inputs_embeds": torch.where(mask[..., None] == 1, embeds, 100.0), "attention_mask": mask}
    found = []
    for batch in (short, spoiled):
        qmodel = qs.convert(model(), rules)
        qs.calibrate(qmodel, [batch])
        found.append(qs.quantizers(qmodel)[SITE].amax)
    assert found[0] is not None
    assert found[1] is not None
    assert torch.equal(found[0], found[1])
