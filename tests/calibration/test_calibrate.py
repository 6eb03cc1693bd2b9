"""From statistics to ranges: each method, each rule's own, limits, shares, errors that change nothing, reports."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.calibration.collect import Seen, Statistics
from qdq_surgery.cli.folder import load_model, save_model
from qdq_surgery.errors import CalibrationError, ModelError
from qdq_surgery.numerics.fake_quant import fake_quant
from qdq_surgery.numerics.grid import INT8, Grid
from qdq_surgery.numerics.range_choice import choose, method_names
from qdq_surgery.numerics.range_methods import channel_mse_amax
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.surgery.model_state import state_of

Batch = dict[str, Any]
LAYER = "encoder.layer.0."
BATCHES: list[Batch] = [
    {
        "input_ids": torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(seed)),
        "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 7 + [0]]),
    }
    for seed in range(3)
]


COARSE = "{name: histogram, num_bins: 128}"
RULES = """\
schema: 1
name: own
why: every method in one file

specs:
  inner: {{num_bits: 8, calibrator: {inner}}}
  query: {{num_bits: 8, calibrator: {{name: percentile, percentile: 90, num_bins: 128}}}}
  key: {{num_bits: 8, calibrator: {{name: entropy, num_bins: 128}}}}
  value: {{num_bits: 8, calibrator: {{name: mse, num_bins: 128}}}}
  probability: {{num_bits: 8, unsigned: true, calibrator: {{name: best, num_bins: 128}}}}
  limited: {{num_bits: 8, calibrator: max, max_amax: 0.125}}
  whole: {{num_bits: 8, axis: null, calibrator: {{name: mse, num_bins: 128}}}}
  channels: {{num_bits: 8, axis: 0, narrow_range: true, calibrator: mse}}

rules:
  - name: second-linear
    why: what lies behind the activation
    match: {{layers: all, within: ["*.output"], pattern: "linear(x, w)"}}
    quantize: {{x: limited, w: whole}}
  - name: linears
    why: the rest
    match: {{layers: all, pattern: "linear(x, w)"}}
    quantize: {{x: inner, w: channels}}
  - name: context
    why: probabilities times values
    match: {{layers: all, pattern: "matmul(a=maybe(dropout)(softmax(_)), v)"}}
    quantize:
      a: {{spec: probability, as: matmul_a_input_quantizer}}
      v: {{spec: value, as: matmul_v_input_quantizer}}
  - name: scores
    why: queries times keys
    match: {{layers: all, pattern: "matmul(q, k=maybe(div, mul)(transpose(_)))"}}
    quantize: {{q: {{spec: query, as: matmul_q_input_quantizer}}, k: {{spec: key, as: matmul_k_input_quantizer}}}}
{more}"""


def write_rules(folder: Path, more: str = "", inner: str = COARSE) -> Path:
    path = folder / "own.yaml"
    path.write_text(RULES.format(more=more, inner=inner))
    return path


def one_layer(rules: Any = "qdqbert") -> PreTrainedModel:
    return qs.convert(build("bert", "BertModel", num_hidden_layers=1), rules, inplace=True)


def coarse_rules() -> RuleSet:
    """QDQBERT's with 256 bins: entropy and mse then take no time."""
    rules = qs.load_rules("qdqbert")
    spec = QuantSpec(calibrator=CalibratorSpec("histogram", num_bins=128))
    return dataclasses.replace(rules, specs={**rules.specs, "activation": spec})


@functools.cache
def _coarse() -> PreTrainedModel:
    return one_layer(coarse_rules())


def coarse() -> PreTrainedModel:
    """A copy, as conversion takes longer."""
    return copy.deepcopy(_coarse())


def ranges(qmodel: nn.Module) -> dict[str, Tensor]:
    return {name: each.amax.detach().clone() for name, each in qs.quantizers(qmodel).items() if each.amax is not None}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, amax in wanted.items():
        assert torch.equal(found[name], amax), name


