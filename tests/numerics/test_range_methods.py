"""Ranges from histograms: the bins that pytorch-quantization chooses on the same histogram, and what it gets wrong."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_quantization import calib, tensor_quant
from pytorch_quantization.calib import histogram as reference
from torch import Tensor

from qdq_surgery.numerics.fake_quant import fake_quant
from qdq_surgery.numerics.grid import INT8, Grid
from qdq_surgery.numerics.histogram import Histogram
from qdq_surgery.numerics.range_methods import (
    START_BIN,
    channel_mse_amax,
    entropy_amax,
    mse_amax,
    percentile_amax,
    relative_error,
)

PROPERTY = settings(max_examples=60)

Table = tuple[Tensor, Tensor]


def samples(kind: str, count: int = 20_000, seed: int = 0) -> Tensor:
    random = np.random.default_rng(seed)
    made = {
        "normal": lambda: random.normal(size=count),
        "laplace": lambda: random.laplace(size=count),
        "uniform": lambda: random.uniform(-1, 1, size=count),
        "lognormal": lambda: random.lognormal(size=count),
        # Half of all values are 0, as behind a ReLU.
        "relu-sparse": lambda: np.maximum(random.normal(size=count), 0.0),
        # A few channels of transformers are a hundred times as large as the rest.
        "outliers": lambda: np.concatenate([random.normal(size=count), random.normal(size=20) * 60]),
    }[kind]()
    return torch.tensor(made, dtype=torch.float32)


KINDS = ["normal", "laplace", "uniform", "lognormal", "relu-sparse", "outliers"]


@functools.cache
def table_of(kind: str, bins: int = 1024) -> Table:
    return Histogram.of(samples(kind), bins=bins).table()


def even(counts: list[int] | Tensor, width: float = 2.0**-6) -> Table:
    """Counts on evenly spaced edges; a power of two, so that float32 has every edge."""
    made = torch.as_tensor(counts, dtype=torch.int64)
    return made, torch.arange(made.numel() + 1, dtype=torch.float64) * width


def as_numpy(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Copies, because the reference writes into what it gets."""
    return table[0].numpy().copy(), table[1].numpy().copy()


def bin_of(amax: float, edges: Tensor) -> int:
    """Which edge a range is; it must be one. Tolerance 0: edges are multiples of a power of two."""
    (index,) = torch.nonzero(edges == amax).flatten().tolist()
    return int(index)


# -- percentile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [50.003, 90.003, 99.003, 99.903, 99.993])
def test_percentile_is_that_of_pytorch_quantization(kind: str, percentile: float) -> None:
    counts, edges = table_of(kind, 4096)
    found = percentile_amax(counts, edges, percentile)
    wanted = float(reference._compute_amax_percentile(*as_numpy((counts, edges)), percentile))
    if wanted == 0.0:  # half of relu's values are in the first bin, whose lower edge is no range
        assert bin_of(found, edges) == 1
    else:
        assert bin_of(found, edges) == bin_of(wanted, edges)


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any),
    st.integers(1, 10_000),
)
@PROPERTY
def test_percentile_is_the_exact_one(counts: list[int], hundredths: int) -> None:
    found = percentile_amax(*even(counts), hundredths / 100)
    # In whole numbers: the first bin where sum >= percentile / 100 * total.
    passed = [sum(counts[: index + 1]) * 10_000 for index in range(len(counts))]
    index = next(index for index, count in enumerate(passed) if count >= hundredths * sum(counts))
    edge = index + 1 if index == 0 or hundredths == 10_000 else index
    assert bin_of(found, even(counts)[1]) == edge


def test_percentile_counts_where_sums_of_floats_are_wrong() -> None:
    # Ten values, one in each bin: 0.1 added up eight times is less than 0.8, so the reference takes one bin more.
    table = even([1] * 10)
    assert float(np.cumsum(np.full(10, 0.1))[7]) < 0.8
    assert bin_of(percentile_amax(*table, 80.0), table[1]) == 7
    assert bin_of(float(reference._compute_amax_percentile(*as_numpy(table), 80.0)), table[1]) == 8
    for percentile in range(20, 100, 10):
        assert bin_of(percentile_amax(*table, float(percentile)), table[1]) == percentile // 10 - 1


def test_percentile_reads_the_number_that_is_written() -> None:
    # 99.9 as a binary fraction is a little more than 999 of 1000: the float would take one bin more.
    table = even([1] * 1000)
    assert bin_of(percentile_amax(*table, 99.9), table[1]) == 998
    assert bin_of(percentile_amax(*table, float(np.float64(99.9))), table[1]) == 998
    assert bin_of(percentile_amax(*table, 99.90001), table[1]) == 999


