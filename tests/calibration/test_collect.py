"""One pass over data: what it finds depends on the data alone, and the model is afterwards as it was."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch_for, build
from torch import Tensor, nn
from transformers import BatchEncoding, BertModel, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.calibration.collect import Statistics
from qdq_surgery.errors import CalibrationError, ModelError
from qdq_surgery.numerics.histogram import Histogram
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec
from qdq_surgery.rules.spec import CalibrationOptions, RuleSet

Batch = dict[str, Any]


def coarse(dropout: bool = False) -> RuleSet:
    """QDQBERT's rules with 256 bins."""
    rules = qs.load_rules("qdqbert")
    spec = QuantSpec(calibrator=CalibratorSpec("histogram", num_bins=128))
    return dataclasses.replace(
        rules, specs={**rules.specs, "activation": spec}, calibration=CalibrationOptions(dropout=dropout)
    )


@pytest.fixture(scope="module")
def qmodel() -> PreTrainedModel:
    """Nothing in this file may change it."""
    return qs.convert(build("bert", "BertModel"), coarse())


def ids_of(rows: int, tokens: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def assert_same(found: Statistics, wanted: Statistics) -> None:
    """The same histograms, to the bit."""
    assert found.seen.keys() == wanted.seen.keys()
    assert wanted.seen
    for name, seen in wanted.seen.items():
        other = found.seen[name]
        assert torch.equal(other.amax, seen.amax), name
        assert seen.histogram is not None
        assert other.histogram is not None
        assert torch.equal(other.histogram.exponent, seen.histogram.exponent), name
        assert torch.equal(other.histogram.counts, seen.histogram.counts), name


# Order and grouping --------------------------------------------------------------------------------------------------


def groups(rows: Tensor, mask: Tensor | None, order: Tensor, size: int) -> list[Batch]:
    made = []
    for part in order.split(size):
        made.append({"input_ids": rows[part]})
        if mask is not None:
            made[-1]["attention_mask"] = mask[part]
    return made


def float_rows(qmodel: PreTrainedModel, batches: list[Batch]) -> Tensor:
    with qs.quantization_disabled(qmodel), torch.no_grad():
        return torch.cat([qmodel(**batch).last_hidden_state for batch in batches])


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_order_and_grouping_change_nothing(qmodel: PreTrainedModel, padded: bool) -> None:
    rows = ids_of(12)
    mask = None
    if padded:
        mask = torch.ones_like(rows)
        for row in range(12):  # every third row is whole, so that no group of three and more is cut to fewer columns
            mask[row, 8 - 2 * (row % 3) :] = 0
    order = torch.arange(12)
    turned = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    first = groups(rows, mask, order, 12)
    wanted, outputs = qs.collect(qmodel, first), float_rows(qmodel, first)
    for size, by in ((6, order), (3, order), (4, order), (12, turned)):
        batches = groups(rows, mask, by, size)
        # The premise: products of these shapes are the same row by row. If this fails, it is the machine's kernels.
        assert torch.equal(float_rows(qmodel, batches), outputs[by]), f"float outputs in groups of {size}"
        found = qs.collect(qmodel, batches)
        assert (found.rows, found.tokens) == (wanted.rows, wanted.tokens)
        assert_same(found, wanted)
        assert_same(qs.collect(qmodel, batches[::-1]), wanted)


def test_a_batch_twice_counts_twice(qmodel: PreTrainedModel) -> None:
    batch = {"input_ids": ids_of(3)}
    once, twice = qs.collect(qmodel, [batch]), qs.collect(qmodel, [batch, batch])
    assert (twice.batches, twice.rows, twice.tokens) == (2, 6, 48)
    for name, seen in once.seen.items():
        assert torch.equal(twice.seen[name].amax, seen.amax)
        assert torch.equal(twice.seen[name].histogram.counts, 2 * seen.histogram.counts)  # type: ignore[union-attr]


# The model is borrowed -----------------------------------------------------------------------------------------------


def everything(model: PreTrainedModel) -> dict[str, Any]:
    """Whatever a pass could leave behind."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "training": {name: module.training for name, module in model.named_modules()},
        "quantizers": {
            name: (id(each._calibrator), each._if_calib, each._if_quant, each._disabled, each.learns)
            for name, each in qs.quantizers(model).items()
        },
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "gradients": {name: value.grad for name, value in model.named_parameters()},
        "random": torch.get_rng_state(),
        "mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def assert_untouched(model: PreTrainedModel, before: dict[str, Any]) -> None:
    after = everything(model)
    for kind in ("state", "random"):
        left, right = before.pop(kind), after.pop(kind)
        if isinstance(left, Tensor):
            left, right = {"": left}, {"": right}
        assert left.keys() == right.keys()
        assert all(torch.equal(right[name], value) for name, value in left.items()), kind
    assert after == before


class Interrupting:
    """Batches, and then an exception."""

    def __init__(self, batches: list[Batch], raised: BaseException) -> None:
        self._batches, self._raised = batches, raised

    def __iter__(self) -> Iterator[Batch]:
        yield from self._batches
        raise self._raised


def generator_that_raises(batches: list[Batch]) -> Iterator[Batch]:
    yield from batches
    raise OSError("the disk is gone")


GOOD: Batch = {"input_ids": ids_of(2), "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3])}
PASSES: dict[str, tuple[Callable[[], Any], type[BaseException] | None]] = {
    "through": (lambda: [GOOD, GOOD], None),
    "bad-batch": (lambda: [GOOD, {"input_ids": ids_of(2), "attention_mask": torch.ones(2, 3)}], CalibrationError),
    "token-too-large": (lambda: [GOOD, {"input_ids": torch.full((2, 8), 1000)}], CalibrationError),
    "interrupted": (lambda: Interrupting([GOOD], KeyboardInterrupt()), KeyboardInterrupt),
    "generator-raises": (lambda: generator_that_raises([GOOD]), OSError),
    "interrupted-first": (lambda: Interrupting([], KeyboardInterrupt()), KeyboardInterrupt),
    "empty": (list, CalibrationError),
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("dropout", [False, True], ids=["float", "dropout"])
def test_the_model_is_afterwards_as_it_was(name: str, training: bool, dropout: bool) -> None:
    model = qs.convert(build("bert", "BertModel", num_hidden_layers=1), coarse(dropout), inplace=True)
    model.train(training)
    model.encoder.layer[0].output.eval()  # one that differs from the rest
    found = qs.quantizers(model)
    first, second, third, *_ = found.values()
    first.amax = 1.5
    first.learn_amax()
    second.disable()
    third._if_calib, third._if_quant = True, False
    before = everything(model)
    batches, raised = PASSES[name]
    if raised is None:
        qs.collect(model, batches())
    else:
        with pytest.raises(raised):
            qs.collect(model, batches())
    assert_untouched(model, before)


def test_ranges_that_are_set_do_not_count(qmodel: PreTrainedModel) -> None:
    # Statistics are of the float model, whatever ranges there are.
    wanted = qs.collect(qmodel, [GOOD])
    model = qs.convert(build("bert", "BertModel"), coarse())
    for each in qs.quantizers(model).values():
        each.amax = 0.01
    assert_same(qs.collect(model, [GOOD]), wanted)


def test_batches_are_not_changed(qmodel: PreTrainedModel) -> None:
    batch = {**GOOD, "attention_mask": torch.tensor([[1] * 6 + [0] * 2, [1] * 5 + [0] * 3])}
    copied = {name: value.clone() for name, value in batch.items()}
    qs.collect(qmodel, [batch])
    assert batch.keys() == copied.keys()
    assert all(torch.equal(value, copied[name]) for name, value in batch.items())


# What can be given ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, lambda model: nn.DataParallel(torch.compile(model)), torch.nn.Module.eval],
    ids=["compiled", "data-parallel", "both", "plain"],
)
def test_wrapped_models(qmodel: PreTrainedModel, wrap: Callable[[nn.Module], nn.Module]) -> None:
    assert_same(qs.collect(wrap(qmodel), [GOOD]), qs.collect(qmodel, [GOOD]))


@pytest.mark.parametrize(
    "batches",
    [
        lambda: [BatchEncoding(GOOD)],
        lambda: iter([GOOD]),
        lambda: (batch for batch in [GOOD]),
        lambda: torch.utils.data.DataLoader([GOOD], batch_size=None),
        lambda: [{**GOOD, "token_type_ids": torch.zeros(2, 8, dtype=torch.long)}],
        lambda: [{**GOOD, "output_hidden_states": True}],
    ],
    ids=["BatchEncoding", "iterator", "generator", "DataLoader", "token-types", "options"],
)
def test_kinds_of_batches(qmodel: PreTrainedModel, batches: Callable[[], Any]) -> None:
    assert_same(qs.collect(qmodel, batches()), qs.collect(qmodel, [GOOD]))


def test_labels_are_no_data() -> None:
    model = qs.convert(build("bert", "BertForTokenClassification", num_hidden_layers=1), coarse())
    labels = torch.zeros(2, 8, dtype=torch.long)
    assert_same(qs.collect(model, [{**GOOD, "labels": labels}]), qs.collect(model, [GOOD]))


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda c: c.__name__)
def test_the_mode_of_the_caller_does_not_matter(qmodel: PreTrainedModel, context: Any) -> None:
    wanted = qs.collect(qmodel, [GOOD])
    with context():
        found = qs.collect(qmodel, [GOOD])
    assert_same(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_models_of_other_dtypes(qmodel: PreTrainedModel, dtype: torch.dtype) -> None:
    model = qs.convert(build("bert", "BertModel").to(dtype), coarse())
    found, wanted = qs.collect(model, [GOOD]), qs.collect(qmodel, [GOOD])
    assert (found.batches, found.rows, found.tokens) == (1, 2, 13)
    # bfloat16 has 8 bits of mantissa, and a few layers of rounding: float64 differs from float32 by much less.
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    for name, seen in wanted.seen.items():
        assert found.seen[name].amax.dtype == torch.float32
        assert torch.allclose(found.seen[name].amax, seen.amax, rtol=tolerance, atol=tolerance), name
        assert found.seen[name].histogram.total == seen.histogram.total, name  # type: ignore[union-attr]


def test_dropout_is_the_same_each_time_and_not_none() -> None:
    model = build("bert", "BertModel", num_hidden_layers=1)
    quiet, noisy = qs.convert(model, coarse()), qs.convert(model, coarse(dropout=True))
    torch.manual_seed(1)
    first = qs.collect(noisy, [GOOD])
    torch.manual_seed(2)
    assert_same(qs.collect(noisy, [GOOD]), first)
    # Dropout makes what it leaves larger, by 1 / 0.9: the largest probability too, unless it is dropped.
    name = "encoder.layer.0.attention.self.matmul_a_input_quantizer"
    assert not torch.equal(first.seen[name].amax, qs.collect(quiet, [GOOD]).seen[name].amax)


# Errors --------------------------------------------------------------------------------------------------------------


def used_up() -> Iterator[Batch]:
    made = iter([GOOD])
    next(made)
    return made


@pytest.mark.parametrize("batches", [list, lambda: iter(()), used_up], ids=["list", "iterator", "used-up"])
def test_no_batches(qmodel: PreTrainedModel, batches: Callable[[], Any]) -> None:
    with pytest.raises(CalibrationError, match=r"there are no batches; give an iterable of dicts"):
        qs.collect(qmodel, batches())


@pytest.mark.parametrize(
    ("batch", "kind"),
    [([ids_of(2)], "list"), ((ids_of(2), ids_of(2)), "tuple"), (None, "NoneType"), (ids_of(2), "Tensor")],
    ids=["list", "tuple", "None", "Tensor"],
)
def test_batches_that_are_no_dicts(qmodel: PreTrainedModel, batch: Any, kind: str) -> None:
    with pytest.raises(CalibrationError, match=rf"batch 1 is a {kind}, wanted a dict of the model's arguments"):
        qs.collect(qmodel, [GOOD, batch])


class Strict(BertModel):  # type: ignore[misc]
    """transformers' own forwards take whatever they are given."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return super().forward(input_ids, attention_mask)


def test_an_argument_that_the_model_does_not_have() -> None:
    model = qs.convert(Strict(build("bert", "BertModel", num_hidden_layers=1).config).eval(), "linear-only")
    with pytest.raises(CalibrationError, match=r"batch 1: it has 'sentence', which Strict\.forward does not take"):
        qs.collect(model, [GOOD, {**GOOD, "sentence": "what"}])


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_weights_that_are_no_numbers(value: float) -> None:
    # The first that sees it in the order of the data, which is not the order of the modules: BERT's output is defined
    # after its intermediate layer, and its residual after both.
    model = qs.convert(build("bert", "BertModel"), coarse())
    with torch.no_grad():
        model.encoder.layer[1].attention.output.dense.weight[0, 0] = value
    with pytest.raises(CalibrationError) as caught:
        qs.collect(model, [GOOD])
    what = "a NaN" if math.isnan(value) else "an infinite value"
    assert str(caught.value).startswith(
        f"batch 0 gives {what} at encoder.layer.1.attention.output.add_local_input_quantizer;"
    )


@pytest.mark.parametrize(("value", "what"), [(math.nan, "a NaN"), (math.inf, "a NaN")], ids=["nan", "inf"])
def test_a_batch_that_is_no_number_is_named(qmodel: PreTrainedModel, value: float, what: str) -> None:
    good: Batch = batch_for(qmodel, (2, 8), embeds=True)
    bad = {**good, "inputs_embeds": good["inputs_embeds"].clone()}
    bad["inputs_embeds"][0, 0, 0] = value  # LayerNorm makes NaN of both, before the first quantizer
    with pytest.raises(CalibrationError) as caught:
        qs.collect(qmodel, [good, good, bad, good])
    assert str(caught.value).startswith(
        f"batch 2 gives {what} at encoder.layer.0.attention.self.query._input_quantizer;"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_an_infinite_value_without_histograms(value: float) -> None:
    model = qs.convert(build("bert", "BertModel", num_hidden_layers=1))
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[0] = value
    what = "a NaN" if math.isnan(value) else "an infinite value"
    with pytest.raises(CalibrationError, match=rf"batch 0 gives {what} at encoder\.layer\.0\.output\.add_local"):
        qs.collect(model, [GOOD], histograms=False)


def test_a_quantizer_that_saw_nothing() -> None:
    model = build("bert", "BertLMHeadModel", is_decoder=True, add_cross_attention=True, num_hidden_layers=1)
    qmodel = qs.convert(model, coarse())
    with pytest.raises(CalibrationError) as caught:
        qs.collect(qmodel, [GOOD])
    assert "10 of 24 quantizers saw no value in 1 batches" in str(caught.value)
    assert "crossattention.self.query._input_quantizer" in str(caught.value)
    # Those that are disabled need not.
    for name, each in qs.quantizers(qmodel).items():
        if "crossattention" in name:
            each.disable()
    assert len(qs.collect(qmodel, [GOOD]).seen) == 14


def test_a_module_that_is_never_called() -> None:
    model = qs.convert(build("bert", "BertModel", num_hidden_layers=2), coarse())
    model.encoder.layer[1].forward = lambda hidden_states, *_, **__: hidden_states  # type: ignore[method-assign]
    with pytest.raises(CalibrationError, match=r"14 of 28 quantizers saw no value .*first: encoder\.layer\.1\."):
        qs.collect(model, [GOOD])


@pytest.mark.parametrize(
    "model", [build("bert", "BertModel", num_hidden_layers=1), nn.Linear(2, 2)], ids=["BERT", "linear"]
)
def test_a_model_that_is_not_converted(model: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"is not converted; call qdq_surgery\.convert"):
        qs.collect(model, [GOOD])


# Statistics ----------------------------------------------------------------------------------------------------------


def bytes_of(found: Statistics) -> int:
    total = 0
    for seen in found.seen.values():
        tensors = [seen.amax]
        if seen.histogram is not None:
            tensors += [seen.histogram.counts, seen.histogram.exponent, seen.histogram.amax]
        total += sum(each.untyped_storage().nbytes() for each in tensors)
    return total


@pytest.mark.parametrize("histograms", [True, False], ids=["histograms", "maxima"])
def test_statistics_do_not_grow(qmodel: PreTrainedModel, histograms: bool) -> None:
    batches = [{"input_ids": ids_of(2, 4, seed)} for seed in range(20)]
    one = qs.collect(qmodel, batches[:1], histograms=histograms)
    many = qs.collect(qmodel, batches, histograms=histograms)
    assert many.batches == 20
    assert bytes_of(many) == bytes_of(one) > 0


def test_maxima_are_those_of_the_histograms(qmodel: PreTrainedModel) -> None:
    with_them, without = qs.collect(qmodel, [GOOD]), qs.collect(qmodel, [GOOD], histograms=False)
    assert with_them.seen.keys() == without.seen.keys()
    for name, seen in without.seen.items():
        assert seen.histogram is None
        assert torch.equal(seen.amax, with_them.seen[name].amax)


def test_the_comparison_of_methods(qmodel: PreTrainedModel) -> None:
    found = qs.collect(qmodel, [GOOD])
    compared = found.compare(percentiles=(50.0, 99.9))
    assert list(compared) == list(found.seen)
    for name, methods in compared.items():
        assert list(methods) == ["max", "50 %", "99.9 %", "entropy", "mse"]
        assert methods["max"]["amax"] == float(found.seen[name].amax)
        assert methods["50 %"]["amax"] < methods["99.9 %"]["amax"] <= methods["max"]["amax"]
        # Half of the values clipped costs more than anything else does.
        assert max(methods, key=lambda method: methods[method]["error"]) == "50 %"
        assert all(0.0 < each["error"] < 1.0 for each in methods.values())
    assert qs.collect(qmodel, [GOOD], histograms=False).compare() == {}


def test_the_error_of_a_range_is_that_of_the_quantizer(qmodel: PreTrainedModel) -> None:
    # 256 bins of a signed grid: the middle of a bin stands for its values, so about 1/1000 of the power is uncertain.
    name = "encoder.layer.0.output.dense._input_quantizer"
    found: list[Tensor] = []
    quantizer = qs.quantizers(qmodel)[name]
    handle = quantizer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach().clone()))
    with qs.quantization_disabled(qmodel), torch.no_grad():
        qmodel(input_ids=GOOD["input_ids"])
    handle.remove()
    values = found[0]
    for method, each in qs.collect(qmodel, [{"input_ids": GOOD["input_ids"]}]).compare((90.0,))[name].items():
        step = each["amax"] / 127
        error = (((values / step).round().clamp(-127, 127) * step) - values).square().sum() / values.square().sum()
        assert each["error"] == pytest.approx(float(error), rel=0.1, abs=2e-5), method