# Methods -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", method_names())
def test_from_batches_as_from_statistics(method: str) -> None:
    first, second = coarse(), coarse()
    seen = qs.collect(first, BATCHES)
    made = qs.calibrate(first, seen, method)
    again = qs.calibrate(second, iter(BATCHES), method)
    assert_equal(ranges(second), ranges(first))
    assert ranges(first).keys() == qs.quantizers(first).keys()
    if method == "max":  # from batches no histogram is made for it, so no error is known
        again = dataclasses.replace(again, ranges=tuple(dataclasses.replace(r, error=None) for r in again.ranges))
        made = dataclasses.replace(made, ranges=tuple(dataclasses.replace(r, error=None) for r in made.ranges))
    assert made == again
    assert (made.batches, made.rows, made.tokens) == (3, 9, 60)
    # By the histogram's own function, one by one.
    for name, each in seen.seen.items():
        assert each.histogram is not None
        amax, words = choose(each.histogram, method)
        assert torch.equal(ranges(first)[name], torch.tensor(amax))
        assert [(r.method, r.amax) for r in made.ranges if r.quantizer == name] == [
            (words, pytest.approx(amax, rel=1e-6))  # float32 and float64
        ]


def test_the_largest_magnitude_is_the_largest(request: pytest.FixtureRequest) -> None:
    qmodel = coarse()
    largest: dict[str, float] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest[name] = max(largest.get(name, 0.0), float(inputs[0].abs().max()))

        return note

    for name, each in qs.quantizers(qmodel).items():
        request.addfinalizer(each.register_forward_pre_hook(hook(name)).remove)
    whole = [{"input_ids": batch["input_ids"]} for batch in BATCHES]
    with qs.quantization_disabled(qmodel), torch.no_grad():
        for batch in whole:
            qmodel(**batch)
    wanted = dict(largest)
    qs.calibrate(qmodel, whole, "max")
    found = ranges(qmodel)
    assert found.keys() == wanted.keys()
    for name, amax in found.items():
        assert float(amax.max()) == wanted[name], name


def test_percentiles() -> None:
    qmodel = coarse()
    seen = qs.collect(qmodel, BATCHES)
    by_percentile = {}
    for percentile in (50.0, 99.0, None, 100.0):
        made = qs.calibrate(qmodel, seen, "percentile", percentile=percentile)
        by_percentile[percentile] = ranges(qmodel)
        assert made.method == f"percentile({99.99 if percentile is None else percentile:g}%)"
    name = f"{LAYER}intermediate.dense._input_quantizer"
    assert by_percentile[50.0][name] < by_percentile[99.0][name] < by_percentile[100.0][name]
    qs.calibrate(qmodel, seen, "max")
    assert_equal(by_percentile[100.0], ranges(qmodel))
    qs.calibrate(qmodel, seen, "percentile", percentile=99.99)
    assert_equal(by_percentile[None], ranges(qmodel))


def test_best_has_the_least_error() -> None:
    qmodel = coarse()
    seen = qs.collect(qmodel, BATCHES)
    compared = seen.compare()
    made = {each.quantizer: each for each in qs.calibrate(qmodel, seen, "best").ranges}
    assert len({made[name].method for name in compared}) > 1  # not one method for all
    for name, methods in compared.items():
        least = min(each["error"] for each in methods.values())
        assert made[name].error == pytest.approx(least, rel=1e-3)  # a range in float32 there, in float64 here
        assert made[name].amax == pytest.approx(methods[made[name].method]["amax"], rel=1e-6)


def test_weights_are_found_by_their_rule_whatever_the_method() -> None:
    qmodel = coarse()
    for method in ("max", "entropy"):
        qs.calibrate(qmodel, BATCHES, method)
        for name, module in qmodel.named_modules():
            if isinstance(module, quant_nn.QuantLinear):
                wanted = module.weight.detach().abs().amax(1, keepdim=True)
                assert torch.equal(module._weight_quantizer.amax, wanted), name


# Each by its rule ----------------------------------------------------------------------------------------------------


