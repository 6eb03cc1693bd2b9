"""The histogram: every count exact, whatever the order, the grouping and the amount of the data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import reduce
from operator import add
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pytorch_quantization import calib
from torch import Tensor

from qdq_surgery.numerics import histogram as module
from qdq_surgery.numerics.histogram import BINS, Histogram, largest

PROPERTY = settings(max_examples=80)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPE_IDS = ["float32", "float64", "float16", "bfloat16"]

#: Below 2^-64 the grid does not get finer.
LOWEST = -64

TOP = float(np.finfo(np.float32).max)


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def magnitudes(values: Tensor, invalid: Tensor | None = None) -> list[float]:
    """As Python floats, which hold float32 exactly."""
    mask = torch.zeros_like(values, dtype=torch.bool) if invalid is None else invalid.expand_as(values)
    return [abs(value) for value in values.float()[~mask].tolist()]


def brute_force(values: list[float], bins: int = BINS) -> tuple[int, dict[int, int]]:
    """The exponent and the counts of the bins that have any, by Python's exact arithmetic, value by value."""
    top = max(values, default=0.0)
    exponent = max(math.frexp(top)[1], LOWEST) if top else LOWEST
    counts: dict[int, int] = {}
    for value in values:
        # A product with a power of two; Python's floats have the exponents for it, so nothing is rounded.
        index = math.floor(math.ldexp(value, int(math.log2(bins)) - exponent))
        counts[index] = counts.get(index, 0) + 1
    return exponent, counts


def counts_of(histogram: Histogram) -> dict[int, int]:
    return {index: int(histogram.counts[index]) for index in histogram.counts.nonzero().flatten().tolist()}


def assert_same(found: Histogram, wanted: Histogram) -> None:
    """Tolerance 0: counts, grid and amax, where only the sign of a zero is free."""
    assert found.counts.dtype == wanted.counts.dtype == torch.int64
    assert torch.equal(found.exponent, wanted.exponent)
    assert torch.equal(found.counts, wanted.counts)
    assert found.amax.dtype == wanted.amax.dtype == torch.float32
    assert torch.equal(found.amax, wanted.amax)


SCALES = st.sampled_from([0.0, 5e-324, 1e-45, 1e-40, 1e-30, 2.0**-65, 2.0**-64, 1e-9, 0.01, 0.5, 1.0, 3.0, 1e4, 1e30])


@st.composite
def tensors(draw: st.DrawFn, max_size: int = 12) -> Tensor:
    """Values of any magnitude with powers of two, edges of bins, zeros of both signs, denormals; perhaps none."""
    size = draw(st.integers(0, max_size))
    scale = draw(SCALES)
    elements = (
        st.floats(-1.0, 1.0, width=32)
        | st.integers(-BINS, BINS).map(lambda k: k / BINS)
        | st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, float(np.nextafter(np.float32(1), np.float32(0)))])
    )
    values = draw(hnp.arrays(np.float64, size, elements=elements)) * scale
    return torch.tensor(values.astype(np.float32))


# -- one tensor ----------------------------------------------------------------------------------------------------


@given(tensors(), st.sampled_from([16, 256, BINS]))
@PROPERTY
def test_counts_are_those_of_a_count_value_by_value(values: Tensor, bins: int) -> None:
    histogram = Histogram.of(values, bins=bins)
    exponent, counts = brute_force(magnitudes(values), bins)
    if any(magnitudes(values)):  # without a magnitude there is no grid to compare
        assert int(histogram.exponent) == exponent
    assert counts_of(histogram) == counts
    assert histogram.counts.shape == (bins,)
    assert histogram.total == values.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", [(), (1,), (700,), (7, 100), (2, 3, 5, 7)], ids=str)
def test_shapes_and_dtypes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = (data(*shape) if shape else torch.tensor(-1.3)).to(dtype)
    histogram = Histogram.of(values)
    exponent, counts = brute_force(magnitudes(values))
    assert (int(histogram.exponent), counts_of(histogram)) == (exponent, counts)
    assert torch.equal(histogram.amax, values.abs().max().float())  # tolerance 0.0


@given(tensors())
@PROPERTY
def test_amax_is_the_largest_magnitude_to_the_bit(values: Tensor) -> None:
    wanted = values.abs().max() if values.numel() else torch.tensor(0.0)
    for found in (Histogram.of(values).amax, largest(values)):
        assert found.dtype == torch.float32
        assert found.shape == ()
        assert float(found) == float(wanted)


