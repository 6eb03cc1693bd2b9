"""The registry: a method that is added there is one for rules, statistics and command lines."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qdq_surgery.calibration.collect import Seen, Statistics
from qdq_surgery.calibration.ranges import weight_range
from qdq_surgery.cli.commands import main
from qdq_surgery.errors import RuleFileError
from qdq_surgery.numerics.grid import INT8, Grid
from qdq_surgery.numerics.histogram import Histogram
from qdq_surgery.numerics.range_choice import RANGE_METHODS, RangeMethod, choose, method_names
from qdq_surgery.quantize.factory import make_quantizer
from qdq_surgery.quantize.provenance import Provenance
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec
from tasks.options import parse

VALUES = torch.linspace(-2.0, 2.0, 4001)


def half(counts: Tensor, edges: Tensor, grid: Grid, share: float = 0.5) -> float:
    """A toy: a share of the largest magnitude, less a step."""
    return float(edges[counts.numel()]) * share - grid.step(1.0)


def half_by_channel(weight: Tensor, axis: int, grid: Grid) -> Tensor:
    assert grid == INT8
    return weight.abs().amax(1 - axis, keepdim=True) / 2


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    method = RangeMethod(half, "{share:g} of all", ({"share": 0.25}, {"share": 0.75}), by_channel=half_by_channel)
    monkeypatch.setitem(RANGE_METHODS, "toy", method)
    return "toy"


def test_todays_methods() -> None:
    assert method_names() == ("max", "percentile", "entropy", "mse", "best")


@pytest.mark.parametrize("options", [{}, {"share": 0.25}, {"share": None, "percentile": 3.0}], ids=str)
def test_choose_knows_it(toy: str, options: dict[str, float | None]) -> None:
    histogram = Histogram.of(VALUES)
    share = options.get("share") or 0.5
    # The upper edge of the last bin lies less than two bins of 4 / 4096 above the largest magnitude.
    amax, words = choose(histogram, toy, INT8, **options)
    assert words == f"{share:g} of all"
    assert amax == pytest.approx(2.0 * share - 1 / 127, abs=2 * 4 / 4096)


@pytest.mark.usefixtures("toy")
def test_comparisons_and_best_try_its_settings() -> None:
    histogram = Histogram.of(VALUES)
    seen = {"a": Seen(histogram, histogram.amax, INT8)}
    columns = ["max", "99.9 %", "99.99 %", "99.999 %", "entropy", "mse", "0.25 of all", "0.75 of all"]
    assert list(Statistics(seen, 1, 1, 1).compare()["a"]) == columns
    assert list(Statistics(seen, 1, 1, 1).compare([90])["a"]) == ["max", "90 %", *columns[4:]]
    assert choose(histogram, "best")[1] in columns


def test_the_best_of_all_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdq_surgery.numerics.range_methods.relative_error", lambda _counts, _edges, amax, _grid: amax)
    monkeypatch.setitem(RANGE_METHODS, "toy", RangeMethod(lambda _counts, _edges: 0.1, "least"))
    assert choose(Histogram.of(VALUES), "best") == (0.1, "least")


def test_rules_know_it(toy: str) -> None:
    assert CalibratorSpec(toy, num_bins=512).is_histogram
    with pytest.raises(RuleFileError, match="calibrator 'toy' takes no percentile"):
        CalibratorSpec(toy, percentile=90.0)
    with pytest.raises(RuleFileError, match="write one of max, histogram, percentile, entropy, mse, toy, best"):
        CalibratorSpec("other")
    with pytest.raises(RuleFileError, match=r"for weights also mse, toy\)"):
        QuantSpec(axis=0, calibrator=CalibratorSpec("entropy"))


def test_a_weight_has_it_for_each_channel(toy: str) -> None:
    spec = QuantSpec(axis=0, calibrator=CalibratorSpec(toy))
    weight = nn.Linear(7, 3).weight.detach()
    why = Provenance("l._weight_quantizer", "weight", *[""] * 7)
    quantizer = make_quantizer(spec, None, why, torch.device("cpu"))
    wanted = weight.abs().amax(1, keepdim=True) / 2
    found = weight_range("l._weight_quantizer", quantizer, weight)
    assert torch.equal(found.amax, wanted)
    assert found.how.method == "toy"
    quantizer.enable_calib()
    quantizer(weight)
    quantizer.load_calib_amax()
    assert quantizer.amax is not None
    assert torch.equal(quantizer.amax, wanted)


def test_command_lines_know_it(toy: str, tmp_path: Path) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main(["calibrate", "--help"])
    assert "{max,percentile,entropy,mse,toy,best}" in "".join(printed.getvalue().split())
    options = ["--model_name_or_path", str(tmp_path), "--train_file", "a.tsv", "--output_dir", "b", "--do_calib"]
    assert parse("script", [*options, "--calibrator", toy]).calibrator == toy
