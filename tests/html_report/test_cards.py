"""What is said of each quantizer is what the model and the results say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import batch_for, build
from report_pages import reported

import qdq_surgery as qs
from qdq_surgery.calibration.ranges import Calibration
from qdq_surgery.html_report.bars import share_beyond
from qdq_surgery.html_report.cards import Card, calibration_now, cards_of
from qdq_surgery.html_report.given import Given
from qdq_surgery.numerics.range_methods import relative_error


def cards(**left_out: None) -> tuple[Card, ...]:
    qmodel, results = reported()
    return cards_of(qmodel, Given(**{**results, **left_out}))


def test_every_quantizer_has_one_in_the_order_of_the_model() -> None:
    assert [card.name for card in cards()] == list(qs.quantizers(reported()[0]))


def test_figures_are_those_of_the_results() -> None:
    qmodel, results = reported()
    costs = {cost.name: cost for cost in results["sensitivity"].of("site")}
    assert costs
    for card in cards():
        quantizer, seen = qs.quantizers(qmodel)[card.name], results["statistics"].seen.get(card.name)
        figures, cost = card.figures, costs[card.name]
        assert quantizer.amax is not None
        assert quantizer.step_size is not None
        assert figures.amax == float(quantizer.amax.max())
        assert figures.step == float(quantizer.step_size.max())
        assert figures.channels == quantizer.amax.numel()
        assert (figures.alone, figures.left, figures.gain) == (cost.alone, cost.left, cost.gain)
        if seen is None:
            assert card.role == "weight"
            assert (figures.error, figures.clipped, figures.values) == (None, None, None)
        else:
            assert figures.error == relative_error(*seen.histogram.table(), figures.amax, quantizer.grid)
            assert figures.clipped == share_beyond(seen.histogram, figures.amax)
            assert (figures.values, figures.largest) == (seen.histogram.total, float(seen.amax))
    assert any(card.figures.clipped for card in cards())


def test_facts_say_why_and_where() -> None:
    for card in cards():
        facts, origin = dict(card.facts), card.origin
        assert origin is not None
        assert facts["rule"] == f"{origin.rule} of {origin.rules}"
        assert facts["why"] == origin.why
        assert facts["declared at"] == origin.declared
        assert facts["declared at"].startswith("qdqbert.yaml:")
        assert facts["operand"] == f"{origin.operand} at {origin.source}"
        assert facts["asked for"] == origin.descriptor
        assert facts["found by"].startswith("99 %" if card.role == "input" else "max")


def test_facts_of_other_results() -> None:
    _, results = reported()
    found = {card.name: dict(card.facts) for card in cards()}
    first, *_ = found
    assert found[first]["lint 1"] == "blocks MatMulIntegerToFloat: its input is no pair"
    assert "lint 1" not in found[list(found)[1]]
    assert found[first]["on the runtime"] == "agrees; 0 ties of 1,000 values"
    rounded = results["rounding"].weights[0]
    assert found[rounded.quantizer]["rounding"] == f"error of the product {100 * rounded.nearest:.4f} % to the nearest"
    named = next(cost for cost in results["sensitivity"].of("site") if 7 in cost.outliers)
    assert f"channel 7 ({named.outliers[7]:.3g} x)" in found[named.name]["outliers"]
    assert found[first]["in INT8 alone"].startswith("mse ")


def test_without_results_the_model_tells_what_it_knows() -> None:
    qmodel, _ = reported()
    calibration = calibration_now(qmodel)
    assert isinstance(calibration, Calibration)
    errors = {each.quantizer: each.error for each in calibration.ranges}
    for card in cards_of(qmodel, Given()):
        assert card.figures.error == errors[card.name]
        assert (card.figures.clipped, card.figures.alone) == (None, None)
        assert (card.bars is None) == (card.role == "input")


def test_without_ranges_it_says_so() -> None:
    qmodel = qs.convert(build("bert", "BertModel", num_hidden_layers=1))
    first, *others = cards_of(qmodel, Given())
    assert (first.figures.amax, first.figures.step, first.bars) == (None, None, None)
    assert "until the model is calibrated" in dict(first.facts)["range"]
    assert len(others) == 19
    quantizer = qs.quantizers(qmodel)[first.name]
    quantizer.disable()
    assert dict(cards_of(qmodel, Given())[0].facts)["state"].startswith("disabled")


def test_scales_per_channel_have_one_step_and_the_channels_magnitudes() -> None:
    qmodel = qs.convert(build("bert", "BertModel", num_hidden_layers=1), "qdqbert-scaled")
    seen = qs.collect(qmodel, [batch_for(qmodel, (2, 9))])
    qs.calibrate(qmodel, seen)
    for card in cards_of(qmodel, Given(statistics=seen, equalization=qs.equalize(qmodel, seen))):
        quantizer = qs.quantizers(qmodel)[card.name]
        if not quantizer.scaled:
            continue
        assert quantizer.amax is not None
        assert quantizer.channel_scale is not None
        assert card.bars is not None
        assert sum(card.bars.counts) == card.figures.channels == quantizer.amax.numel()
        assert card.bars.mark == float(quantizer.amax.min())
        step = (quantizer.amax.flatten() / quantizer.channel_scale).max() / quantizer.grid.qmax
        assert card.figures.step == pytest.approx(float(step), rel=1e-6)  # two float32 divisions
        assert "a scale for each channel" in dict(card.facts)["step"]
        assert "channels, outliers above" in dict(card.facts)["scaled"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_odd_ranges_are_shown_and_written(value: float, tmp_path: Path) -> None:
    qmodel = qs.convert(build("bert", "BertModel", num_hidden_layers=1))
    seen = qs.collect(qmodel, [batch_for(qmodel, (2, 6))])
    qs.calibrate(qmodel, seen)
    for quantizer in qs.quantizers(qmodel).values():
        assert quantizer.amax is not None
        quantizer.amax.fill_(value)
    qs.report(qmodel, tmp_path / "odd.html", statistics=seen)
    for card in cards_of(qmodel, Given(statistics=seen)):
        assert card.figures.amax == (0.0 if value == 0.0 else None)
        assert ("calibrate the model again" in dict(card.facts)["range"]) is (value != 0.0)


@pytest.mark.parametrize(("model_type", "head"), [("albert", "AlbertModel"), ("modernbert", "ModernBertModel")])
def test_sites_are_named_with_a_star_for_their_layer(model_type: str, head: str) -> None:
    qmodel = qs.convert(build(model_type, head))
    found = cards_of(qmodel, Given())
    assert [card.name for card in found] == list(qs.quantizers(qmodel))
    for card in found:
        assert card.layer is not None
        assert card.site.replace("*", str(card.layer)) == card.name or "*" not in card.site


def test_learned_ranges_are_read_without_their_gradient() -> None:
    qmodel = qs.convert(build("bert", "BertModel", num_hidden_layers=1))
    qs.calibrate(qmodel, [batch_for(qmodel, (2, 6))])
    before = [card.figures.amax for card in cards_of(qmodel, Given())]
    qs.learn_ranges(qmodel)
    after = cards_of(qmodel, Given())
    assert [card.figures.amax for card in after] == before
    assert any("trained" in dict(card.facts) for card in after)
    assert all(torch.is_tensor(each.amax) for each in qs.quantizers(qmodel).values())