def test_percentile_100_is_the_upper_edge() -> None:
    assert percentile_amax(*even([5, 0, 3]), 100) == 3 * 2.0**-6
    assert percentile_amax(*even([5, 0, 3, 0, 0]), 100) == 3 * 2.0**-6
    # The reference's is the lower one: the range is less than the largest value.
    assert float(reference._compute_amax_percentile(*as_numpy(even([5, 0, 3])), 100)) == 2 * 2.0**-6


@pytest.mark.parametrize("percentile", [0, -1.0, 100.001, math.inf, math.nan])
def test_percentiles_outside_the_limits_are_refused(percentile: float) -> None:
    with pytest.raises(ValueError, match=r"is outside \(0, 100\]; give for example 99.99"):
        percentile_amax(*even([1, 2]), percentile)


def test_percentile_of_counts_beyond_int32() -> None:
    table = even([2**40 - 1, 1, 2**33, 2**20])
    total = int(table[0].sum())
    for passed, edge in [(2**40 - 1, 1), (2**40, 1), (2**40 + 1, 2), (2**40 + 2**33 + 1, 3)]:
        # The shortest decimal that this many values reach; twelve digits of percent tell single values apart.
        assert bin_of(percentile_amax(*table, 100 * passed / total - 1e-11), table[1]) == edge


# -- entropy -------------------------------------------------------------------------------------------------------

ENTROPY = [
    *((kind, 256, INT8, {"stride": 4}) for kind in KINDS),
    *((kind, 256, Grid(4), {"stride": 4, "start_bin": 32}) for kind in KINDS),
    ("laplace", 512, INT8, {"stride": 1, "start_bin": 300}),
    ("normal", 256, Grid(4, unsigned=True), {"stride": 3, "start_bin": 17}),
    ("lognormal", 256, Grid(6, unsigned=True), {"stride": 5, "start_bin": 100}),
    ("outliers", 512, Grid(3), {"stride": 7, "start_bin": 9}),
]


@pytest.mark.parametrize(("kind", "bins", "grid", "options"), ENTROPY, ids=str)
def test_entropy_is_that_of_pytorch_quantization(kind: str, bins: int, grid: Grid, options: dict[str, int]) -> None:
    counts, edges = table_of(kind, bins)
    found = entropy_amax(counts, edges, grid, **options)
    theirs = {"stride": 1, "start_bin": START_BIN, **options}
    wanted = float(reference._compute_amax_entropy(*as_numpy((counts, edges)), grid.bits, grid.unsigned, **theirs))
    assert bin_of(found, edges) == bin_of(wanted, edges)


@pytest.mark.parametrize("seed", range(12))
def test_entropy_of_odd_histograms_is_that_of_pytorch_quantization(seed: int) -> None:
    # Gaps, single values and ties: empty bins are where the two formulas could differ.
    random = np.random.default_rng(seed)
    size = int(random.integers(20, 90))
    counts = random.integers(0, 4, size) * random.integers(0, 2, size) * 10 ** random.integers(0, 4, size)
    counts[-1], counts[1] = 1, 3
    table = even(torch.tensor(counts))
    grid = Grid(int(random.integers(2, 5)), bool(seed % 2))
    options = {"stride": 1 + seed % 3, "start_bin": 8 + seed}
    found = entropy_amax(*table, grid, **options)
    wanted = float(reference._compute_amax_entropy(*as_numpy(table), grid.bits, grid.unsigned, **options))
    assert bin_of(found, table[1]) == bin_of(wanted, table[1])


def test_entropy_of_equal_candidates_takes_the_last() -> None:
    # 128 levels of one or two equal bins: no candidate diverges at all, so the widest is as good as any.
    table = even([7] * 256)
    assert bin_of(entropy_amax(*table), table[1]) == 256
    assert bin_of(float(reference._compute_amax_entropy(*as_numpy(table), 8, False, 32, 128)), table[1]) == 256


def test_entropy_leaves_the_histogram_alone() -> None:
    counts, edges = table_of("relu-sparse", 256)
    before, theirs = counts.clone(), as_numpy((counts, edges))
    entropy_amax(counts, edges)
    mse_amax(counts, edges)
    percentile_amax(counts, edges, 99.0)
    relative_error(counts, edges, 1.0)
    assert torch.equal(counts, before)
    # The reference gives the first bin the count of the second, in the histogram itself: the next method sees that.
    reference._compute_amax_entropy(*theirs, 8, False, stride=64)
    assert theirs[0][0] == theirs[0][1] != int(before[0])