@pytest.mark.parametrize("exponent", [-149, -126, -65, -64, -63, -1, 0, 1, 10, 127])
def test_powers_of_two_and_their_neighbours(exponent: int) -> None:
    power = 2.0**exponent
    below, above = (float(np.nextafter(np.float32(power), np.float32(to))) for to in (0.0, math.inf))
    values = torch.tensor([power, below, above, -power])
    assert counts_of(Histogram.of(values)) == brute_force(magnitudes(values))[1]
    # A power of two is the first value of the upper half of its grid.
    if exponent >= LOWEST:
        assert counts_of(Histogram.of(torch.tensor([power]))) == {BINS // 2: 1}


def test_the_largest_magnitude_lies_in_the_upper_half_of_the_grid() -> None:
    for scale in (1e-18, 1e-3, 0.3, 1.0, 77.0, 1e38):
        histogram = Histogram.of(data(50) / data(50).abs().max() * scale)
        assert int(histogram.counts.nonzero().max()) >= BINS // 2


def test_a_leaf_of_a_graph_can_be_counted() -> None:
    values = data(20).requires_grad_()
    assert not Histogram.of(values * 2).amax.requires_grad
    assert_same(Histogram.of(values), Histogram.of(values.detach()))


def test_arguments_are_left_alone() -> None:
    values, invalid = data(4, 5), torch.tensor([[True], [False], [True], [False]])
    before = values.clone(), invalid.clone()
    Histogram.of(values, invalid)
    largest(values, invalid)
    assert torch.equal(values, before[0])
    assert torch.equal(invalid, before[1])


# -- sums ----------------------------------------------------------------------------------------------------------


@given(st.lists(tensors(6), min_size=1, max_size=5), st.randoms(use_true_random=False))
@PROPERTY
def test_neither_order_nor_grouping_matters(parts: list[Tensor], random: object) -> None:
    whole = Histogram.of(torch.cat(parts))
    made = [Histogram.of(part) for part in parts]
    forward = reduce(add, made)
    assert_same(forward, whole)
    assert_same(reduce(add, reversed(made)), whole)
    random.shuffle(made)  # type: ignore[attr-defined]
    # As a tree, as several machines would add.
    while len(made) > 1:
        made = [reduce(add, made[i : i + 2]) for i in range(0, len(made), 2)]
    assert_same(made[0], whole)
    assert counts_of(whole) == brute_force(magnitudes(torch.cat(parts)))[1]


NOTHING: dict[str, Callable[[], Histogram]] = {
    "zeros": lambda: Histogram.of(torch.zeros(4)),
    "empty": lambda: Histogram.of(torch.empty(0)),
    "all-masked": lambda: Histogram.of(torch.full((2, 3), 1e6), torch.ones(2, 1, dtype=torch.bool)),
}


@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING.keys())
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e3], ids=lambda scale: f"{scale:g}")
def test_a_part_without_a_magnitude_does_not_coarsen_the_grid(nothing: Callable[[], Histogram], scale: float) -> None:
    values = data(100) * scale
    wanted = Histogram.of(values)
    for found in (nothing() + wanted, wanted + nothing()):
        assert torch.equal(found.exponent, wanted.exponent)
        # Zeros are counted, in the first bin; nothing else is.
        difference = found.counts - wanted.counts
        assert int(difference[1:].abs().sum()) == 0
        assert int(difference[0]) == nothing().total


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_order_does_not_matter_in_any_dtype(dtype: torch.dtype, order: tuple[int, ...]) -> None:
    parts = [(data(60, seed=seed) * scale).to(dtype) for seed, scale in enumerate((1e-3, 1.0, 300.0))]
    found = reduce(add, (Histogram.of(parts[index]) for index in order))
    assert_same(found, Histogram.of(torch.cat(parts)))
    assert found.total == 180


@given(tensors(40), st.integers(0, 150))
@PROPERTY
def test_merging_loses_no_count(values: Tensor, coarser: int) -> None:
    histogram = Histogram.of(values)
    exponent = (histogram.exponent + coarser).clamp(max=128).to(torch.int32)
    merged = histogram.rescaled(exponent)
    assert merged.total == histogram.total == values.numel()
    assert torch.equal(merged.exponent, exponent)
    shift = int(exponent) - int(histogram.exponent)
    wanted: dict[int, int] = {}
    for index, count in counts_of(histogram).items():
        wanted[index >> shift] = wanted.get(index >> shift, 0) + count
    assert counts_of(merged) == wanted
    assert torch.equal(merged.amax, histogram.amax)


def test_adding_does_not_change_the_summands() -> None:
    one, other = Histogram.of(data(50)), Histogram.of(data(50, seed=1) * 10)
    before = one.counts.clone(), other.counts.clone()
    _ = one + other
    _ = one + one
    assert torch.equal(one.counts, before[0])
    assert torch.equal(other.counts, before[1])