def test_each_by_its_rule(tmp_path: Path) -> None:
    path = write_rules(tmp_path, inner="{name: histogram, num_bins: 128}")
    qmodel = one_layer(path)
    seen = qs.collect(qmodel, BATCHES)
    made = qs.calibrate(qmodel, seen)
    assert made.method == "the rules' methods"
    found = ranges(qmodel)

    def by(name: str, method: str, percentile: float = 99.99) -> Tensor:
        each = seen.seen[name]
        assert each.histogram is not None
        return torch.tensor(choose(each.histogram, method, each.grid, percentile=percentile)[0])

    attention = f"{LAYER}attention.self."
    wanted = {
        f"{attention}matmul_q_input_quantizer": ("90 %", by(f"{attention}matmul_q_input_quantizer", "percentile", 90)),
        f"{attention}matmul_k_input_quantizer": ("entropy", by(f"{attention}matmul_k_input_quantizer", "entropy")),
        f"{attention}matmul_v_input_quantizer": ("mse", by(f"{attention}matmul_v_input_quantizer", "mse")),
        # A rule that leaves the method open means max.
        f"{attention}query._input_quantizer": ("max", seen.seen[f"{attention}query._input_quantizer"].amax),
        f"{LAYER}output.dense._input_quantizer": ("max, at most 0.125", torch.tensor(0.125)),
    }
    methods = {each.quantizer: each.method for each in made.ranges}
    for name, (words, amax) in wanted.items():
        assert methods[name] == words, name
        assert torch.equal(found[name], amax), name
    probability = f"{attention}matmul_a_input_quantizer"
    assert seen.seen[probability].grid.unsigned
    assert torch.equal(found[probability], by(probability, "best"))
    assert seen.seen[f"{LAYER}output.dense._input_quantizer"].amax > 0.125
    weight = qmodel.encoder.layer[0].intermediate.dense.weight.detach()
    name = f"{LAYER}intermediate.dense._weight_quantizer"
    assert torch.equal(found[name], channel_mse_amax(weight, 0, Grid(narrow_range=True)))
    assert methods[name] == "mse"
    loss = [
        float((fake_quant(weight, amax, Grid(narrow_range=True)) - weight).square().sum())
        for amax in (found[name], weight.abs().amax(1, keepdim=True))
    ]
    assert loss[0] < loss[1]
    assert found[f"{LAYER}output.dense._weight_quantizer"].shape == ()


def test_a_method_for_all_still_keeps_limits(tmp_path: Path) -> None:
    qmodel = one_layer(write_rules(tmp_path))
    made = {each.quantizer: each for each in qs.calibrate(qmodel, BATCHES, "max").ranges}
    found = ranges(qmodel)
    limited = f"{LAYER}output.dense._input_quantizer"
    assert found[limited] == 0.125
    assert made[limited].method == "max, at most 0.125"
    assert made[limited].amax == 0.125
    assert made[f"{LAYER}attention.self.matmul_q_input_quantizer"].method == "max"


@pytest.mark.usefixtures("default_descriptors")
@pytest.mark.parametrize(("calibrator", "words"), [("max", "max"), ("histogram", "99.99 %")])
def test_default_descriptors_say_max_or_a_histogram(calibrator: str, words: str) -> None:
    quant_nn.QuantLinear.set_default_quant_desc_input(QuantDescriptor(8, calib_method=calibrator))
    qmodel = one_layer("linear-only")
    made = qs.calibrate(qmodel, BATCHES)
    assert {each.method for each in made.ranges if each.quantizer.endswith("_input_quantizer")} == {words}


SHARE = """
share:
  - why: one range for queries, keys and values
    sites: [matmul_q_input_quantizer, matmul_k_input_quantizer, matmul_v_input_quantizer]
"""


