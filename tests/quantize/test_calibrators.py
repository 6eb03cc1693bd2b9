"""Calibrators: pytorch-quantization's interface, results that depend on the data only, and every method."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_quantization import calib
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn

from qdq_surgery.errors import CalibrationError, OptionError
from qdq_surgery.numerics.channel_scales import SCALE_METHODS
from qdq_surgery.numerics.grid import Grid
from qdq_surgery.numerics.histogram import BINS, Histogram
from qdq_surgery.numerics.range_choice import BEST, RANGE_METHODS, choose, method_names
from qdq_surgery.numerics.range_methods import (
    DEFAULT_PERCENTILE,
    channel_mse_amax,
    entropy_amax,
    mse_amax,
    percentile_amax,
    relative_error,
)
from qdq_surgery.quantize.calibrators import (
    ChannelCalibrator,
    HistogramCalibrator,
    MaxCalibrator,
)
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.rules.quant_spec import calibrator_names

HALF = [torch.float16, torch.bfloat16]
HALF_IDS = ["float16", "bfloat16"]


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape: int, seed: int = 0) -> Tensor:
    """Few large values: each method finds another range."""
    return data(*shape, seed=seed) ** 3


def histogram_calibrator(*batches: Tensor, num_bits: int = 8, unsigned: bool = False) -> HistogramCalibrator:
    made = HistogramCalibrator(num_bits, None, unsigned)
    for batch in batches:
        made.collect(batch)
    return made


def max_calibrator(*batches: Tensor, axis: Any = None) -> MaxCalibrator:
    made = MaxCalibrator(8, axis, False)
    for batch in batches:
        made.collect(batch)
    return made


# -- the interface -------------------------------------------------------------------------------------------------

NEW: dict[str, tuple[Callable[[], Any], type, tuple[Any, ...]]] = {
    "max": (lambda: MaxCalibrator(8, None, False), calib.MaxCalibrator, ()),
    "max-channels": (lambda: MaxCalibrator(8, (0,), False), calib.MaxCalibrator, ()),
    "histogram": (lambda: HistogramCalibrator(8, None, False), calib.HistogramCalibrator, ("mse",)),
    "channel-mse": (lambda: ChannelCalibrator(8, 0, False, False), calib.calibrator._Calibrator, ()),
}


@pytest.mark.parametrize(("make", "kind", "args"), NEW.values(), ids=NEW.keys())
def test_collect_compute_reset(make: Callable[[], Any], kind: type, args: tuple[Any, ...]) -> None:
    calibrator = make()
    assert isinstance(calibrator, kind)
    assert isinstance(calibrator, calib.calibrator._Calibrator)
    assert calibrator.compute_amax(*args) is None
    values = heavy(6, 80)
    assert calibrator.collect(values) is None
    found = calibrator.compute_amax(*args)
    assert found is not None
    assert found.dtype == torch.float32
    assert bool((found > 0).all())
    again = calibrator.compute_amax(*args)
    assert torch.equal(again, found)  # reading changes nothing
    calibrator.reset()
    assert calibrator.compute_amax(*args) is None
    # What was forgotten has no part in what comes.
    small = values * 0.125
    calibrator.collect(small)
    assert torch.equal(calibrator.compute_amax(*args), found * 0.125)  # a power of two: tolerance 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=["float32", "float64", *HALF_IDS])
def test_any_float_is_collected_in_float32(dtype: torch.dtype) -> None:
    values = heavy(6, 80).to(dtype)
    for made, args in [
        (max_calibrator, ()),
        (lambda x: max_calibrator(x, axis=(0,)), ()),
        (histogram_calibrator, ("entropy",)),
        (histogram_calibrator, ("percentile",)),
    ]:
        found, wanted = made(values).compute_amax(*args), made(values.float()).compute_amax(*args)
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)  # tolerance 0.0


def test_graphs_are_not_kept() -> None:
    leaf = data(4, 5).requires_grad_()
    for calibrator in (MaxCalibrator(8, None, False), MaxCalibrator(8, (0,), False)):
        calibrator.collect(leaf * 2)
        assert not calibrator.compute_amax().requires_grad
    assert not histogram_calibrator(leaf * 2).histogram.amax.requires_grad


def test_pytorch_quantizations_constructors_fit() -> None:
    # As QuantDescriptor's users make them, by position or by name.
    assert MaxCalibrator(8, None, False, track_amax=True).amaxs == []
    assert MaxCalibrator(num_bits=8, axis=(0,), unsigned=True)._axis == (0,)
    assert HistogramCalibrator(8, None, False, 512)._bins == 1024
    assert HistogramCalibrator(num_bits=4, axis=None, unsigned=True, num_bins=2048)._bins == BINS
    with pytest.raises(NotImplementedError, match="a histogram is of the whole tensor, but axis is 0"):
        HistogramCalibrator(8, 0, False)  # type: ignore[arg-type]


class Block(nn.Module):
    """A layer with pytorch-quantization's own modules' layout."""

    def __init__(self, calib_method: str) -> None:
        super().__init__()
        self._input_quantizer = TensorQuantizer(QuantDescriptor(calib_method=calib_method))
        self._weight_quantizer = TensorQuantizer(QuantDescriptor(axis=(0,)))
        self.weight = nn.Parameter(data(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self._input_quantizer(x) @ self._weight_quantizer(self.weight).T


def collect_stats(model: nn.Module, data_loader: list[tuple[Tensor, None]], num_batches: int) -> None:
    """Feed data to the network and collect statistic.

    Word for word pytorch-quantization's documentation, but for its progress bar and its GPU.
    """
    # Enable calibrators
    for name, module in model.named_modules():  # noqa: B007
        if isinstance(module, quant_nn.TensorQuantizer):
            if module._calibrator is not None:
                module.disable_quant()
                module.enable_calib()
            else:
                module.disable()

    for i, (image, _) in enumerate(data_loader):
        model(image)
        if i >= num_batches:
            break

    # Disable calibrators
    for name, module in model.named_modules():  # noqa: B007
        if isinstance(module, quant_nn.TensorQuantizer):
            if module._calibrator is not None:
                module.enable_quant()
                module.disable_calib()
            else:
                module.enable()


def compute_amax(model: nn.Module, **kwargs: Any) -> None:
    # Load calib result
    for name, module in model.named_modules():  # noqa: B007
        if isinstance(module, quant_nn.TensorQuantizer) and module._calibrator is not None:
            if isinstance(module._calibrator, calib.MaxCalibrator):
                module.load_calib_amax()
            else:
                module.load_calib_amax(**kwargs)


@pytest.mark.parametrize("kwargs", [{"method": "percentile", "percentile": 99.99}, {"method": "entropy"}], ids=str)
def test_the_loop_of_the_documentation(kwargs: dict[str, Any]) -> None:
    model = Block("histogram")
    loader = [(heavy(40, 16, seed=seed), None) for seed in range(4)]
    collect_stats(model, loader, num_batches=2)
    compute_amax(model, **kwargs)
    seen = torch.cat([batch for batch, _ in loader[:3]])
    table = Histogram.of(seen).table()
    wanted = percentile_amax(*table, 99.99) if kwargs["method"] == "percentile" else entropy_amax(*table)
    assert float(model._input_quantizer.amax) == wanted  # powers of two: tolerance 0.0
    assert torch.equal(model._weight_quantizer.amax, model.weight.abs().amax(1, keepdim=True))  # tolerance 0.0


def test_that_loop_in_words() -> None:
    histogram, largest = TensorQuantizer(QuantDescriptor(calib_method="histogram")), TensorQuantizer(QuantDescriptor())
    for quantizer in (histogram, largest):
        quantizer.enable_calib()
        quantizer.disable_quant()
        quantizer(heavy(3000))
        quantizer.disable_calib()
        quantizer.enable_quant()
    histogram.load_calib_amax("percentile", percentile=99.99)
    largest.load_calib_amax()
    assert 0 < float(histogram.amax) < float(largest.amax) == float(heavy(3000).abs().max())


# -- the largest magnitude -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, (0,), 0, (1,), [1], (0, 1), (-1,), (2,)], ids=str)
def test_max_is_that_of_pytorch_quantization(axis: Any) -> None:
    batches = [heavy(3, 4, 5), heavy(3, 4, 5, seed=1) * 2, heavy(3, 4, 5, seed=2)]
    ours = max_calibrator(*batches, axis=axis).compute_amax()
    kept = {axis} if isinstance(axis, int) else {each % 3 for each in axis or ()}
    wanted = torch.stack([batch.abs() for batch in batches]).amax(0)
    wanted = wanted.amax([each for each in range(3) if each not in kept], keepdim=axis is not None)
    assert torch.equal(ours, wanted)  # tolerance 0.0
    if axis != (-1,):  # which it takes for an axis that is not there
        theirs = calib.MaxCalibrator(8, axis, False)
        for batch in batches:
            theirs.collect(batch.clone())
        assert torch.equal(ours, theirs.compute_amax())  # tolerance 0.0


def test_track_amax_keeps_that_of_each_tensor() -> None:
    batches = [torch.tensor([1.0, -2.0]), torch.tensor([5.0, 0.0]), torch.tensor([0.5, -0.25])]
    tracked = {}
    for kind in (MaxCalibrator, calib.MaxCalibrator):
        calibrator = kind(8, None, False, track_amax=True)
        for batch in batches:
            calibrator.collect(batch)
        tracked[kind] = [float(amax) for amax in calibrator.amaxs]
        assert float(calibrator.compute_amax()) == 5.0
    assert tracked[MaxCalibrator] == [2.0, 5.0, 0.5]
    # The real one's first entry is its running maximum itself, which the later tensors write into.
    assert tracked[calib.MaxCalibrator] == [5.0, 5.0, 0.5]
    channels = MaxCalibrator(8, (0,), False, track_amax=True)
    channels.collect(torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
    assert channels.amaxs[0].tolist() == [[2.0], [0.5]]


def test_a_range_of_another_shape_is_refused() -> None:
    calibrator = max_calibrator(data(3, 4), axis=(0,))
    with pytest.raises(RuntimeError, match=r"the range had the shape \(3, 1\), now \(5, 1\)"):
        calibrator.collect(data(5, 4))
    assert calibrator.compute_amax().shape == (3, 1)


@pytest.mark.parametrize("axis", [None, (0,)], ids=["per-tensor", "per-channel"])
def test_max_of_what_is_no_number(axis: Any) -> None:
    values = torch.tensor([[1.0, math.nan], [2.0, 3.0]])
    found = max_calibrator(data(2, 2), values, data(2, 2, seed=1), axis=axis).compute_amax()
    assert math.isnan(float(found.flatten()[0]))
    if axis is not None:
        assert float(found[1]) == 3.0


# -- histograms ----------------------------------------------------------------------------------------------------


def test_a_histogram_does_not_depend_on_the_batches() -> None:
    parts = [heavy(50), heavy(7, 9, seed=1) * 1e-3, torch.zeros(3), heavy(400, seed=2) * 20]
    whole = histogram_calibrator(torch.cat([part.flatten() for part in parts])).histogram
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        found = histogram_calibrator(*(parts[index] for index in order)).histogram
        assert torch.equal(found.counts, whole.counts)
        assert torch.equal(found.exponent, whole.exponent)
        assert torch.equal(found.amax, whole.amax)


def test_pytorch_quantizations_depends_on_the_first_batch() -> None:
    # What that is good for: the real one's bins are as wide as the first batch's largest magnitude makes them.
    widths = set()
    for batches in ([heavy(50), heavy(50) * 3], [heavy(50) * 3, heavy(50)]):
        theirs = calib.HistogramCalibrator(8, None, False)
        for batch in batches:
            theirs.collect(batch)
        widths.add(float(theirs._calib_bin_edges[1]))
    assert len(widths) == 2


def test_a_tiny_first_batch_does_not_blow_up_the_bins() -> None:
    batches = [torch.full((4,), 1e-3), torch.tensor([1.0, 0.5, -0.25])]
    theirs = calib.HistogramCalibrator(8, None, False)
    sizes = []
    for batch in batches:
        theirs.collect(batch)
        sizes.append(theirs._calib_hist.numel())
    # A thousand times the range is a thousand times the bins: 1e-3 and 1e3 would be two thousand million.
    assert sizes[0] == 2048
    assert sizes[1] == pytest.approx(2048 * 1000, rel=1e-3)
    ours = histogram_calibrator(*batches, torch.tensor([1e9, 1e-30]), torch.zeros(0))
    assert ours.histogram.counts.numel() == BINS
    assert ours.histogram.total == 9
    assert float(ours.compute_amax("max")) == 1e9


def test_edges_and_counts_can_be_read_as_before() -> None:
    empty = HistogramCalibrator(8, None, False)
    assert empty._calib_hist is None
    assert empty._calib_bin_edges is None
    calibrator = histogram_calibrator(data(100), data(100, seed=1) * 2)
    assert int(calibrator._calib_hist.sum()) == 200
    assert calibrator._calib_bin_edges.numel() == calibrator._calib_hist.numel() + 1
    assert float(calibrator._calib_bin_edges[-1]) > float(calibrator.histogram.amax)


def test_in_words() -> None:
    assert str(HistogramCalibrator(8, None, False)) == "HistogramCalibrator(empty)"
    assert repr(histogram_calibrator(torch.tensor([0.5, -2.0]))) == "HistogramCalibrator(4096 bins, amax 2)"
    assert str(MaxCalibrator(8, None, False)) == str(calib.MaxCalibrator(8, None, False))


# -- methods -------------------------------------------------------------------------------------------------------


def test_methods_are_those_of_rule_files() -> None:
    # 'histogram' is no method: it leaves the choice to the caller. Scales per channel are of some sites only.
    assert set(method_names()) == {*RANGE_METHODS, BEST}
    assert set(calibrator_names()) == {*RANGE_METHODS, BEST, "histogram", *SCALE_METHODS}


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
def test_choose(num_bits: int, unsigned: bool) -> None:
    histogram = Histogram.of(heavy(5000))
    table, grid = histogram.table(), Grid(num_bits, unsigned)
    wanted = {
        "max": (float(heavy(5000).abs().max()), "max"),
        "percentile": (percentile_amax(*table, 99.5), "99.5 %"),
        "entropy": (entropy_amax(*table, grid), "entropy"),
        "mse": (mse_amax(*table, grid), "mse"),
    }
    for method, answer in wanted.items():
        assert choose(histogram, method, grid, percentile=99.5) == answer
    assert len({amax for amax, _ in wanted.values()}) == 4
    # And the calibrator's answer is that, as float32.
    calibrator = histogram_calibrator(heavy(5000), num_bits=num_bits, unsigned=unsigned)
    for method, (amax, _) in wanted.items():
        found = calibrator.compute_amax(method, percentile=99.5)
        assert (found.dtype, found.shape) == (torch.float32, torch.Size([]))
        assert torch.equal(found, torch.tensor(amax))


@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_stride_and_start_bin_arrive(method: str) -> None:
    calibrator, compute = histogram_calibrator(heavy(5000), num_bits=4), {"entropy": entropy_amax, "mse": mse_amax}
    table, top = calibrator.histogram.table(), float(heavy(5000).abs().max())
    for options in ({}, {"stride": 700, "start_bin": 300}, {"start_bin": 2000}):
        found = float(calibrator.compute_amax(method, **options))
        assert found == min(compute[method](*table, Grid(4), **options), top)
    assert len({float(calibrator.compute_amax(method, start_bin=start)) for start in (128, 2000)}) == 2


def test_the_percentile_is_99_99_by_itself() -> None:
    assert DEFAULT_PERCENTILE == 99.99
    calibrator = histogram_calibrator(heavy(50_000))
    found = [float(calibrator.compute_amax("percentile", **given)) for given in ({}, {"percentile": 99.99})]
    assert found[0] == found[1] < float(calibrator.compute_amax("percentile", percentile=99.999))


SHAPES: dict[str, Tensor] = {
    "normal": data(20_000),
    "heavy": heavy(20_000),
    "uniform": torch.linspace(-1, 1, 20_000),
    "outliers": torch.cat([data(20_000), torch.full((3,), 100.0)]),
    "sparse": data(20_000).clamp(min=0),
}


@pytest.mark.parametrize("values", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("num_bits", [4, 8])
def test_best_is_the_least_of_all_candidates(values: Tensor, num_bits: int) -> None:
    histogram = Histogram.of(values)
    table, grid = histogram.table(), Grid(num_bits)
    amax, words = choose(histogram, "best", grid)
    found: dict[str, float] = {}
    candidates = [(name, setting) for name, each in RANGE_METHODS.items() for setting in each.settings]
    for name, setting in candidates:
        candidate, its_words = choose(histogram, name, grid, **setting)
        found[its_words] = relative_error(*table, candidate, grid)
        if its_words == words:
            assert candidate == amax
    assert list(found) == ["max", "99.9 %", "99.99 %", "99.999 %", "entropy", "mse"]
    assert found[words] == min(found.values())


def test_best_is_not_always_the_same() -> None:
    taken = {choose(Histogram.of(values), "best", Grid(bits))[1] for values in SHAPES.values() for bits in (4, 8)}
    assert len(taken) >= 2


@pytest.mark.parametrize("method", method_names())
def test_no_range_is_larger_than_the_largest_value(method: str) -> None:
    for values in (*SHAPES.values(), torch.tensor([1.0001]), torch.tensor([0.75] * 50), data(5)):
        amax, _ = choose(Histogram.of(values), method, percentile=100.0)
        assert 0 < amax <= float(values.abs().max())


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_no_number_is_refused(method: str, bad: float) -> None:
    calibrator = histogram_calibrator(data(50), torch.tensor([bad, 1.0]), data(50, seed=1))
    word = "a NaN" if math.isnan(bad) else "an infinite value"
    with pytest.raises(CalibrationError, match=f"^there was {word} in the data$"):
        calibrator.compute_amax(method)
    calibrator.reset()
    calibrator.collect(data(50))
    assert float(calibrator.compute_amax(method)) > 0


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("values", [torch.zeros(9), torch.zeros(0)], ids=["zeros", "empty"])
def test_the_range_of_zeros_is_0(method: str, values: Tensor) -> None:
    assert choose(Histogram.of(values), method) == (0.0, method)
    found = histogram_calibrator(values, values).compute_amax(method)
    assert torch.equal(found, torch.tensor(0.0))


@pytest.mark.parametrize("method", ["", "Max", "histogram", "mean"])
def test_an_unknown_method_is_refused(method: str) -> None:
    message = f"unknown calibration method '{method}'; write one of max, percentile, entropy, mse, best"
    with pytest.raises(OptionError, match=message):
        histogram_calibrator(data(9)).compute_amax(method)
    with pytest.raises(OptionError, match=message):
        choose(Histogram.of(data(9)), method)


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1])
def test_a_percentile_outside_the_limits_is_refused(percentile: float) -> None:
    with pytest.raises(OptionError, match="is outside"):
        histogram_calibrator(data(9)).compute_amax("percentile", percentile=percentile)


# -- channels by mse -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_channel_mse(axis: int) -> None:
    weight = heavy(6, 40)
    calibrator = ChannelCalibrator(4, axis, False, True)
    calibrator.collect(weight)
    wanted = channel_mse_amax(weight, axis, Grid(4, narrow_range=True))
    assert torch.equal(calibrator.compute_amax(), wanted)  # tolerance 0.0
    assert wanted.shape == ((6, 1) if axis == 0 else (1, 40))


def test_channel_mse_takes_the_same_weight_again_and_no_other() -> None:
    weight = nn.Parameter(heavy(6, 40))
    calibrator = ChannelCalibrator(8, 0, False, False)
    for _ in range(3):
        calibrator.collect(weight)
    before = calibrator.compute_amax()
    assert not before.requires_grad
    other = weight.detach().clone()
    with pytest.raises(CalibrationError, match=r"is for weights, and this quantizer saw two different .* axis: null"):
        calibrator.collect(other)
    assert torch.equal(calibrator.compute_amax(), before)
    # A weight that training changed is still the same weight: its range is found on what it is now.
    with torch.no_grad():
        weight.mul_(2)
    calibrator.collect(weight)
    assert torch.equal(calibrator.compute_amax(), before * 2)  # a power of two: tolerance 0.0
    calibrator.reset()
    calibrator.collect(other)
    assert torch.equal(calibrator.compute_amax(), before)


# -- copies --------------------------------------------------------------------------------------------------------

CLONES = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}
FILLED: dict[str, tuple[Callable[[], Any], tuple[Any, ...]]] = {
    "max": (lambda: max_calibrator(heavy(6, 40)), ()),
    "max-channels": (lambda: max_calibrator(heavy(6, 40), axis=(0,)), ()),
    "histogram": (lambda: histogram_calibrator(heavy(6, 40)), ("mse",)),
}


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES.keys())
@pytest.mark.parametrize(("make", "args"), FILLED.values(), ids=FILLED.keys())
def test_copies_of_calibrators_are_independent(
    clone: Callable[[Any], Any], make: Callable[[], Any], args: tuple[Any, ...]
) -> None:
    original = make()
    before = original.compute_amax(*args).clone()
    twin = clone(original)
    assert type(twin) is type(original)
    assert torch.equal(twin.compute_amax(*args), before)
    twin.collect(heavy(6, 40) * 100)
    assert bool((twin.compute_amax(*args) > 10 * before).all())
    assert torch.equal(original.compute_amax(*args), before)
    original.reset()
    assert bool((twin.compute_amax(*args) > 10 * before).all())


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES.keys())
def test_a_copied_channel_calibrator_knows_its_own_weight(clone: Callable[[Any], Any]) -> None:
    weight = heavy(6, 40)
    original = ChannelCalibrator(4, 0, False, False)
    original.collect(weight)
    twin = clone(original)
    assert torch.equal(twin.compute_amax(), original.compute_amax())  # tolerance 0.0


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES.keys())
@pytest.mark.parametrize("descriptor", [{}, {"axis": (0,)}, {"calib_method": "histogram"}], ids=str)
def test_copies_of_quantizers_go_on_collecting(clone: Callable[[Any], Any], descriptor: dict[str, Any]) -> None:
    args = ("percentile",) if "calib_method" in descriptor else ()
    original = TensorQuantizer(QuantDescriptor(**descriptor))
    original.enable_calib()
    original(heavy(6, 40))
    model = clone(nn.Sequential(original, nn.Linear(2, 2)))
    twin = model[0]
    twin(heavy(6, 40) * 100)
    original.load_calib_amax(*args)
    twin.load_calib_amax(*args)
    assert bool((twin.amax > 10 * original.amax).all())
    whole = TensorQuantizer(QuantDescriptor(**descriptor))
    whole.enable_calib()
    for batch in (heavy(6, 40), heavy(6, 40) * 100):
        whole(batch)
    whole.load_calib_amax(*args)
    assert torch.equal(twin.amax, whole.amax)  # tolerance 0.0
