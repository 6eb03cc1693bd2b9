"""Adapted rounding in a model: what it saves, what it leaves alone, and that everything else still holds."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_TYPE, batch_for, build
from comparing import assert_same
from outlier_model import spoiled
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.calibration import rounding as module
from qdq_surgery.checkpoint.report import report_of
from qdq_surgery.errors import CalibrationError
from qdq_surgery.numerics.adaptive_rounding import adapted_integers
from qdq_surgery.quantize.linear import QuantLinear

BATCHES = [batch_for(spoiled(), (8, length), mask=True) for length in (12, 9)]
BATCH = BATCHES[0]
SITE = "encoder.layer.0.intermediate.dense"


@functools.cache
def _calibrated(rules: str) -> PreTrainedModel:
    qmodel = qs.convert(spoiled(), rules)
    qs.calibrate(qmodel, BATCHES)
    return qmodel


@functools.cache
def _rounded(rules: str) -> PreTrainedModel:
    qmodel = calibrated(rules)
    qs.round_weights(qmodel, BATCHES)
    return qmodel


def calibrated(rules: str = "qdqbert") -> PreTrainedModel:
    return copy.deepcopy(_calibrated(rules))


def rounded(rules: str = "qdqbert") -> PreTrainedModel:
    return copy.deepcopy(_rounded(rules))


def linears(qmodel: nn.Module) -> dict[str, QuantLinear]:
    return {name: each for name, each in qmodel.named_modules() if isinstance(each, QuantLinear)}


def roundings(qmodel: nn.Module) -> dict[str, Tensor]:
    return {name: each.rounding for name, each in qs.quantizers(qmodel).items() if each.rounding is not None}


def assert_equal_roundings(found: nn.Module, wanted: nn.Module) -> None:
    ours, theirs = roundings(found), roundings(wanted)
    assert ours.keys() == theirs.keys()
    assert theirs
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def hidden(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**BATCH).last_hidden_state
    return found


def products(qmodel: PreTrainedModel) -> dict[str, float]:
    """What rounding its weight changes in the product of each linear, as a share of the product: by running it."""
    found: dict[str, list[float]] = {}
    weights = {name: each.quantized_weight().detach() for name, each in linears(qmodel).items()}

    def see(name: str, mask: Tensor, linear: nn.Module, given: tuple[Tensor]) -> None:
        assert isinstance(linear, QuantLinear)
        rows = given[0][mask] if given[0].ndim == 3 else given[0]
        off = torch.nn.functional.linear(rows, weights[name] - linear.weight)
        sums = found.setdefault(name, [0.0, 0.0])
        sums[0] += float(off.square().sum())
        sums[1] += float(torch.nn.functional.linear(rows, linear.weight).square().sum())

    with torch.no_grad(), qs.quantization_disabled(qmodel):
        for batch in BATCHES:
            mask = batch["attention_mask"].bool()
            hooks = [
                each.register_forward_pre_hook(functools.partial(see, name, mask))
                for name, each in linears(qmodel).items()
            ]
            qmodel(**batch)
            for hook in hooks:
                hook.remove()
    return {name: error / whole for name, (error, whole) in found.items()}


# What it is for -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", ["qdqbert", "qdqbert-scaled", "onnxruntime"])
def test_products_lose_less_and_the_result_says_how_much(rules: str) -> None:
    plain, qmodel = calibrated(rules), calibrated(rules)
    made = qs.round_weights(qmodel, BATCHES)
    before, after = products(plain), products(qmodel)
    assert {each.quantizer.removesuffix("._weight_quantizer") for each in made.weights} == set(before)
    for each in made.weights:
        name = each.quantizer.removesuffix("._weight_quantizer")
        # Sums of float32 products, in another order and over the padded rows' zeros. The scales of columns are
        # multiplied in and divided out here, which rounds as well.
        assert each.nearest == pytest.approx(before[name], rel=0.02), name
        assert each.adapted == pytest.approx(after[name], rel=0.02), name
        assert each.adapted < each.nearest
        assert 0.02 < each.moved < 0.6
    assert sum(each.adapted < 0.7 * each.nearest for each in made.weights) >= 0.5 * len(made.weights)
    assert (made.batches, made.rows, made.tokens) == (2, 16, int(sum(b["attention_mask"].sum() for b in BATCHES)))
    assert made.left == ()


def test_padding_counts_for_nothing() -> None:
    """The same texts, each alone and without any: the same roundings but for ties."""
    assert not all(bool(batch["attention_mask"].all()) for batch in BATCHES)
    wanted, alone = calibrated(), calibrated()
    qs.round_weights(wanted, BATCHES)
    rows = [
        {name: value[row : row + 1, : int(batch["attention_mask"][row].sum())] for name, value in batch.items()}
        for batch in BATCHES
        for row in range(8)
    ]
    qs.round_weights(alone, rows)
    for name, value in roundings(wanted).items():
        # Moments are sums of float32 in another order.
        assert float((roundings(alone)[name] != value).float().mean()) < 0.05, name


@pytest.mark.parametrize("lengths", [(8, 8, 8, 8), (8, 3, 6, 8)])
def test_a_table_that_is_the_same_for_all_rows_counts_once_for_each(lengths: tuple[int, ...]) -> None:
    """DeBERTa's linears see tokens, and a table of positions: rows together are as each alone."""
    model = build("deberta-v2", "DebertaV2Model")
    qmodel = qs.convert(model, "linear-only")
    batch = batch_for(qmodel, (4, 8))
    batch["attention_mask"] = torch.tensor([[1] * each + [0] * (8 - each) for each in lengths])
    alone = [{name: value[row : row + 1, :each] for name, value in batch.items()} for row, each in enumerate(lengths)]
    found, wanted = (qs.collect(qmodel, each, moments=True).seen for each in ([batch], alone))
    for name, seen in wanted.items():
        ours, theirs = found[name].moments, seen.moments
        assert ours is not None
        assert theirs is not None
        # What a linear sees besides decides, not how much it is in all. Sums of float32 in another order.
        torch.testing.assert_close(ours / ours.trace(), theirs / theirs.trace(), rtol=1e-3, atol=1e-5, msg=name)