def test_reports(qmodel: PreTrainedModel) -> None:
    found = qs.collect(qmodel, [GOOD])
    data = found.to_json()
    assert (data["schema"], data["batches"], data["rows"], data["tokens"]) == (1, 1, 2, 13)
    assert data["quantizers"] == found.compare()
    text = found.to_text(width=160)
    lines = text.splitlines()
    assert lines[0].startswith("13 tokens in 2 rows; amax by method")
    assert len([line for line in lines if "_quantizer" in line]) == 28
    assert all(line.count("*") == 1 for line in lines if "_quantizer" in line)
    assert str(found).splitlines()[0] == lines[0]


def test_zeros_do_not_coarsen_the_grid() -> None:
    values = torch.rand(100, generator=torch.Generator().manual_seed(0)) / 100
    wanted = Histogram.of(values)
    for other in (torch.zeros(3), torch.ones(3)):
        made = Histogram.of(other, torch.ones(3, dtype=torch.bool) if other.any() else None)
        both = wanted + made
        assert torch.equal(both.exponent, wanted.exponent)
        assert both.total == 100 + (0 if other.any() else 3)


# Statistics of something else ----------------------------------------------------------------------------------------


def grid_rules(spec: str, folder: Path) -> Path:
    path = folder / "own.yaml"
    path.write_text(f"schema: 1\nname: own\nextends: qdqbert-scaled\nspecs: {{activation: {spec}}}\n")
    return path