def doubled(histogram: Histogram, times: int) -> Histogram:
    for _ in range(times):
        histogram = histogram + histogram
    return histogram


@pytest.mark.parametrize("times", [25, 33, 50])
def test_counts_beyond_float32_and_int32_are_exact(times: int) -> None:
    # One value in one bin and three in another, doubled: 2^25 is more than float32 counts, 2^33 more than int32.
    start = Histogram.of(torch.tensor([0.25, 1.5, 1.5, -1.5]))
    many = doubled(start, times)
    assert counts_of(many) == {BINS // 8: 2**times, BINS * 3 // 4: 3 * 2**times}
    assert many.total == 4 * 2**times
    one_more = many + Histogram.of(torch.tensor([0.25]))
    assert counts_of(one_more) == {BINS // 8: 2**times + 1, BINS * 3 // 4: 3 * 2**times}
    # Neither does merging bins lose the one.
    wide = one_more + Histogram.of(torch.tensor([1000.0]))
    assert wide.total == 4 * 2**times + 2
    assert int(wide.counts[1]) == 2**times + 1  # bins of 1024 / 4096


def test_pytorch_quantization_stops_counting_at_2_to_the_24() -> None:
    """What the exact counts are good for: the same data in the real calibrator."""
    theirs = calib.HistogramCalibrator(8, None, False)
    batch = torch.tensor([0.25, 1.0])
    theirs.collect(batch)
    place = int(theirs._calib_hist.nonzero()[0])
    theirs._calib_hist[place] = 2.0**24
    for _ in range(3):
        theirs.collect(batch)
    assert float(theirs._calib_hist[place]) == 2.0**24  # three values were not counted
    ours = Histogram.of(batch)
    ours.counts[int(ours.counts.nonzero()[0])] = 2**24
    for _ in range(3):
        ours = ours + Histogram.of(batch)
    assert counts_of(ours) == {BINS // 8: 2**24 + 3, BINS // 2: 4}


# -- what does not count -------------------------------------------------------------------------------------------

SHAPE = (3, 4, 5)


@pytest.mark.parametrize("known", list(itertools.product((False, True), repeat=3)), ids=str)
def test_masks_of_every_shape_that_broadcasts(known: tuple[bool, ...]) -> None:
    values = data(*SHAPE) * torch.tensor([1e-3, 1.0, 50.0]).reshape(3, 1, 1)
    shape = [size if axis else 1 for size, axis in zip(SHAPE, known, strict=True)]
    invalid = data(*shape, seed=1) > 0.3
    histogram = Histogram.of(values, invalid)
    valid = values[~invalid.expand_as(values)]
    assert_same(histogram, Histogram.of(valid))
    assert float(largest(values, invalid)) == max(magnitudes(values, invalid), default=0.0)
    assert histogram.total == len(valid)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, TOP, -TOP], ids=str)
@pytest.mark.parametrize("mask", ["rows", "columns", "elements"])
def test_what_is_masked_does_not_matter(bad: float, mask: str) -> None:
    values = data(4, 6)
    invalid = {
        "rows": torch.tensor([[False], [True], [False], [True]]),
        "columns": torch.tensor([[True, False, False, True, False, False]]),
        "elements": data(4, 6, seed=1) > 0,
    }[mask]
    wanted = Histogram.of(values, invalid)
    assert 0 < wanted.total < 24
    spoilt = values.masked_fill(invalid, bad)
    assert_same(Histogram.of(spoilt, invalid), wanted)
    assert torch.equal(largest(spoilt, invalid), wanted.amax)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
def test_what_is_no_number_shows_in_amax(bad: float, masked: bool) -> None:
    invalid = torch.tensor([[False], [True]]) if masked else None
    values = data(2, 6)
    values[0, 3] = bad
    histogram = Histogram.of(values, invalid)
    assert float(histogram.amax) == math.inf or (math.isnan(bad) and math.isnan(float(histogram.amax)))
    assert histogram.counts.shape == (BINS,)
    # And stays there, whatever is added and on which side.
    for total in (histogram + Histogram.of(data(9)), Histogram.of(data(9)) + histogram):
        assert torch.equal(total.amax.nan_to_num(-1.0), histogram.amax.nan_to_num(-1.0))


def test_a_nan_is_not_hidden_by_an_infinity() -> None:
    values = torch.tensor([math.inf, math.nan, -math.inf])
    assert math.isnan(float(largest(values)))
    assert math.isnan(float((Histogram.of(values[:1]) + Histogram.of(values[1:2])).amax))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_largest(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.5, -3.0], [2.0, 1.0]], dtype=dtype)
    for invalid, wanted in [
        (None, 3.0),
        (torch.tensor([[True], [False]]), 2.0),
        (torch.tensor([[False, True]]), 2.0),
        (torch.tensor([[True, True]]), 0.0),
        (torch.tensor([[True, True], [True, False]]), 1.0),
    ]:
        found = largest(values, invalid)
        assert (found.dtype, found.shape, float(found)) == (torch.float32, torch.Size([]), wanted)
    assert float(largest(torch.empty(0, 3))) == 0.0