def test_shared_ranges_are_the_largest(tmp_path: Path) -> None:
    alone = one_layer(write_rules(tmp_path))
    qs.calibrate(alone, BATCHES)
    shared = one_layer(write_rules(tmp_path, SHARE))
    made = {each.quantizer: each for each in qs.calibrate(shared, BATCHES).ranges}
    group = [f"{LAYER}attention.self.matmul_{which}_input_quantizer" for which in "qkv"]
    before, after = ranges(alone), ranges(shared)
    assert len({float(before[name]) for name in group}) == 3
    largest = max(float(before[name]) for name in group)
    for name in before:
        wanted = torch.tensor(largest) if name in group else before[name]
        assert torch.equal(after[name], wanted), name
    for name in group:
        assert made[name].amax == largest
        assert made[name].method.endswith(", shared") == (float(before[name]) < largest)
    # Equal, and not the same tensor: one that is changed later leaves the others.
    quantizers = qs.quantizers(shared)
    quantizers[group[0]].amax = 1.0
    assert torch.equal(quantizers[group[1]].amax, torch.tensor(largest))


def test_the_shipped_fuse_rules() -> None:
    qmodel = qs.convert(build("bert", "BertModel"), "fuse-qkv", inplace=True)
    qs.calibrate(qmodel, BATCHES, "max")
    found = ranges(qmodel)
    for layer in range(2):
        attention = f"encoder.layer.{layer}.attention.self."
        outputs = {float(found[f"{attention}matmul_{which}_input_quantizer"]) for which in "qkv"}
        weights = {float(found[f"{attention}{which}._weight_quantizer"]) for which in ("query", "key", "value")}
        assert len(outputs) == len(weights) == 1
        modules = dict(qmodel.named_modules())
        tops = [modules[f"{attention}{which}"].weight.detach().abs().max() for which in ("query", "key", "value")]
        assert weights == {float(max(tops))}
    assert (
        found["encoder.layer.0.attention.self.query._weight_quantizer"]
        != (found["encoder.layer.1.attention.self.query._weight_quantizer"])
    )


def test_channels_cannot_share(tmp_path: Path) -> None:
    more = "\nshare:\n  - {why: it cannot be, rules: [linears], captures: [w]}\n"
    qmodel = one_layer(write_rules(tmp_path, more))
    with pytest.raises(CalibrationError, match=r"_weight_quantizer has (32|48) ranges, one per channel, .*axis: null"):
        qs.calibrate(qmodel, BATCHES)
    assert ranges(qmodel) == {}


def test_dropout_while_calibrating(tmp_path: Path) -> None:
    quiet = one_layer(write_rules(tmp_path))
    noisy = one_layer(write_rules(tmp_path, "\ncalibration: {dropout: true}\n"))
    torch.manual_seed(1)
    qs.calibrate(noisy, BATCHES, "max")
    first = ranges(noisy)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    qs.calibrate(noisy, BATCHES, "max")
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(ranges(noisy), first)
    assert not noisy.training
    qs.calibrate(quiet, BATCHES, "max")
    # What dropout leaves is divided by 0.9: the largest probability, 1 in the shortest row, is among it or not.
    name = f"{LAYER}attention.self.matmul_a_input_quantizer"
    assert not torch.equal(first[name], ranges(quiet)[name])
    # The weights have no dropout.
    weights = f"{LAYER}attention.self.query._weight_quantizer"
    assert torch.equal(first[weights], ranges(quiet)[weights])


def test_learned_ranges_start_where_calibration_puts_them(tmp_path: Path) -> None:
    path = write_rules(tmp_path)
    path.write_text(path.read_text().replace("query: {num_bits: 8,", "query: {num_bits: 8, learn: true,"))
    qmodel, fixed = one_layer(path), one_layer(write_rules(tmp_path))
    for _ in range(2):
        qs.calibrate(qmodel, BATCHES)
        learned = {name for name, each in qs.quantizers(qmodel).items() if each.learns}
        assert learned == {f"{LAYER}attention.self.matmul_q_input_quantizer"}
    qs.calibrate(fixed, BATCHES)
    assert_equal(ranges(qmodel), ranges(fixed))


# What is left alone --------------------------------------------------------------------------------------------------