@pytest.mark.parametrize("act", [qs.calibrate, qs.equalize])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_hidden_layers": 3}, r"this BertModel has no encoder\.layer\.2\.attention\.self\.query, and they know"),
        ({"hidden_size": 64}, "are of 64 channels, and its linear has 32 inputs; collect them from this model"),
    ],
    ids=["layers", "width"],
)
def test_those_of_another_model_are_refused(options: Batch, words: str, act: Callable[..., Any]) -> None:
    found = qs.collect(qs.convert(build("bert", "BertModel", **options), "qdqbert-scaled"), [{"input_ids": ids_of(2)}])
    made = qs.convert(build("bert", "BertModel"), "qdqbert-scaled")
    with pytest.raises(CalibrationError, match=words):
        act(made, found)
    assert all(each.amax is None for each in qs.quantizers(made).values())


def test_those_of_a_grid_without_a_zero_point_are_refused_by_one_that_has_it(tmp_path: Path) -> None:
    """They do not know the lowest value, and what lies below the range would be cut off."""
    model, batches = build("bert", "BertModel", num_hidden_layers=1), [{"input_ids": ids_of(2)}]
    with_point = grid_rules("{unsigned: true, zero_point: 32}", tmp_path)
    made = qs.convert(model, with_point)
    with pytest.raises(CalibrationError, match="how far its values reach below 0, as its grid with a zero point needs"):
        qs.calibrate(made, qs.collect(qs.convert(model, "qdqbert-scaled"), batches))
    qs.calibrate(made, qs.collect(made, batches))


def test_those_of_rules_that_see_more_are_taken() -> None:
    model, batches = build("bert", "BertModel"), [{"input_ids": ids_of(2)}]
    made = qs.calibrate(qs.convert(model, "linear-only"), qs.collect(qs.convert(model), batches), "max")
    wanted = qs.calibrate(qs.convert(model, "linear-only"), batches, "max")
    assert [each.amax for each in made.ranges] == [each.amax for each in wanted.ranges]


def test_padding_alone_is_said_to_be_that(qmodel: PreTrainedModel) -> None:
    with pytest.raises(CalibrationError, match=r"all tokens of the 2 rows are padding: their attention_mask is 0"):
        qs.collect(qmodel, [{"input_ids": ids_of(2), "attention_mask": torch.zeros(2, 8, dtype=torch.long)}])