def test_one_pass_does_for_ranges_and_rounding() -> None:
    qmodel = qs.convert(spoiled())
    statistics = qs.collect(qmodel, BATCHES, moments=True)
    qs.calibrate(qmodel, statistics)
    qs.round_weights(qmodel, statistics)
    assert_equal_roundings(qmodel, rounded())


def test_doing_it_again_changes_nothing() -> None:
    qmodel = rounded()
    first = qs.round_weights(calibrated(), BATCHES)
    assert qs.round_weights(qmodel, BATCHES).to_json() == first.to_json()
    assert_equal_roundings(qmodel, rounded())


@pytest.mark.parametrize("bits", [4, 8])
def test_grids_of_other_widths_and_one_range_for_all(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"schema: 1\nname: mine\nextends: linear-only\nspecs:\n  weight: {{num_bits: {bits}, axis: null}}\n",
        encoding="utf-8",
    )
    qmodel = qs.convert(spoiled(), path)
    qs.calibrate(qmodel, BATCHES)
    made = qs.round_weights(qmodel, BATCHES)
    assert all(each.adapted < each.nearest for each in made.weights)
    for name, linear in linears(qmodel).items():
        assert linear._weight_quantizer is not None
        step = linear._weight_quantizer.step_size
        assert step is not None
        integers = (linear.quantized_weight() / step).detach()
        # A float32 quotient of multiples of the step.
        assert float((integers - integers.round()).abs().max()) < 1e-3, name
        assert -(2 ** (bits - 1)) <= float(integers.min().round()), name
        assert float(integers.max().round()) <= 2 ** (bits - 1) - 1, name