def test_disabled_quantizers_are_left_alone() -> None:
    qmodel = coarse()
    found = qs.quantizers(qmodel)
    skipped = [f"{LAYER}attention.self.query._input_quantizer", f"{LAYER}output.dense._weight_quantizer"]
    found[skipped[0]].amax = 1.25
    for name in skipped:
        found[name].disable()
    made = qs.calibrate(qmodel, BATCHES, "max")
    assert {each.quantizer for each in made.ranges} == found.keys() - set(skipped)
    assert found[skipped[0]].amax == 1.25
    assert found[skipped[1]].amax is None
    assert all(found[name]._disabled for name in skipped)


def test_calibrating_again_forgets_the_first_time() -> None:
    once, twice = coarse(), coarse()
    qs.calibrate(twice, BATCHES[:1], "max")
    first = ranges(twice)
    qs.calibrate(twice, BATCHES[1:], "max")
    qs.calibrate(once, BATCHES[1:], "max")
    assert_equal(ranges(twice), ranges(once))
    assert any(not torch.equal(first[name], amax) for name, amax in ranges(once).items())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "data-parallel"])
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module]) -> None:
    inner, plain = coarse(), coarse()
    assert qs.calibrate(wrap(inner), BATCHES, "max") == qs.calibrate(plain, BATCHES, "max")
    assert_equal(ranges(inner), ranges(plain))


def test_a_caller_in_inference_mode() -> None:
    qmodel, plain = coarse(), coarse()
    with torch.inference_mode():
        qs.calibrate(qmodel, BATCHES, "best")
    qs.calibrate(plain, BATCHES, "best")
    assert_equal(ranges(qmodel), ranges(plain))
    # The ranges can be trained with afterwards.
    qmodel(**BATCHES[0]).last_hidden_state.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "method"),
    [*((torch.bfloat16, method) for method in method_names()), (torch.float16, "percentile")],
    ids=str,
)
def test_half_precision(dtype: torch.dtype, method: str) -> None:
    qmodel = coarse().to(dtype)
    qs.calibrate(qmodel, BATCHES, method)
    reference = coarse()
    qs.calibrate(reference, BATCHES, method)
    for name, amax in ranges(qmodel).items():
        assert amax.dtype == torch.float32
        # bfloat16 rounds to 8 bits, and entropy may choose a neighbouring minimum.
        assert torch.allclose(amax, ranges(reference)[name], rtol=0.25 if method != "max" else 0.05, atol=1e-3), name
    assert qmodel(**BATCHES[0]).last_hidden_state.isfinite().all()


# Errors: everything stays as it was ----------------------------------------------------------------------------------


def calibrated() -> PreTrainedModel:
    qmodel = coarse()
    qs.calibrate(qmodel, BATCHES[:1], "max")
    return qmodel


@pytest.fixture(scope="module")
def shared_model() -> PreTrainedModel:
    return calibrated()


def assert_refused(qmodel: PreTrainedModel, error: type[Exception], words: str, *args: Any, **options: Any) -> None:
    """The call fails, and neither the ranges nor the report changes."""
    before, report = ranges(qmodel), state_of(qmodel).calibration
    with pytest.raises(error) as caught:
        qs.calibrate(qmodel, *args, **options)
    assert words in str(caught.value)
    assert_equal(ranges(qmodel), before)
    assert state_of(qmodel).calibration is report


