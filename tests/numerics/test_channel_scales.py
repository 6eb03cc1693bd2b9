"""Scales per channel: what the methods promise, for any data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qdq_surgery.numerics.channel_scales import (
    SCALE_METHODS,
    channel_scale,
    max_ranges,
    outlier_ranges,
    smooth_ranges,
)

TOPS = st.lists(st.floats(0.0, 1e6, width=32), min_size=1, max_size=40).filter(lambda tops: max(tops) > 1e-30)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values)


def test_only_outliers_have_a_scale() -> None:
    ranges = outlier_ranges(tensor(1.0, 2.0, 3.0, 150.0), threshold=1.5)
    # The median of four is torch's lower one, 2; the threshold is 3, and 50 is rounded up.
    assert ranges.tolist() == [3.0, 3.0, 3.0, 192.0]
    assert channel_scale(ranges).tolist() == [1.0, 1.0, 1.0, 64.0]


@pytest.mark.parametrize(("top", "scale"), [(3.0, 1.0), (3.01, 2**0.5), (4.2, 2**0.5), (6.0, 2.0), (6.1, 8**0.5)])
def test_scales_are_powers_of_the_root_of_two(top: float, scale: float) -> None:
    found = channel_scale(outlier_ranges(tensor(2.0, 2.0, 2.0, top)))
    assert found.tolist() == [1.0, 1.0, 1.0, pytest.approx(scale, rel=1e-6)]


def test_without_outliers_all_share_the_largest_range() -> None:
    assert outlier_ranges(tensor(1.0, 1.2, 0.9), threshold=1.5).tolist() == [pytest.approx(1.2)] * 3


def test_dead_channels_do_not_lower_the_median() -> None:
    ranges = outlier_ranges(tensor(0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 100.0), threshold=1.5)
    assert ranges.tolist() == [3.0] * 6 + [pytest.approx(3 * 2**5.5)]


def test_smooth_is_the_formula_of_the_paper() -> None:
    tops, weights = tensor(4.0, 16.0, 1.0), tensor(1.0, 4.0, 0.25)
    scale = tops.sqrt() / weights.sqrt()
    # What is rounded, tops / scale, shares one range: its largest.
    assert torch.equal(smooth_ranges(tops, weights), scale * (tops / scale).max())


@pytest.mark.parametrize(("alpha", "scale"), [(0.0, [1.0, 1.0]), (1.0, [1.0, 9.0])])
def test_the_ends_of_smooth(alpha: float, scale: list[float]) -> None:
    assert channel_scale(smooth_ranges(tensor(1.0, 9.0), torch.ones(2), alpha)).tolist() == scale


def test_max_makes_all_channels_equally_large() -> None:
    tops = tensor(0.5, 8.0)
    assert (tops / channel_scale(max_ranges(tops))).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", SCALE_METHODS)
@example(tops=[1.0, 1.401298464324817e-45])
@given(tops=TOPS)
@settings(max_examples=60)
def test_no_value_is_cut_off_and_every_scale_is_a_number(name: str, tops: list[float]) -> None:
    values = torch.tensor(tops, dtype=torch.float32)
    ranges = SCALE_METHODS[name].find(values, torch.ones_like(values))
    assert ranges.shape == values.shape
    assert ranges.dtype == torch.float32
    # Within the rounding of a few operations in float32.
    assert bool((ranges >= values * (1 - 1e-6)).all())
    assert bool((ranges > 0).all())
    scale = channel_scale(ranges)
    assert bool(scale.isfinite().all())
    assert float(scale.min()) == 1.0


@pytest.mark.parametrize("name", SCALE_METHODS)
@pytest.mark.parametrize("factor", [2.0**-10, 4.0])
def test_ranges_follow_the_unit_of_the_data(name: str, factor: float) -> None:
    if name == "smooth":
        pytest.skip("its scale has the unit of a root; only its ratios count")
    tops = tensor(1.0, 3.0, 40.0, 2.0)
    assert torch.equal(SCALE_METHODS[name].find(tops * factor), SCALE_METHODS[name].find(tops) * factor)  # powers of 2


@pytest.mark.parametrize(("name", "default"), [("max", None), ("outliers", 1.5), ("smooth", 0.5)])
def test_options_have_a_default(name: str, default: float | None) -> None:
    assert SCALE_METHODS[name].default() == default
