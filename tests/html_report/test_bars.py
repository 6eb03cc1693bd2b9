"""Histograms as bars: every value is in one, and what is beyond a range is counted as it is defined."""

from __future__ import annotations

import pytest
import torch

from qdq_surgery.html_report.bars import CHANNELS, VALUES, of_channels, of_values, share_beyond
from qdq_surgery.numerics.histogram import Histogram


def values(seed: int = 0, count: int = 5000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 3.0


@pytest.mark.parametrize("scale", [1e-6, 0.7, 1.0, 300.0])
def test_bars_count_what_lies_in_them(scale: float) -> None:
    data = values() * scale
    bars = of_values(Histogram.of(data), 1.5)
    assert (bars.what, bars.mark, bars.words) == (VALUES, 1.5, "5,000 values")
    assert 32 <= len(bars.counts) <= 128
    for at, count in enumerate(bars.counts):
        inside = (data.abs() >= at * bars.width) & (data.abs() < (at + 1) * bars.width)
        assert count == int(inside.sum())


def test_few_values_and_none() -> None:
    assert sum(of_values(Histogram.of(torch.tensor([0.25, -3.0])), None).counts) == 2
    assert sum(of_values(Histogram.of(torch.zeros(7)), None).counts) == 7


@pytest.mark.parametrize("amax", [0.5, 2.0, 4.0])
def test_what_is_beyond_a_range_is_counted_to_one_bin(amax: float) -> None:
    histogram = Histogram.of(values())
    width = float(histogram.table()[1][1])
    least, most = ((values().abs() > amax + slack).double().mean().item() for slack in (width, -width))
    assert least <= share_beyond(histogram, amax) <= most
    assert share_beyond(histogram, amax) > 0


def test_nothing_is_beyond_the_largest() -> None:
    histogram = Histogram.of(values())
    assert share_beyond(histogram, float(histogram.amax)) == 0.0
    assert share_beyond(histogram, 0.0) == 0.0


def test_channels_are_counted_once() -> None:
    tops = torch.tensor([0.0, 1.0, 2.0, 2.0, 48.0]).reshape(5, 1)
    bars = of_channels(tops, "tops", 2.5)
    assert (bars.what, bars.width, bars.mark, bars.words) == (CHANNELS, 1.0, 2.5, "tops")
    assert {at: count for at, count in enumerate(bars.counts) if count} == {0: 1, 1: 1, 2: 2, 47: 1}
    assert sum(of_channels(torch.zeros(3), "").counts) == 3