# -- as a table ----------------------------------------------------------------------------------------------------


@given(tensors(30))
@PROPERTY
def test_the_table_covers_the_largest_value_and_no_more(values: Tensor) -> None:
    histogram = Histogram.of(values)
    counts, edges = histogram.table()
    assert (counts.dtype, edges.dtype) == (torch.int64, torch.float64)
    assert edges.numel() == counts.numel() + 1
    assert int(counts.sum()) == values.numel()
    assert float(edges[0]) == 0.0
    top = max(magnitudes(values), default=0.0)
    assert float(edges[-2]) <= top < float(edges[-1])
    # Tolerance 0: edges are multiples of a power of two.
    for index in counts.nonzero().flatten().tolist():
        low, high = float(edges[index]), float(edges[index + 1])
        assert int(counts[index]) == sum(low <= value < high for value in magnitudes(values))


@pytest.mark.parametrize("values", [torch.empty(0), torch.zeros(3)], ids=["empty", "zeros"])
def test_the_table_of_nothing_has_one_bin(values: Tensor) -> None:
    counts, edges = Histogram.of(values).table()
    assert counts.tolist() == [values.numel()]
    assert edges.shape == (2,)
    assert float(edges[1]) > 0


# -- large tensors, and other devices ------------------------------------------------------------------------------

#: More values than are counted at once.
LARGE = [(150_000,), (1, 150_000), (150_000, 1), (3, 70_001), (1001, 211), (7, 200, 190), (2, 3, 1, 45_000)]


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_tensors(shape: tuple[int, ...]) -> None:
    values = data(*shape)
    assert values.numel() > module._PIECE
    found = Histogram.of(values)
    exponent = math.frexp(float(values.abs().max()))[1]
    # Exactly as before: a product with a power of two, in float64.
    index = (values.double().abs() * 2.0 ** (12 - exponent)).floor().long().flatten()
    assert torch.equal(found.counts, torch.bincount(index, minlength=BINS))
    assert found.total == values.numel()
    for known in itertools.product((False, True), repeat=len(shape)):
        mask_shape = [size if axis else 1 for size, axis in zip(shape, known, strict=True)]
        invalid = data(*mask_shape, seed=1) > 0.3
        assert_same(Histogram.of(values, invalid), Histogram.of(values[~invalid.expand_as(values)]))


def test_large_tensors_need_not_be_contiguous() -> None:
    values, invalid = data(300, 4, 200), data(300, 1, 200, seed=1) > 0
    assert_same(
        Histogram.of(values.transpose(0, 2), invalid.transpose(0, 2)),
        Histogram.of(values, invalid),
    )


class _Name(str):
    """Names the CPU to torch, and something else to whoever asks for the type."""

    type = "elsewhere"


class _Away(Tensor):
    """A tensor that says that it is on another device, so that what runs there runs here."""

    @property
    def device(self) -> _Name:  # type: ignore[override]
        return _Name("cpu")


def here(histogram: Histogram) -> Histogram:
    assert isinstance(histogram.counts, _Away)  # otherwise it went the CPU's way
    return Histogram(*(part.as_subclass(Tensor) for part in vars(histogram).values()))


@given(tensors(40), tensors(40), st.booleans())
@settings(max_examples=50)
def test_other_devices_count_alike(values: Tensor, more: Tensor, masked: bool) -> None:
    invalid = values > 0 if masked else None
    wanted, other = Histogram.of(values, invalid), Histogram.of(more)
    with mock.patch.object(torch, "bincount", side_effect=AssertionError("this waits for the device")):
        found = Histogram.of(values.as_subclass(_Away), invalid)
        added = Histogram.of(more.as_subclass(_Away)) + found
    assert_same(here(found), wanted)
    assert_same(here(added), other + wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_other_devices_show_what_is_no_number(bad: float) -> None:
    values = torch.tensor([[1.0, bad], [bad, 2.0]])
    found = Histogram.of(values.as_subclass(_Away))
    assert not math.isfinite(float(found.amax))
    masked = Histogram.of(values.as_subclass(_Away), torch.tensor([[False, True], [True, False]]))
    assert_same(here(masked), Histogram.of(torch.tensor([1.0, 2.0])))