def test_entropy_of_counts_beyond_int32_is_that_of_less_data() -> None:
    counts, edges = table_of("laplace", 256)
    # All counts alike times 2^24: the distribution is the same, and so is the range.
    assert int(counts[2]) << 24 > 2**31
    for method in (entropy_amax, mse_amax):
        assert method(counts << 24, edges, Grid(4), start_bin=32) == method(counts, edges, Grid(4), start_bin=32)


def test_pytorch_quantization_loses_counts_beyond_int32() -> None:
    # The real calibrator has its counts as int32 on the way to these functions: whatever is larger is another number.
    theirs = calib.HistogramCalibrator(8, None, False, num_bins=256)
    theirs.collect(samples("laplace"))
    before = float(theirs.compute_amax("percentile", percentile=90.003))
    theirs._calib_hist *= 2.0**24  # exact in float32, and more than real data of this size needs hours for
    assert float(theirs._calib_hist.max()) > 2.0**31
    assert float(theirs.compute_amax("percentile", percentile=90.003)) != before
    counts, edges = table_of("laplace", 256)
    found = [percentile_amax(counts << shift, edges, 90.003) for shift in (0, 24)]
    assert found[0] == found[1] > 0


# -- mse -----------------------------------------------------------------------------------------------------------


def reference_mse(counts: Tensor, edges: Tensor, grid: Grid, start_bin: int, stride: int) -> int:
    """pytorch-quantization's formula in float64: the bin whose middle it takes."""
    centers = (edges[1:] + edges[:-1]) / 2
    candidates = range(start_bin, len(centers), stride)
    errors = [float(brute_error(counts, edges, float(centers[i]), grid)) for i in candidates]
    return candidates[int(np.argmin(errors))]


def brute_error(counts: Tensor, edges: Tensor, amax: float, grid: Grid) -> Tensor:
    """The squared error, every value in the middle of its bin, by fake quantization value by value in float64."""
    centers = (edges[1:] + edges[:-1]) / 2
    rounded = (centers * (grid.qmax / amax)).round().clamp(max=grid.qmax) / (grid.qmax / amax)
    return ((rounded - centers).square() * counts).sum()


MSE = [
    *((kind, 512, INT8, {}) for kind in KINDS),
    *((kind, 512, Grid(4), {}) for kind in KINDS),
    ("laplace", 512, Grid(4, unsigned=True), {"stride": 3, "start_bin": 17}),
    ("lognormal", 256, Grid(unsigned=True), {"stride": 5, "start_bin": 100}),
    ("outliers", 512, Grid(3), {"stride": 7, "start_bin": 9}),
    ("normal", 256, Grid(2), {"stride": 1, "start_bin": 1}),
    ("normal", 256, Grid(16), {"stride": 16, "start_bin": 30}),
]


