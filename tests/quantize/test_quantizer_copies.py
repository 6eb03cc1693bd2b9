"""What a quantizer leaves: in state dicts, copies, traces and words, and in silence."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from absl import logging as absl_logging
from hearing import Heard
from made_quantizers import (
    HALF,
    HALF_IDS,
    PROVENANCE,
    amax_of,
    calibrate,
    data,
    from_spec,
    quantizer,
    real,
)
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import nn

from qdq_surgery.errors import CalibrationError
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec

AMAX: dict[str, Any] = {"per-tensor": 1.5, "one-channel": [[1.5]], "channels": [[0.5], [1.5], [2.5]]}


@pytest.mark.parametrize("before", [None, *AMAX.values()], ids=["fresh", *(f"was-{name}" for name in AMAX)])
@pytest.mark.parametrize("amax", AMAX.values(), ids=AMAX.keys())
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_state_dict_with_a_range_loads(before: Any, amax: Any, nested: bool) -> None:
    source, target = quantizer(amax=amax), quantizer() if before is None else quantizer(amax=before)
    if nested:
        state = nn.ModuleDict({"block": nn.Sequential(nn.Linear(2, 2), source)}).state_dict()
        assert "block.1._amax" in state
        model: nn.Module = nn.ModuleDict({"block": nn.Sequential(nn.Linear(2, 2), target)})
    else:
        state, model = source.state_dict(), target
    result = model.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(amax_of(target), torch.tensor(amax))
    assert amax_of(target).shape == torch.tensor(amax).shape
    inputs = data(3, 20)
    assert torch.equal(target(inputs), source(inputs))  # tolerance 0.0
    # A copy: what happens to the one does not happen to the other.
    source.amax = torch.full_like(torch.tensor(amax), 9.0)
    assert torch.equal(amax_of(target), torch.tensor(amax))


@pytest.mark.parametrize("amax", AMAX.values(), ids=AMAX.keys())
def test_state_dicts_are_exchanged_with_pytorch_quantization(amax: Any) -> None:
    ours, theirs = quantizer(), real(amax=amax)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(amax_of(ours), theirs.amax)
    ours.amax = amax_of(ours) * 2
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.amax, torch.tensor(amax) * 2)


def test_state_dict_holds_the_range_and_nothing_else() -> None:
    target = quantizer()
    assert not target.state_dict()
    target.amax = 1.0
    assert set(target.state_dict()) == {"_amax"}
    target.reset_amax()
    assert not target.state_dict()


def test_state_dict_without_a_range() -> None:
    fresh, target = quantizer(), quantizer(amax=1.0)
    with pytest.raises(RuntimeError, match=r'Missing key.*"_amax"'):
        target.load_state_dict(fresh.state_dict())
    assert target.load_state_dict(fresh.state_dict(), strict=False).missing_keys == ["_amax"]
    assert float(amax_of(target)) == 1.0
    # A dynamic quantizer misses nothing.
    assert not fresh.load_state_dict({}).missing_keys
    assert fresh.amax is None


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=["float64", *HALF_IDS])
@pytest.mark.parametrize("known", [False, True], ids=["fresh", "known"])
def test_loaded_range_is_float32(dtype: torch.dtype, known: bool) -> None:
    target = quantizer(amax=9.0) if known else quantizer()
    target.load_state_dict({"_amax": torch.tensor(1.5, dtype=dtype)})
    assert torch.equal(amax_of(target), torch.tensor(1.5))


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda target: pickle.loads(pickle.dumps(target))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize(
    "spec",
    [QuantSpec(axis=0), QuantSpec(calibrator=CalibratorSpec("percentile", percentile=99.0, num_bins=256))],
    ids=str,
)
def test_copies_are_independent(clone: Callable[[TensorQuantizer], TensorQuantizer], spec: QuantSpec) -> None:
    original = from_spec(spec)
    calibrate(original, [data(4, 50)])
    original.load_calib_amax()
    twin = clone(original)
    assert type(twin) is TensorQuantizer
    assert twin.spec == spec
    assert twin.provenance == PROVENANCE
    assert twin.extra_repr() == original.extra_repr()
    assert torch.equal(twin(data(4, 50)), original(data(4, 50)))  # tolerance 0.0

    before = amax_of(original).clone()
    calibrate(twin, [data(4, 50) * 10])
    original.load_calib_amax()
    assert torch.equal(amax_of(original), before)
    twin.load_calib_amax()
    assert bool((amax_of(twin) > before * 2).all())
    assert torch.equal(amax_of(original), before)
    twin.disable()
    assert not torch.equal(original(data(4, 50)), data(4, 50))


def life_of(target: quant_nn.TensorQuantizer, args: tuple[Any, ...]) -> None:
    """What happens to a quantizer between construction and the end."""
    calibrate(target, [data(200)])
    target.load_calib_amax(*args)
    target.load_calib_amax(*args)
    target.amax = 1.5
    target.load_state_dict({"_amax": torch.tensor(2.5)})
    target.load_state_dict({}, strict=False)
    target(data(20))
    target.disable()
    target.enable()


@pytest.mark.parametrize(("method", "args"), [("max", ()), ("histogram", ("percentile",))], ids=["max", "histogram"])
def test_nothing_is_logged(method: str, args: tuple[Any, ...], heard: Heard, capfd: pytest.CaptureFixture[str]) -> None:
    target = quantizer(calib_method=method)
    life_of(target, args)
    target.amax = torch.tensor(1.0)
    fresh = quantizer()
    fresh.load_state_dict(target.state_dict())
    fresh.reset_amax()
    fresh.load_calib_amax(strict=False)
    assert fresh.step_size is not None
    assert quantizer().step_size is None
    quantizer(amax=1.0, axis=None, unsigned=True)(data(4).abs())
    from_spec(QuantSpec(calibrator=CalibratorSpec("percentile", num_bins=200))).half()
    assert heard.records == []
    assert capfd.readouterr() == ("", "")


def test_pytorch_quantization_is_heard_by_that_test(heard: Heard) -> None:
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.INFO)  # what runs as a program has turned it down
    try:
        life_of(real(), ())
    finally:
        absl_logging.set_verbosity(before)
    assert {record.name for record in heard.records} == {"absl"}
    assert any("Load calibrated amax" in record.getMessage() for record in heard.records)


def with_nan(target: quant_nn.TensorQuantizer) -> None:
    target.load_calib_amax(strict=False)


def without_calibrator(target: quant_nn.TensorQuantizer) -> None:
    target._calibrator = None


STATES: dict[str, tuple[dict[str, Any], Callable[[quant_nn.TensorQuantizer], Any], str]] = {
    "dynamic": ({}, lambda _: None, "8bit fake per-tensor amax=dynamic calibrator=MaxCalibrator scale=1.0 quant"),
    "fixed": ({"amax": 1.5}, lambda _: None, "amax=1.5000"),
    "channels": ({"amax": [[0.5], [1.5]]}, lambda _: None, "amax=[0.5000, 1.5000](2)"),
    "axis": ({"axis": (0,)}, lambda _: None, "axis=(0,)"),
    "unsigned": ({"unsigned": True, "num_bits": 4}, lambda _: None, "unsigned 4bit"),
    "narrow": ({"narrow_range": True}, lambda _: None, "8bit narrow"),
    "histogram": ({"calib_method": "histogram"}, lambda _: None, "HistogramCalibrator"),
    "disabled": ({}, lambda q: q.disable(), "disabled"),
    "calibrating": ({}, lambda q: q.enable_calib(), "quant calib"),
    "calibrated": ({}, lambda q: (calibrate(q, [torch.ones(3)]), q.load_calib_amax()), "amax=1.0000"),
    "not-quantizing": ({}, lambda q: q.disable_quant(), "scale=1.0"),
    "nan": ({}, with_nan, "amax=nan"),
    "learned": ({"learn_amax": True, "amax": 2.0}, lambda _: None, "learned"),
    "integers": ({"fake_quant": False}, lambda q: q(torch.ones(2)), "scale=127"),
    "scaled": ({"amax": 1.5, "scale_amax": 0.5}, lambda _: None, "*0.5"),
    "no-calibrator": ({}, without_calibrator, "amax=dynamic"),
}


@pytest.mark.parametrize(("descriptor", "prepare", "part"), STATES.values(), ids=STATES.keys())
def test_extra_repr(descriptor: dict[str, Any], prepare: Callable[[quant_nn.TensorQuantizer], Any], part: str) -> None:
    ours, theirs = quantizer(**descriptor), real(**descriptor)
    prepare(ours)
    prepare(theirs)
    assert part in ours.extra_repr()
    assert ours.extra_repr() == theirs.extra_repr()
    assert repr(ours).startswith("TensorQuantizer(")


@pytest.mark.parametrize("native", [False, True], ids=["legacy", "native"])
@pytest.mark.parametrize(
    "descriptor",
    [{"amax": 1.2}, {"amax": [[1.0], [2.0]]}, {"axis": (0,)}, {"amax": 1.2, "unsigned": True}],
    ids=["fixed", "channels", "dynamic", "unsigned"],
)
def test_export(native: bool, descriptor: dict[str, Any]) -> None:
    target = quantizer(**descriptor).eval()
    target.use_fb_fake_quant = native
    example, other = data(2, 30).abs(), data(2, 30, seed=1).abs() * 2
    program = torch.export.export(target, (example,)).module()
    assert torch.equal(program(other), target(other))  # tolerance 0.0
    assert not torch.equal(program(other), other)


def test_a_descriptors_own_range_goes_to_the_device() -> None:
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0), device=torch.device("cpu"))
    assert quantizer.amax == 1.0
    assert "_amax" in dict(quantizer.named_buffers())


@pytest.mark.parametrize("value", [-1.0, [1.0, -0.5]], ids=["one", "among-several"])
def test_a_negative_range_is_refused(value: float | list[float]) -> None:
    with pytest.raises(ValueError, match="a range cannot be negative, found -"):
        TensorQuantizer(QuantDescriptor()).amax = value


def test_loading_with_assign_keeps_float32() -> None:
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
    quantizer.load_state_dict({"_amax": torch.tensor(2.0, dtype=torch.bfloat16)}, assign=True)
    assert quantizer.amax is not None
    assert quantizer.amax.dtype == torch.float32
    assert float(quantizer.amax) == 2.0


def test_a_range_found_in_inference_mode_can_be_trained_with() -> None:
    quantizer = TensorQuantizer(QuantDescriptor())
    quantizer.enable_calib()
    with torch.inference_mode():
        quantizer(torch.ones(3))
        quantizer.load_calib_amax()
    quantizer.disable_calib()
    x = torch.ones(3, requires_grad=True)
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3))


@pytest.mark.parametrize(("num_bits", "share"), [(4, 0.8), (8, 0.98)])
def test_mse_needs_no_gpu(num_bits: int, share: float) -> None:
    target, values = quantizer(calib_method="histogram", num_bits=num_bits), data(4000) ** 3
    calibrate(target, [values])
    errors = {}
    for method in ("mse", "max"):
        target.load_calib_amax(method)
        errors[method] = float((target(values) - values).square().mean())
    # A cube of a normal distribution has few large values: to clip them is better, the more so with few steps.
    assert errors["mse"] < share * errors["max"]
    own = from_spec(QuantSpec(num_bits=num_bits, calibrator=CalibratorSpec("mse")))
    calibrate(own, [values])
    own.load_calib_amax()
    target.load_calib_amax("mse")
    assert torch.equal(amax_of(own), amax_of(target))  # tolerance 0.0


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse", "max", "best"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_histogram_of_what_is_no_number_is_refused(method: str, bad: float) -> None:
    target = quantizer(calib_method="histogram", amax=1.5)
    calibrate(target, [data(300), torch.tensor([1.0, bad]), data(300, seed=1)])
    with pytest.raises(CalibrationError, match="a NaN" if math.isnan(bad) else "an infinite value"):
        target.load_calib_amax(method)
    assert float(amax_of(target)) == 1.5