@pytest.mark.parametrize(
    ("method", "percentile", "words"),
    [
        ("median", None, "unknown calibration method 'median'; write one of max, percentile, entropy, mse, best"),
        ("histogram", None, "unknown calibration method 'histogram'"),
        ("MAX", None, "unknown calibration method 'MAX'"),
        ("max", 99.0, "percentile=99.0 goes with method='percentile' only, and method is 'max'"),
        (None, 99.0, "goes with method='percentile' only, and method is None"),
        ("percentile", 0.0, "percentile 0.0 is outside (0, 100]"),
        ("percentile", 100.5, "percentile 100.5 is outside (0, 100]"),
        ("percentile", -1.0, "percentile -1.0 is outside (0, 100]"),
        ("percentile", 0.5, "percentile 0.5 would cut off 99.5 % of the values; did you mean 99.5?"),
        ("percentile", 0.9999, "did you mean 99.99?"),
        ("percentile", 49.9, "did you mean 50.1?"),
        ("percentile", math.nan, "percentile nan is outside (0, 100]"),
    ],
)
def test_methods_that_are_none(
    shared_model: PreTrainedModel, method: str | None, percentile: float | None, words: str
) -> None:
    assert issubclass(qs.OptionError, ValueError)
    assert_refused(shared_model, qs.OptionError, words, BATCHES, method, percentile=percentile)


@pytest.mark.parametrize("batches", [[], [None]], ids=["empty", "None"])
def test_data_that_is_none(shared_model: PreTrainedModel, batches: list[Any]) -> None:
    words = "batch 0 is a NoneType" if batches else "there are no batches"
    assert_refused(shared_model, CalibrationError, words, batches, "max")


def test_statistics_of_another_model(shared_model: PreTrainedModel) -> None:
    other = qs.convert(build("distilbert", "DistilBertModel", n_layers=1), "linear-only", inplace=True)
    seen = qs.collect(other, BATCHES)
    words = f"the statistics know nothing of 14 quantizers (first: {LAYER}attention.self.query._input_quantizer)"
    assert_refused(shared_model, CalibrationError, words, seen, "max")


def test_statistics_from_when_a_quantizer_was_disabled() -> None:
    qmodel = calibrated()
    name = f"{LAYER}output.dense._input_quantizer"
    qs.quantizers(qmodel)[name].disable()
    seen = qs.collect(qmodel, BATCHES)
    qs.quantizers(qmodel)[name].enable()
    assert_refused(qmodel, CalibrationError, f"know nothing of 1 quantizers (first: {name})", seen, "max")


def test_statistics_without_histograms(shared_model: PreTrainedModel) -> None:
    seen = qs.collect(shared_model, BATCHES, histograms=False)
    for method in ("percentile", "entropy", "mse", "best"):
        assert_refused(shared_model, CalibrationError, "collect with histograms=True", seen, method)
    other = coarse()
    qs.calibrate(other, seen, "max")
    third = coarse()
    qs.calibrate(third, BATCHES, "max")
    assert_equal(ranges(other), ranges(third))


@pytest.mark.parametrize("method", method_names())
def test_an_activation_of_zeros_has_no_range(method: str) -> None:
    qmodel = calibrated()
    name = f"{LAYER}output.dense._input_quantizer"
    with torch.no_grad():
        qmodel.encoder.layer[0].intermediate.dense.weight.zero_()
        qmodel.encoder.layer[0].intermediate.dense.bias.zero_()
    assert_refused(qmodel, CalibrationError, f"{name} saw only zeros", BATCHES, method)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_weight_that_is_no_number(value: float) -> None:
    qmodel = calibrated()
    seen = qs.collect(qmodel, BATCHES)
    with torch.no_grad():
        qmodel.encoder.layer[0].output.dense.weight[3, 3] = value
    name = f"{LAYER}output.dense._weight_quantizer"
    assert_refused(qmodel, CalibrationError, f"{name}: the weight has a NaN or an infinite value", seen, "max")


@pytest.mark.parametrize("calibrator", ["mse", "max"])
def test_an_activation_with_channels(tmp_path: Path, calibrator: str) -> None:
    path = write_rules(tmp_path)
    text = path.read_text()
    inner = f"inner: {{num_bits: 8, calibrator: {COARSE}}}"
    assert inner in text
    path.write_text(text.replace(inner, f"inner: {{num_bits: 8, axis: 2, calibrator: {calibrator}}}"))
    qmodel = one_layer(path)
    if calibrator == "mse":
        with pytest.raises(CalibrationError, match=r"one range for each channel of an activation, which mse is not"):
            qs.calibrate(qmodel, BATCHES)
        assert ranges(qmodel) == {}
        return
    qs.calibrate(qmodel, BATCHES)
    found = ranges(qmodel)[f"{LAYER}intermediate.dense._input_quantizer"]
    assert found.shape == (1, 1, 32)
    assert len(found.unique()) == 32


