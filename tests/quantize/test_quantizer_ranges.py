"""Ranges of a quantizer: set, calibrated, limited, learned."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_quantizers import (
    HALF,
    HALF_IDS,
    PROPERTY,
    PROVENANCE,
    amax_of,
    calibrate,
    data,
    from_spec,
    quantizer,
    real,
)
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn

from qdq_surgery.errors import CalibrationError
from qdq_surgery.numerics.grid import Grid
from qdq_surgery.quantize.calibrators import HistogramCalibrator
from qdq_surgery.quantize.provenance import Provenance
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (1.5, torch.tensor(1.5)),
        (2, torch.tensor(2.0)),
        ([0.5, 1.5], torch.tensor([0.5, 1.5])),
        ([[0.5], [1.5]], torch.tensor([[0.5], [1.5]])),
        (torch.tensor(0.1), torch.tensor(0.1)),
        (torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16), torch.tensor([[1.0], [2.0]])),
        (torch.tensor(0.25, dtype=torch.float64, requires_grad=True), torch.tensor(0.25)),
        (torch.tensor([1.0, 2.0]).numpy(), torch.tensor([1.0, 2.0])),
    ],
    ids=["float", "int", "list", "nested-list", "tensor", "bfloat16-channels", "float64-with-gradient", "numpy"],
)
def test_amax_can_be_set(value: Any, wanted: Tensor) -> None:
    target = quantizer()
    assert target.amax is None
    target.amax = value
    assert torch.equal(amax_of(target), wanted)  # float32 is part of that; tolerance 0.0
    assert not amax_of(target).requires_grad
    target.amax = wanted * 2
    assert torch.equal(amax_of(target), wanted * 2)


def test_amax_is_a_copy_and_stays_the_same_buffer() -> None:
    target, value = quantizer(), torch.tensor(1.0)
    target.amax = value
    buffer = amax_of(target)
    value.fill_(7.0)
    assert float(amax_of(target)) == 1.0
    target.amax = 2.0
    assert amax_of(target) is buffer
    assert float(buffer) == 2.0


def test_amax_keeps_its_shape() -> None:
    target = quantizer(amax=1.0)
    with pytest.raises(TypeError, match=r"shape \(\), found \(2, 1\); call reset_amax"):
        target.amax = [[1.0], [2.0]]
    assert torch.equal(amax_of(target), torch.tensor(1.0))
    target.reset_amax()
    target.amax = [[1.0], [2.0]]
    assert amax_of(target).shape == (2, 1)


@pytest.mark.parametrize("descriptor", [{}, {"amax": 1.0}], ids=["dynamic", "fixed"])
def test_amax_cannot_be_set_to_none(descriptor: dict[str, Any]) -> None:
    target = quantizer(**descriptor)
    with pytest.raises(TypeError, match="reset_amax"):
        target.amax = None
    assert (target.amax is None) == (not descriptor)


def test_reset_amax_makes_it_dynamic() -> None:
    target, inputs = quantizer(amax=0.1), data(50)
    target.reset_amax()
    assert target.amax is None
    assert torch.equal(target(inputs), quantizer()(inputs))  # tolerance 0.0
    target.reset_amax()
    assert target.amax is None


@pytest.mark.parametrize(
    ("descriptor", "wanted"),
    [
        ({}, None),
        ({"amax": 12.7}, 0.1),
        ({"amax": 12.7, "narrow_range": True}, 0.1),
        ({"amax": 25.5, "unsigned": True}, 0.1),
        ({"amax": 0.7, "num_bits": 4}, 0.1),
        ({"amax": [[12.7], [25.4]]}, [[0.1], [0.2]]),
    ],
    ids=["dynamic", "int8", "narrow", "uint8", "int4", "channels"],
)
def test_step_size(descriptor: dict[str, Any], wanted: Any) -> None:
    target = quantizer(**descriptor)
    if wanted is None:
        assert target.step_size is None
        return
    assert target.step_size is not None
    torch.testing.assert_close(target.step_size, torch.tensor(wanted), rtol=1e-6, atol=0.0)
    assert torch.equal(target.step_size, real(**descriptor).step_size)  # tolerance 0.0


# Percentiles that fall on no value: there, its sums of rounded shares miss by a value now and then.
METHODS: dict[str, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = {
    "max": ({}, (), {}),
    "max-axis-0": ({"axis": (0,)}, (), {}),
    "max-axis-1": ({"axis": (1,)}, (), {}),
    "max-unsigned": ({"unsigned": True}, (), {}),
    "percentile": ({"calib_method": "histogram"}, ("percentile",), {}),
    "percentile-50": ({"calib_method": "histogram"}, ("percentile",), {"percentile": 50.03}),
    "percentile-keyword": ({"calib_method": "histogram"}, (), {"method": "percentile", "percentile": 98.97}),
    "entropy": ({"calib_method": "histogram"}, ("entropy",), {"stride": 256}),
    "entropy-uint4": ({"calib_method": "histogram", "num_bits": 4, "unsigned": True}, ("entropy",), {"stride": 256}),
    "mse": ({"calib_method": "histogram"}, ("mse",), {"stride": 16}),
    "mse-int4": ({"calib_method": "histogram", "num_bits": 4}, ("mse",), {"stride": 16}),
}


@pytest.mark.parametrize(("descriptor", "args", "kwargs"), METHODS.values(), ids=METHODS.keys())
def test_calibrated_range_is_that_of_pytorch_quantization(
    descriptor: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its mse asks for a GPU by name. Nothing in the formula needs one.
    monkeypatch.setattr(Tensor, "cuda", lambda tensor: tensor)
    # The later batches are wider, so that the histogram grows; the largest of the first is 1, so that the 2048 bins
    # that pytorch-quantization starts with are as wide as ours, 2^-11.
    batches = [data(6, 100) * 0.3, data(6, 100, seed=1) * 0.4, data(6, 100, seed=2) * 0.5]
    batches = [batch.clamp(-1.0, 1.0) if index == 0 else batch for index, batch in enumerate(batches)]
    batches[0][0, 0] = 1.0
    assert 1.0 < float(torch.stack(batches).abs().max()) < 2.0
    batches = [batch.abs() for batch in batches] if descriptor.get("unsigned") else batches
    ours, theirs = quantizer(**descriptor), real(**descriptor)
    for target in (ours, theirs):
        calibrate(target, batches)
        target.load_calib_amax(*args, **kwargs)
    assert amax_of(ours).shape == theirs.amax.shape
    assert bool((amax_of(ours) > 0.1).all())
    if "calib_method" not in descriptor:
        assert torch.equal(amax_of(ours), theirs.amax)  # tolerance 0.0
    else:
        # One bin, and float32's own error: a value on an edge belongs to the bin above, the last edge to the one below.
        torch.testing.assert_close(amax_of(ours), theirs.amax, rtol=1e-6, atol=2.0**-11)


@pytest.mark.parametrize("percentile", [50.003, 90.003, 99.003, 99.903])
def test_a_percentile_is_within_a_bin_of_that_of_pytorch_quantization_whatever_the_grid(percentile: float) -> None:
    batches = [data(6, 1000) * 0.7, data(6, 1000, seed=1), data(6, 1000, seed=2) * 1.7]
    ours, theirs = quantizer(calib_method="histogram"), real(calib_method="histogram")
    for target in (ours, theirs):
        calibrate(target, batches)
        target.load_calib_amax("percentile", percentile=percentile)
    edges = [target._calibrator._calib_bin_edges for target in (ours, theirs)]
    widths = [float(edge[1] - edge[0]) for edge in edges]
    assert widths[0] != widths[1]
    # Each is the lower edge of the bin that holds the percentile, so they differ by less than the wider bin.
    assert abs(float(amax_of(ours)) - float(theirs.amax)) <= max(widths)
    exact = float(torch.cat(batches).abs().flatten().sort().values[math.ceil(18000 * percentile / 100) - 1])
    assert exact - widths[0] <= float(amax_of(ours)) <= exact


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=6, max_size=6), min_size=1, max_size=4))
@PROPERTY
def test_max_calibration_of_any_data_is_that_of_pytorch_quantization(rows: list[list[float]]) -> None:
    batches = [torch.tensor(row).reshape(2, 3) for row in rows]
    for descriptor in ({}, {"axis": (0,)}, {"axis": (1,)}):
        ours, theirs = quantizer(**descriptor), real(**descriptor)
        for target in (ours, theirs):
            calibrate(target, batches)
            target.load_calib_amax()
        assert torch.equal(amax_of(ours), theirs.amax)  # tolerance 0.0
        assert float(amax_of(ours).max()) == float(torch.stack(batches).abs().max())


@pytest.mark.parametrize(
    ("calibrator", "args", "kwargs"),
    [
        (CalibratorSpec("percentile"), ("percentile",), {}),
        (CalibratorSpec("percentile", percentile=90.0), ("percentile",), {"percentile": 90.0}),
        (CalibratorSpec("percentile", percentile=90.0, num_bins=512), ("percentile",), {"percentile": 90.0}),
        (CalibratorSpec("entropy", num_bins=160), ("entropy",), {}),
        (CalibratorSpec("max"), (), {}),
    ],
    ids=["percentile", "percentile-90", "percentile-90-of-512-bins", "entropy-of-160-bins", "max"],
)
def test_own_method_is_used_by_itself(
    calibrator: CalibratorSpec, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    target = from_spec(QuantSpec(calibrator=calibrator))
    explicit = copy.deepcopy(target)
    batches = [data(50, 100), data(50, 100, seed=1)]
    calibrate(target, batches)
    calibrate(explicit, batches)
    target.load_calib_amax()
    explicit.load_calib_amax(*args, **kwargs)
    assert torch.equal(amax_of(target), amax_of(explicit))  # tolerance 0.0
    assert 0.1 < float(amax_of(target)) <= float(torch.stack(batches).abs().max())


def test_explicit_method_wins_over_the_own_one() -> None:
    target = from_spec(QuantSpec(calibrator=CalibratorSpec("percentile", percentile=50.0)))
    calibrate(target, [data(50, 100)])
    found = []
    for args, kwargs in [((), {}), ((), {"percentile": 90.0}), (("percentile",), {"percentile": 99.0})]:
        target.load_calib_amax(*args, **kwargs)
        found.append(float(amax_of(target)))
    # |x| of a normal distribution: its quantiles, within what 5000 samples give.
    assert found == pytest.approx([0.6745, 1.645, 2.576], rel=0.05)


def test_method_left_to_the_caller_must_be_given() -> None:
    target = from_spec(QuantSpec(calibrator=CalibratorSpec("histogram")))
    calibrate(target, [data(50, 100)])
    with pytest.raises(TypeError, match="method"):
        target.load_calib_amax()
    target.load_calib_amax("percentile", percentile=100.0)
    # The upper edge of the highest bin, but nothing is larger than the largest value: tolerance 0.0.
    assert torch.equal(amax_of(target), data(50, 100).abs().max())


@pytest.mark.parametrize("num_bins", [None, 128, 129, 1000, 4096])
@pytest.mark.parametrize("top", [1.0, 1.999, 0.51, 1000.0])
def test_num_bins_is_honoured(num_bins: int | None, top: float) -> None:
    spec = QuantSpec(num_bits=6, unsigned=True, calibrator=CalibratorSpec("percentile", num_bins=num_bins))
    target = from_spec(spec)
    values = data(500).abs()
    calibrate(target, [values / values.max() * top])
    calibrator = target._calibrator
    assert isinstance(calibrator, HistogramCalibrator)
    # At least so many between 0 and the largest magnitude; at most twice to get a power of two, and twice for the
    # upper half of the grid that the largest magnitude lies in.
    wanted = num_bins or 2048
    assert wanted <= calibrator._calib_hist.numel() <= 4 * wanted
    assert int(calibrator._calib_hist.sum()) == 500
    assert float(calibrator._calib_bin_edges[-2]) <= top <= float(calibrator._calib_bin_edges[-1])
    assert (calibrator._num_bits, calibrator._unsigned, calibrator._axis) == (6, True, None)


def test_calibrating_on_does_not_change_the_range() -> None:
    # pytorch-quantization's buffer is the calibrator's own tensor.
    target = quantizer()
    calibrate(target, [torch.tensor([1.0, -2.0])])
    target.load_calib_amax()
    calibrate(target, [torch.tensor([5.0])])
    assert float(amax_of(target)) == 2.0
    target.load_calib_amax()
    assert float(amax_of(target)) == 5.0


def test_calibration_may_change_the_shape_of_the_range() -> None:
    target = quantizer(axis=(0,), amax=1.0)
    calibrate(target, [torch.tensor([[1.0, -2.0], [3.0, 0.5]])])
    target.load_calib_amax()
    assert torch.equal(amax_of(target), torch.tensor([[2.0], [3.0]]))


@pytest.mark.parametrize("name", ["max", "percentile", "entropy", "histogram"])
def test_loading_without_data_names_the_operand(name: str) -> None:
    target = from_spec(QuantSpec(calibrator=CalibratorSpec(name)))
    with pytest.raises(RuntimeError, match=r"matmul\(q\).*attention-matmuls.*seen no tensor.*strict=False"):
        target.load_calib_amax()
    assert target.amax is None


@pytest.mark.parametrize("descriptor", [{}, {"calib_method": "histogram"}], ids=["max", "histogram"])
def test_loading_without_data_and_without_provenance(descriptor: dict[str, Any]) -> None:
    target = quantizer(**descriptor)
    with pytest.raises(RuntimeError, match="seen no tensor"):
        target.load_calib_amax(strict=True)
    target.load_calib_amax(strict=False)
    assert math.isnan(float(amax_of(target)))
    assert bool(target(data(3)).isnan().all())


def test_reset_calibrator_has_seen_nothing() -> None:
    target = quantizer()
    calibrate(target, [data(4)])
    target._calibrator.reset()
    with pytest.raises(RuntimeError, match="seen no tensor"):
        target.load_calib_amax()


def test_without_a_calibrator() -> None:
    target = quantizer()
    target._calibrator = None
    with pytest.raises(ValueError, match="no calibrator"):
        target.enable_calib()
    with pytest.raises(RuntimeError, match="no calibrator"):
        target.load_calib_amax()
    target._if_calib = True
    with pytest.raises(RuntimeError, match="no calibrator"):
        target(data(3))
    target.disable_calib()
    assert torch.equal(target(data(3)), quantizer()(data(3)))  # tolerance 0.0


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (QuantSpec(max_amax=1.0), 1.0),
        (QuantSpec(max_amax=9.0), 4.0),
        (QuantSpec(max_amax=1.0, calibrator=CalibratorSpec("percentile", percentile=100.0)), 1.0),
        (QuantSpec(max_amax=9.0, calibrator=CalibratorSpec("percentile", percentile=100.0)), 4.0),
        (QuantSpec(max_amax=2.0, axis=0), [[2.0], [0.5]]),
        (QuantSpec(max_amax=0.25, axis=0, calibrator=CalibratorSpec("mse")), [[0.25], [0.25]]),
    ],
    ids=["less", "more", "percentile-less", "percentile-more", "channels", "channels-by-mse"],
)
def test_max_amax_limits_what_calibration_finds(spec: QuantSpec, wanted: Any) -> None:
    target = from_spec(spec)
    calibrate(target, [torch.tensor([[0.1, -4.0, 1.0], [0.5, 0.1, -0.5]])])
    target.load_calib_amax()
    assert torch.equal(amax_of(target), torch.tensor(wanted))  # tolerance 0.0


def test_max_amax_limits_a_method_that_is_asked_for() -> None:
    target = from_spec(QuantSpec(max_amax=0.5, calibrator=CalibratorSpec("histogram")))
    calibrate(target, [data(500)])
    for args in (("max",), ("entropy",), ("mse",), ("percentile",)):
        target.reset_amax()
        target.load_calib_amax(*args)
        assert float(amax_of(target)) == 0.5


def test_max_amax_limits_calibration_only() -> None:
    # What somebody sets by hand or loads from a checkpoint is what they want.
    target = from_spec(QuantSpec(max_amax=0.5))
    target.amax = 3.0
    assert float(amax_of(target)) == 3.0
    target.load_state_dict({"_amax": torch.tensor(4.0)})
    assert float(amax_of(target)) == 4.0
    assert float(target.limited(torch.tensor(7.0))) == 0.5
    assert float(quantizer().limited(torch.tensor(7.0))) == 7.0


def test_max_amax_without_data_is_no_range() -> None:
    target = from_spec(QuantSpec(max_amax=0.5))
    target.load_calib_amax(strict=False)
    assert math.isnan(float(amax_of(target)))


LEARNED: dict[str, Any] = {"per-tensor": 1.5, "channels": [[0.5], [1.5], [2.5]]}


@pytest.mark.parametrize("amax", LEARNED.values(), ids=LEARNED.keys())
def test_learning_keeps_the_key_and_the_value(amax: Any) -> None:
    target = quantizer(amax=amax)
    before, inputs = target.state_dict(), data(3, 20)
    outputs = target(inputs)
    assert not target.learns
    assert not list(target.parameters())
    target.learn_amax()
    assert target.learns
    assert [name for name, _ in target.named_parameters()] == ["_amax"]
    assert "_amax" not in dict(target.named_buffers())
    assert list(target.state_dict()) == list(before) == ["_amax"]
    assert torch.equal(target.state_dict()["_amax"], before["_amax"])  # tolerance 0.0
    assert torch.equal(target(inputs), outputs)  # tolerance 0.0
    parameter = amax_of(target)
    target.learn_amax()
    assert amax_of(target) is parameter  # an optimizer that holds it goes on with it
    target.learn_amax(False)
    assert not target.learns
    assert not list(target.parameters())
    assert "_amax" in dict(target.named_buffers())
    assert torch.equal(target.state_dict()["_amax"], before["_amax"])  # tolerance 0.0
    assert not amax_of(target).requires_grad
    target.learn_amax(False)
    assert torch.equal(target(inputs), outputs)  # tolerance 0.0


@pytest.mark.parametrize("amax", LEARNED.values(), ids=LEARNED.keys())
def test_an_optimizer_moves_a_learned_range(amax: Any) -> None:
    target, inputs = quantizer(amax=amax), data(3, 200) * 3
    target.learn_amax()
    optimizer = torch.optim.SGD(target.parameters(), lr=1.0)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        error = (target(inputs) - inputs).square().sum()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    # Ranges far too small for values of up to 9 were widened.
    assert bool((amax_of(target) > torch.tensor(amax)).all())
    assert errors[-1] < 0.5 * errors[0]


def test_a_learned_range_stays_above_0() -> None:
    target = quantizer(amax=1.0)
    target.learn_amax()
    with torch.no_grad():
        amax_of(target).fill_(-0.5)  # what too large a step of an optimizer leaves
    outputs = target(torch.tensor([-1.0, 0.0, 1.0]))
    assert 0.0 < float(amax_of(target).detach()) <= 1e-6
    outputs.sum().backward()
    assert bool(outputs.isfinite().all())
    assert amax_of(target).grad is not None
    assert bool(amax_of(target).grad.isfinite().all())


def test_a_learned_range_is_not_moved_without_gradients() -> None:
    target, inputs = quantizer(amax=1.5), data(50)
    fixed = target(inputs)
    target.learn_amax()
    with torch.no_grad():
        outputs = target(inputs)
    assert torch.equal(outputs, fixed)  # tolerance 0.0
    assert not outputs.requires_grad
    with torch.inference_mode():
        assert torch.equal(target(inputs), fixed)  # tolerance 0.0


@pytest.mark.parametrize("provenance", [None, PROVENANCE], ids=["nameless", "named"])
def test_there_is_nothing_to_learn_without_a_range(provenance: Provenance | None) -> None:
    target = TensorQuantizer(QuantDescriptor(), provenance=provenance)
    name = "a quantizer" if provenance is None else provenance.quantizer
    with pytest.raises(CalibrationError, match=f"^{name} has no range to learn from: calibrate the model first$"):
        target.learn_amax()
    assert not target.learns
    target.learn_amax(False)
    assert target.amax is None


@pytest.mark.parametrize("amax", LEARNED.values(), ids=LEARNED.keys())
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=["float64", *HALF_IDS])
def test_casting_keeps_a_learned_range_in_float32(amax: Any, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 2), quantizer(amax=(torch.tensor(amax) * 0.1).numpy()))
    target = model[1]
    assert isinstance(target, TensorQuantizer)
    target.learn_amax()
    parameter = amax_of(target)
    model.to(dtype)
    assert next(model.parameters()).dtype == dtype
    assert target.learns
    assert amax_of(target) is parameter
    assert torch.equal(parameter, torch.tensor(amax) * 0.1)  # not rounded; float32 is part of that; tolerance 0.0
    target(data(3, 2).to(dtype)).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.dtype == torch.float32


def test_casting_a_learned_range_casts_its_gradient_neither() -> None:
    target = quantizer(amax=0.1)
    target.learn_amax()
    target(data(50)).sum().backward()
    before = amax_of(target).grad
    assert before is not None
    before = before.clone()
    target.to(torch.bfloat16)
    after = amax_of(target).grad
    assert after is not None
    assert torch.equal(after, before)  # float32 is part of that; tolerance 0.0


@pytest.mark.parametrize("amax", LEARNED.values(), ids=LEARNED.keys())
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_learned_range_loads_into_a_fixed_one_and_back(amax: Any, assign: bool) -> None:
    learned, fixed = quantizer(amax=amax), quantizer(amax=(torch.tensor(amax) * 3).numpy())
    learned.learn_amax()
    fixed.load_state_dict(learned.state_dict(), assign=assign)
    assert not fixed.learns
    assert torch.equal(amax_of(fixed), torch.tensor(amax))  # tolerance 0.0
    fixed.amax = torch.tensor(amax) * 5
    learned.load_state_dict(fixed.state_dict(), assign=assign)
    assert learned.learns
    assert torch.equal(amax_of(learned).detach(), torch.tensor(amax) * 5)  # tolerance 0.0
    assert amax_of(learned).dtype == torch.float32


def test_a_learned_range_loads_into_a_quantizer_without_one() -> None:
    learned, fresh = quantizer(amax=1.5), quantizer()
    learned.learn_amax()
    fresh.load_state_dict(learned.state_dict())
    assert not fresh.learns
    assert torch.equal(amax_of(fresh), torch.tensor(1.5))


def test_calibration_gives_a_learned_range_another_start() -> None:
    target = quantizer(amax=9.0)
    target.learn_amax()
    parameter = amax_of(target)
    calibrate(target, [torch.tensor([1.0, -2.5])])
    target.load_calib_amax()
    assert target.learns
    assert amax_of(target) is parameter
    assert float(parameter.detach()) == 2.5


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda target: pickle.loads(pickle.dumps(target))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_learned_range_is_learned(clone: Callable[[TensorQuantizer], TensorQuantizer]) -> None:
    target = quantizer(amax=1.5)
    target.learn_amax()
    twin = clone(target)
    assert twin.learns
    twin.amax = 3.0
    assert float(amax_of(target).detach()) == 1.5


@pytest.mark.parametrize(("axis", "axes"), [(None, None), (0, (0,)), ((0,), (0,)), ([2, 0], (2, 0)), (-1, (-1,))])
def test_axes_have_one_form(axis: Any, axes: tuple[int, ...] | None) -> None:
    target = quantizer()
    target._axis = axis
    assert target.axes == axes


def test_grid_and_role() -> None:
    target = quantizer(num_bits=6, narrow_range=True)
    assert target.grid == Grid(6, narrow_range=True)
    target._num_bits = 4  # as loops for pytorch-quantization set it
    assert target.grid == Grid(4, narrow_range=True) == QuantSpec(num_bits=4, narrow_range=True).grid
    assert target.role == "input"
    for role in ("input", "weight"):
        target.provenance = Provenance("q", role, *[""] * 7)
        assert target.role == role