@pytest.mark.parametrize(("kind", "bins", "grid", "options"), MSE, ids=str)
def test_mse_is_that_of_pytorch_quantization(
    kind: str, bins: int, grid: Grid, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, edges = table_of(kind, bins)
    full = {"stride": 1, "start_bin": START_BIN, **options}
    found = mse_amax(counts, edges, grid, **full)
    wanted = reference_mse(counts, edges, grid, **full)
    centers = (edges[1:] + edges[:-1]) / 2
    assert found == float(centers[wanted])  # the middle of the same bin: tolerance 0.0
    # Its own code, which computes in float32 and asks for a GPU by name.
    monkeypatch.setattr(Tensor, "cuda", lambda tensor: tensor)
    theirs = float(reference._compute_amax_mse(*as_numpy((counts, edges)), grid.bits, grid.unsigned, **full))
    ours = float(brute_error(counts, edges, found, grid))
    other = float(brute_error(counts, edges, theirs, grid))
    # Where it differs, float32 took a near-tie for the least. 1e-12: float64's own error.
    assert ours <= other * (1 + 1e-12)
    assert other <= ours * (1 + 1e-4)


@pytest.mark.parametrize("seed", range(12))
def test_mse_of_odd_histograms_is_the_least(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = int(random.integers(20, 200))
    table = even(torch.tensor(random.integers(0, 4, size) * 10 ** random.integers(0, 6, size)))
    grid = Grid(int(random.integers(2, 9)), bool(seed % 2))
    start, stride = int(random.integers(1, 15)), 1 + seed % 3
    found = mse_amax(*table, grid, start_bin=start, stride=stride)
    centers = ((table[1][1:] + table[1][:-1]) / 2).tolist()
    assert found in centers[start::stride]
    errors = [float(brute_error(*table, center, grid)) for center in centers[start::stride]]
    # 1e-9: the sums of the two formulas have their terms in another order.
    assert float(brute_error(*table, found, grid)) <= min(errors) * (1 + 1e-9) + 1e-12


# -- little data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [entropy_amax, mse_amax], ids=["entropy", "mse"])
@pytest.mark.parametrize("size", [1, 2, 5, START_BIN - 1, START_BIN])
def test_fewer_bins_than_the_smallest_candidate(compute: Callable[..., float], size: int) -> None:
    table = even([3] * size)
    assert compute(*table) == float(table[1][-1])


@pytest.mark.parametrize("percentile", [0.01, 50.0, 100.0])
def test_one_bin(percentile: float) -> None:
    assert percentile_amax(*even([9]), percentile) == 2.0**-6


@pytest.mark.parametrize("size", [START_BIN + 1, 300])
def test_all_mass_in_the_first_bin(size: int) -> None:
    table = even([10**6] + [0] * (size - 1))
    assert percentile_amax(*table, 99.99) == 2.0**-6
    found = mse_amax(*table)
    assert 0 < found <= float(table[1][-1])
    # Entropy takes the first bin for the second, which is empty: nothing is left to compare, so nothing is clipped.
    assert entropy_amax(*table) == float(table[1][-1])


def test_a_histogram_that_ends_with_its_only_value() -> None:
    table = even([0] * 299 + [1])
    for compute in (entropy_amax, mse_amax):
        assert float(table[1][-2]) <= compute(*table) <= float(table[1][-1])


# -- the error of a range ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.99, 1.0, 5.0])
def test_relative_error_is_that_of_the_middles_of_the_bins(
    kind: str, num_bits: int, unsigned: bool, share: float
) -> None:
    grid = Grid(num_bits, unsigned)
    counts, edges = table_of(kind)
    amax = float(edges[-1]) * share
    middles = (edges[1:] + edges[:-1]) / 2
    found = relative_error(counts, edges, amax, grid)
    power = float((middles.square() * counts).sum())
    # 1e-9: a division more or less, in float64.
    assert found == pytest.approx(float(brute_error(counts, edges, amax, grid)) / power, rel=1e-9)
    real = tensor_quant.fake_tensor_quant(middles.float(), torch.tensor(amax), num_bits, unsigned).double()
    # float32 rounds a step's end now and then to the other side: 1e-3 of the error, and of float32's own.
    wanted = float(((real - middles).square() * counts).sum()) / power
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-12)


def test_relative_error_of_what_has_none() -> None:
    counts, edges = even([0, 0, 0])
    assert relative_error(counts, edges, 1.0) == 0.0
    # A range of 0 leaves nothing of the data.
    assert relative_error(*even([0, 3, 1]), 0.0) == 1.0


def test_relative_error_is_near_that_of_the_data() -> None:
    values = samples("laplace")
    table = Histogram.of(values).table()
    for amax in (2.0, 5.0, float(values.abs().max())):
        # The narrow grid: magnitudes do not know that the other one has a step more below zero.
        quantized = fake_quant(values, torch.tensor(amax), Grid(4, narrow_range=True))
        real = (quantized.double() - values).square().sum() / values.square().sum()
        # Bins are some hundred times as narrow as 4 bits' steps.
        assert relative_error(*table, amax, Grid(4)) == pytest.approx(float(real), rel=0.02)


# -- channels ------------------------------------------------------------------------------------------------------


def channel_errors(weight: Tensor, axis: int, amax: Tensor, grid: Grid = INT8) -> Tensor:
    """Each channel's squared error, in float64."""
    error = (fake_quant(weight, amax, grid).double() - weight.double()).square()
    return error.movedim(axis, 0).flatten(1).sum(1)


def weight_of(*shape: int, seed: int = 0) -> Tensor:
    made = samples("laplace", math.prod(shape), seed).reshape(shape)
    return made * torch.linspace(0.1, 3.0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))


GRIDS = {
    "int8": INT8,
    "int4": Grid(4),
    "int4-narrow": Grid(4, narrow_range=True),
    "int2": Grid(2, narrow_range=True),
}