# What holds as ever ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "albert", "deberta-v2"])
def test_with_the_quantizers_off_it_is_the_float_model(model_type: str) -> None:
    model = build(model_type, next(head for head in BY_TYPE[model_type].heads() if head.endswith("Model")))
    qmodel = qs.convert(model)
    batch = batch_for(model, (3, 8))
    statistics = qs.collect(qmodel, [batch], moments=True)
    qs.calibrate(qmodel, statistics)
    qs.round_weights(qmodel, statistics)
    assert roundings(qmodel)
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in qmodel.state_dict().items() if name in weights)
    with qs.quantization_disabled(qmodel):
        for training in (False, True):
            assert_same(model.train(training), qmodel.train(training), batch_for(model, (2, 5)))


def test_weights_ranges_and_scales_are_untouched_and_the_float_model_comes_back() -> None:
    model, plain, qmodel = spoiled(), calibrated("qdqbert-scaled"), rounded("qdqbert-scaled")
    for name, value in plain.state_dict().items():
        assert torch.equal(qmodel.state_dict()[name], value), name
    restored = qmodel.dequantize()
    assert restored.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(restored.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("rules", ["qdqbert", "qdqbert-scaled"])
def test_saved_and_loaded_it_is_the_same(rules: str, tmp_path: Path) -> None:
    qmodel = rounded(rules)
    qmodel.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = AutoModel.from_pretrained(tmp_path)
    assert_equal_roundings(again, qmodel)
    assert torch.equal(hidden(again), hidden(qmodel))
    again.save_pretrained(tmp_path / "again")
    assert_equal_roundings(AutoModel.from_pretrained(tmp_path / "again"), qmodel)


def test_a_head_loads_its_base(tmp_path: Path) -> None:
    model = build("bert", "BertForSequenceClassification")
    qmodel = qs.convert(model)
    batch = batch_for(model, (4, 8))
    qs.calibrate(qmodel, [batch])
    qs.round_weights(qmodel, [batch])
    qmodel.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    wanted = {name.removeprefix("bert."): value for name, value in roundings(qmodel).items() if "bert." in name}
    assert roundings(base).keys() == wanted.keys()
    assert all(torch.equal(roundings(base)[name], value) for name, value in wanted.items())


def test_state_dicts() -> None:
    qmodel = rounded()
    state = qmodel.state_dict()
    fresh = qs.convert(spoiled())
    fresh.load_state_dict(state)
    assert_equal_roundings(fresh, qmodel)
    assert torch.equal(hidden(fresh), hidden(qmodel))
    # The state of a model that rounds to the nearest brings that back; so do other weights without any.
    for other in (calibrated().state_dict(), {n: value for n, value in state.items() if "_quantizer" not in n}):
        fresh.load_state_dict(state)
        assert_equal_roundings(fresh, qmodel)
        fresh.load_state_dict(other, strict=False)
        assert not roundings(fresh)
    name = f"{SITE}._weight_quantizer._rounding"
    for bad, words in (
        (state[name][:-1].clone(), r"rounding has the shape \(47, 32\), and the weight \(48, 32\)"),
        (state[name].float(), "rounding is in float32, wanted int8"),
    ):
        with pytest.raises(RuntimeError, match=words):
            qs.convert(spoiled()).load_state_dict({**state, name: bad})
    odd = f"{SITE}._input_quantizer._rounding"
    with pytest.raises(RuntimeError, match="an adapted rounding is for the weight of a linear"):
        qs.convert(spoiled()).load_state_dict({**state, odd: state[name]})


def test_copies_pickles_and_other_precisions() -> None:
    qmodel = rounded()
    for copied in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert_equal_roundings(copied, qmodel)
        assert torch.equal(hidden(copied), hidden(qmodel))
    half = copy.deepcopy(qmodel).to(torch.bfloat16)
    assert {value.dtype for value in roundings(half).values()} == {torch.int8}
    wanted = hidden(qmodel)
    # bfloat16 has 8 bits.
    assert float((hidden(half).float() - wanted).norm() / wanted.norm()) < 0.03


def test_compiled_and_exported_it_computes_the_same() -> None:
    qmodel = rounded("qdqbert-scaled")
    linear, given = qmodel.get_submodule(SITE), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(linear, (given,)).module()
    # A fused multiplication may round once where eager rounds twice, so that a tie falls the other way.
    torch.testing.assert_close(exported(given), linear(given), rtol=1e-3, atol=1e-3)
    # A whole model is compiled in test_equalization.py: what is new here is in its linears.
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(given), linear(given), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("learned", [False, True])
def test_training_goes_on_from_there(learned: bool) -> None:
    qmodel = rounded().train()
    parameters = list(qmodel.parameters())
    if learned:
        qs.learn_ranges(qmodel, weights=True)
        parameters = list(qmodel.parameters())
    wanted = copy.deepcopy(qmodel)
    assert torch.equal(hidden(qmodel.eval()), hidden(rounded()))
    qmodel.train()(**BATCH).last_hidden_state.square().mean().backward()
    gradients = [each.weight.grad for each in linears(qmodel).values()]
    assert all(each is not None and bool(each.isfinite().all()) for each in gradients)
    torch.optim.SGD(parameters, lr=1e-3).step()
    assert_equal_roundings(qmodel, wanted)
    qs.fix_ranges(qmodel)
    assert_equal_roundings(qmodel, wanted)


@pytest.mark.parametrize(
    "reset",
    [
        lambda qmodel: qs.calibrate(qmodel, BATCHES),
        qs.recalibrate_weights,
        lambda qmodel: [each.reset_amax() for each in qs.quantizers(qmodel).values() if each.role == "weight"],
    ],
)
def test_a_range_that_is_set_anew_is_rounded_to_the_nearest_again(reset: Any) -> None:
    qmodel = rounded()
    reset(qmodel)
    assert not roundings(qmodel)


def test_scales_that_are_found_anew_take_the_rounding_of_their_weights_along() -> None:
    qmodel = rounded("onnxruntime")
    qs.equalize(qmodel, BATCHES)
    scaled = {name for name, each in linears(qmodel).items() if each.channel_scale is not None}
    assert {name.removesuffix("._weight_quantizer") for name in roundings(qmodel)} == set(linears(qmodel)) - scaled


def test_the_report_and_explain_say_so(tmp_path: Path) -> None:
    qmodel = rounded()
    qmodel.save_pretrained(tmp_path)
    for model in (qmodel, AutoModel.from_pretrained(tmp_path)):
        words = {each["quantizer"]: each["method"] for each in report_of(model)["calibration"]["ranges"]}
        for name in qs.quantizers(qmodel):
            assert words[name] == ("max, adapted rounding" if name in roundings(model) else "max"), name
        quantizer = qs.quantizers(model)[f"{SITE}._weight_quantizer"]
        assert quantizer.amax is not None
        quantizer.amax = quantizer.amax * 1.5
        words = {each["quantizer"]: each["method"] for each in report_of(model)["calibration"]["ranges"]}
        assert words[f"{SITE}._weight_quantizer"] == "max, trained"
    assert "adapted rounding" in qs.explain(rounded(), f"{SITE}._weight_quantizer").to_text()
    assert "adapted rounding" not in qs.explain(rounded(), f"{SITE}._input_quantizer").to_text()
    assert qs.diff(spoiled(), rounded()).to_text() == qs.diff(spoiled(), calibrated()).to_text()


def test_autocast_and_inference_mode_change_nothing() -> None:
    wanted = rounded()
    for mode in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        qmodel = calibrated()
        statistics = qs.collect(qmodel, BATCHES, moments=True)
        with mode:
            qs.round_weights(qmodel, statistics)
        assert_equal_roundings(qmodel, wanted)
        assert not any(each.is_inference() for each in roundings(qmodel).values())
    with torch.autocast("cpu", torch.bfloat16):
        statistics = qs.collect(qmodel, BATCHES, moments=True)
    assert {each.moments.dtype for each in statistics.seen.values() if each.moments is not None} == {torch.float32}


def test_values_beyond_their_range_are_moved_from_where_they_are() -> None:
    """The integers are those that were chosen, wherever the weight lies."""
    qmodel = calibrated()
    for name, quantizer in qs.quantizers(qmodel).items():
        if name.endswith("weight_quantizer"):
            assert quantizer.amax is not None
            quantizer.amax = quantizer.amax * 0.7
    statistics = qs.collect(qmodel, BATCHES, moments=True)
    qs.round_weights(qmodel, statistics)
    adapted = 0
    for name, linear in linears(qmodel).items():
        quantizer, moments = linear._weight_quantizer, statistics.seen[f"{name}._input_quantizer"].moments
        assert quantizer is not None
        assert moments is not None
        assert quantizer.step_size is not None
        if quantizer.rounding is not None:
            adapted += 1
            weight = linear.weight.detach()
            wanted = adapted_integers(weight, moments, quantizer.step_size, -128, 127)
            found = quantizer.integers(quantizer.moved(weight))
            # Where a moved value lies half-way, the sum of weight and steps may fall on the other side; and there is
            # no moving further than by 127 steps.
            near = quantizer.rounding.abs() < 127
            assert float((found != wanted)[near].float().mean()) < 2e-3, name
            assert float(near.float().mean()) > 0.9, name
    assert adapted > 4


def test_an_unsigned_weight_stays_so() -> None:
    qmodel = calibrated()
    with torch.no_grad():
        for linear in linears(qmodel).values():
            linear.weight.abs_()
            assert linear._weight_quantizer is not None
            linear._weight_quantizer._unsigned = True
    qs.round_weights(qmodel, BATCHES)
    assert roundings(qmodel)
    assert bool(hidden(qmodel).isfinite().all())


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_calibrated_is_refused() -> None:
    with pytest.raises(
        CalibrationError, match=r"_weight_quantizer has no range to round by; calibrate the model first"
    ):
        qs.round_weights(qs.convert(spoiled()), BATCHES)


def test_statistics_without_moments_or_of_another_model_are_refused() -> None:
    qmodel = calibrated()
    wide = build("bert", "BertModel", hidden_size=64)
    with pytest.raises(CalibrationError, match="collect them from this model with moments=True"):
        qs.round_weights(qmodel, qs.collect(qs.convert(wide), [batch_for(wide, (2, 6))], moments=True))
    with pytest.raises(CalibrationError, match=r"no moments of .*_input_quantizer.*collect them .* with moments=True"):
        qs.round_weights(qmodel, qs.collect(qmodel, BATCHES))
    assert not roundings(qmodel)


def test_a_weight_whose_inputs_nobody_sees_is_left_and_said() -> None:
    qmodel = calibrated()
    qs.quantizers(qmodel)[f"{SITE}._input_quantizer"].disable()
    made = qs.round_weights(qmodel, BATCHES)
    assert made.left == (f"{SITE}._weight_quantizer",)
    assert f"{SITE}._weight_quantizer" not in roundings(qmodel)
    assert made.left[0] in made.to_text()
    for name, quantizer in qs.quantizers(qmodel).items():
        if name.endswith("dense._input_quantizer") or "self" in name:
            quantizer.disable()
    with pytest.raises(CalibrationError, match="no linear has a quantizer on its weight and one on its input"):
        qs.round_weights(qmodel, BATCHES)


def test_it_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel = rounded()
    wanted, count = copy.deepcopy(qmodel), [0]

    def failing(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    original = module._rounded
    monkeypatch.setattr(module, "_rounded", failing)
    with pytest.raises(KeyboardInterrupt):
        qs.round_weights(qmodel, BATCHES[:1])
    assert_equal_roundings(qmodel, wanted)
    assert torch.equal(hidden(qmodel), hidden(wanted))


def test_where_no_rounding_is_better_it_stays_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "adapted_integers", lambda weight, *_: torch.zeros_like(weight))
    qmodel = rounded()
    made = qs.round_weights(qmodel, BATCHES)
    assert not roundings(qmodel)
    assert all(each.adapted == each.nearest and each.moved == 0.0 for each in made.weights)
    assert torch.equal(hidden(qmodel), hidden(calibrated()))