@pytest.mark.parametrize("call", [qs.calibrate, qs.collect], ids=["calibrate", "collect"])
def test_a_model_that_is_not_converted(call: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="is not converted"):
        call(build("bert", "BertModel", num_hidden_layers=1), BATCHES)


# Reports and folders -------------------------------------------------------------------------------------------------


def test_the_report() -> None:
    qmodel = coarse()
    made = qs.calibrate(qmodel, BATCHES, "mse")
    assert state_of(qmodel).calibration is made
    data = json.loads(json.dumps(made.to_json()))
    assert {name: data[name] for name in ("schema", "method", "batches", "rows", "tokens")} == {
        "schema": 1,
        "method": "mse",
        "batches": 3,
        "rows": 9,
        "tokens": 60,
    }
    found = ranges(qmodel)
    assert [each["quantizer"] for each in data["ranges"]] == [each.quantizer for each in made.ranges]
    assert {each["quantizer"] for each in data["ranges"]} == found.keys()
    for each in data["ranges"]:
        assert each["amax"] == pytest.approx(float(found[each["quantizer"]].max()), rel=1e-6)
        weight = each["quantizer"].endswith("_weight_quantizer")
        assert (each["method"], each["error"] is None) == (("max", True) if weight else ("mse", False))
    lines = made.to_text().splitlines()
    assert lines[0] == "20 ranges by mse, from 60 tokens in 9 rows (3 batches)"
    assert len(lines) == 2 + 20


def test_a_copy_takes_its_calibration_along() -> None:
    qmodel = calibrated()
    copied = copy.deepcopy(qmodel)
    assert_equal(ranges(copied), ranges(qmodel))
    qs.calibrate(copied, BATCHES[1:], "max")
    assert any(not torch.equal(amax, ranges(qmodel)[name]) for name, amax in ranges(copied).items())


@pytest.mark.parametrize("method", [None, "best"], ids=["rules", "best"])
def test_folders_keep_ranges_and_report(tmp_path: Path, method: str | None) -> None:
    qmodel = one_layer(write_rules(tmp_path, SHARE))
    made = qs.calibrate(qmodel, BATCHES, method)
    save_model(qmodel, tmp_path / "model")
    report = json.loads((tmp_path / "model" / "qdq_report.json").read_text())
    assert report["calibration"] == json.loads(json.dumps(made.to_json()))
    loaded = load_model(tmp_path / "model")
    assert_equal(ranges(loaded), ranges(qmodel))
    with torch.no_grad():
        for batch in BATCHES:
            assert torch.equal(loaded(**batch).last_hidden_state, qmodel(**batch).last_hidden_state)
    # Rules come along: the loaded model can be calibrated anew, and finds the same.
    qs.calibrate(loaded, BATCHES, method)
    assert_equal(ranges(loaded), ranges(qmodel))


def test_a_folder_of_a_model_that_is_not_calibrated_has_no_calibration(tmp_path: Path) -> None:
    qmodel = one_layer("linear-only")
    save_model(qmodel, tmp_path / "model")
    assert "calibration" not in json.loads((tmp_path / "model" / "qdq_report.json").read_text())


def test_statistics_made_by_hand() -> None:
    # What decides is the amax and the histogram, nothing else that the model knows.
    qmodel = coarse()
    seen = {
        name: Seen(None, torch.tensor(2.0 + index), INT8) for index, name in enumerate(qs.collect(qmodel, BATCHES).seen)
    }
    qs.calibrate(qmodel, Statistics(seen, 1, 1, 1), "max")
    for index, name in enumerate(seen):
        assert ranges(qmodel)[name] == 2.0 + index