@pytest.mark.parametrize("shape", [(12, 300), (6, 8, 50)], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_channels_are_never_worse_than_with_their_largest(shape: tuple[int, ...], axis: int, grid: Grid) -> None:
    weight = weight_of(*shape)
    found = channel_mse_amax(weight, axis, grid)
    other = [place for place in range(weight.ndim) if place != axis]
    top = weight.abs().amax(other, keepdim=True)
    assert (found.dtype, found.shape) == (torch.float32, top.shape)
    assert bool((found > 0).all())
    assert bool((found <= top).all())
    errors, before = channel_errors(weight, axis, found, grid), channel_errors(weight, axis, top, grid)
    # It compared in float32: 1e-5.
    assert bool((errors <= before * (1 + 1e-5)).all())
    if grid.bits <= 4:
        assert float(errors.sum()) < 0.97 * float(before.sum())


@pytest.mark.parametrize("num_bits", [4, 8])
def test_channels_are_better_than_by_histograms(num_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch-quantization's calibrate_weights: a histogram of 2048 bins for each channel, then mse."""
    monkeypatch.setattr(Tensor, "cuda", lambda tensor: tensor)
    weight = weight_of(4, 600)
    theirs = []
    for row in weight:
        counts, edges = np.histogram(row.abs().numpy(), bins=2048, range=(0, float(row.abs().max())))
        theirs.append(reference._compute_amax_mse(counts, edges, num_bits, False, stride=4))
    wanted = channel_errors(weight, 0, torch.stack(theirs).reshape(-1, 1), Grid(num_bits))
    found = channel_errors(weight, 0, channel_mse_amax(weight, 0, Grid(num_bits)), Grid(num_bits))
    # Both search a grid of ranges, and it is of the values themselves that ours has the error: within 1 %, or better.
    assert bool((found <= wanted * 1.01).all())
    assert float(found.sum()) <= float(wanted.sum())


@pytest.mark.parametrize("num_bits", [3, 4, 8])
def test_channels_are_near_the_best_of_all_ranges(num_bits: int) -> None:
    weight = weight_of(5, 200)
    found = channel_errors(weight, 0, channel_mse_amax(weight, 0, Grid(num_bits)), Grid(num_bits))
    top = weight.abs().amax(1, keepdim=True)
    best = torch.stack(
        [channel_errors(weight, 0, top * share, Grid(num_bits)) for share in torch.linspace(0.05, 1, 2000)]
    )
    # A search in two stages may stop in the second best valley: within 5 % of the best of 2000.
    assert bool((found <= best.amin(0) * 1.05).all())


def test_a_channel_of_zeros_has_the_range_0() -> None:
    weight = weight_of(3, 50)
    weight[1] = 0.0
    found = channel_mse_amax(weight, 0)
    assert float(found[1]) == 0.0
    assert bool((found[[0, 2]] > 0).all())
    assert not bool(fake_quant(weight, found).isnan().any())
    # And does not change its neighbours.
    assert torch.equal(found[[0, 2]], channel_mse_amax(weight[[0, 2]], 0))  # tolerance 0.0


def test_channels_do_not_depend_on_each_other_or_on_scale() -> None:
    weight = weight_of(6, 120)
    found = channel_mse_amax(weight, 0, Grid(4))
    for index in range(6):
        assert torch.equal(
            found[index : index + 1], channel_mse_amax(weight[index : index + 1], 0, Grid(4))
        )  # tolerance 0.0
    assert torch.equal(channel_mse_amax(weight * 8, 0, Grid(4)), found * 8)  # a power of two: tolerance 0.0
    assert torch.equal(channel_mse_amax(weight.T, 1, Grid(4)), found.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_channels_in_half_precision_are_found_in_float32(dtype: torch.dtype) -> None:
    weight = weight_of(4, 100).to(dtype).requires_grad_()
    found = channel_mse_amax(weight, 0, Grid(4))
    assert not found.requires_grad
    assert torch.equal(found, channel_mse_amax(weight.detach().float(), 0, Grid(4)))  # tolerance 0.0


def test_narrow_range_and_unsigned_grids_are_heeded() -> None:
    weight = weight_of(4, 100)
    grids = Grid(2), Grid(2, narrow_range=True)
    signed = [channel_mse_amax(weight, 0, grid) for grid in grids]
    for grid, amax, other in zip(grids, signed, signed[::-1], strict=True):
        errors = [channel_errors(weight, 0, each, grid).sum() for each in (amax, other)]
        assert float(errors[0]) <= float(errors[1])
    assert not torch.equal(*signed)
    positive = weight.abs()
    found = channel_mse_amax(positive, 0, Grid(3, unsigned=True))
    plain = channel_errors(positive, 0, channel_mse_amax(positive, 0, Grid(3)), Grid(3, unsigned=True)).sum()
    assert float(channel_errors(positive, 0, found, Grid(3, unsigned=True)).sum()) <= float(plain)
