"""The quantizer: pytorch-quantization's in float32, and what that version cannot do: CPU and half precision."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
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
from pytorch_quantization import calib
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn

from qdq_surgery.errors import CalibrationError
from qdq_surgery.numerics.fake_quant import fake_quant, native_fake_quant
from qdq_surgery.numerics.grid import Grid
from qdq_surgery.quantize.calibrators import ChannelCalibrator, HistogramCalibrator, MaxCalibrator
from qdq_surgery.quantize.factory import make_quantizer
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec

DESCRIPTORS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int4": {"num_bits": 4},
    "narrow": {"narrow_range": True},
    "unsigned": {"unsigned": True},
    "axis-0": {"axis": (0,)},
    "axis-1-narrow": {"axis": (1,), "narrow_range": True},
    "fixed": {"amax": 1.25},
    "fixed-unsigned-int5": {"amax": 1.25, "unsigned": True, "num_bits": 5},
    "fixed-channels": {"amax": [[0.5], [1.0], [0.0], [2.0]]},
    "scaled": {"amax": 1.25, "scale_amax": 0.8},
    "scaled-dynamic": {"scale_amax": 0.8},
    "integers": {"fake_quant": False},
}


def test_is_a_pytorch_quantization_quantizer() -> None:
    assert isinstance(quantizer(), quant_nn.TensorQuantizer)
    found = [m for m in nn.Sequential(nn.ReLU(), quantizer()).modules() if isinstance(m, quant_nn.TensorQuantizer)]
    assert len(found) == 1


@pytest.mark.parametrize("descriptor", DESCRIPTORS.values(), ids=DESCRIPTORS.keys())
def test_outputs_and_gradients_are_those_of_pytorch_quantization(descriptor: dict[str, Any]) -> None:
    inputs = data(4, 33) * torch.tensor([[1.0], [0.01], [100.0], [1.0]])
    inputs = inputs.abs() if descriptor.get("unsigned") else inputs
    results = []
    for target in (quantizer(**descriptor), real(**descriptor)):
        leaf = inputs.clone().requires_grad_()
        outputs = target(leaf)
        outputs.backward(data(4, 33, seed=1))
        assert leaf.grad is not None
        results.append((outputs.detach(), leaf.grad))
    (found, found_gradient), (wanted, wanted_gradient) = results
    assert torch.equal(found, wanted)  # tolerance 0.0
    assert torch.equal(found_gradient, wanted_gradient)  # tolerance 0.0
    assert not torch.equal(found, inputs)


def test_learned_range_is_that_of_pytorch_quantization() -> None:
    results = []
    for cls in (TensorQuantizer, quant_nn.TensorQuantizer):
        target = cls(QuantDescriptor(learn_amax=True, amax=1.0))
        inputs = torch.linspace(-2, 2, 41, requires_grad=True)
        outputs = target(inputs)
        outputs.backward(data(41))
        results.append([outputs, inputs.grad, target.clip.clip_value_min.grad, target.clip.clip_value_max.grad])
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)  # tolerance 0.0
    assert float(results[0][3]) != 0


def test_learned_range_clips_without_quantization() -> None:
    target, inputs = quantizer(learn_amax=True, amax=1.0), torch.tensor([-2.0, 0.123, 2.0])
    target.disable_quant()
    assert target(inputs).tolist() == torch.tensor([-1.0, 0.123, 1.0]).tolist()
    target.disable_clip()
    assert target(inputs) is inputs


def test_integers_keep_their_scale() -> None:
    ours, theirs = quantizer(fake_quant=False, amax=2.0), real(fake_quant=False, amax=2.0)
    assert torch.equal(ours(data(9)), theirs(data(9)))  # tolerance 0.0
    assert float(ours.scale) == float(theirs.scale) == 63.5


@pytest.mark.parametrize("descriptor", [{}, {"axis": (0,)}], ids=["per-tensor", "per-channel"])
def test_dynamic_range_follows_each_tensor(descriptor: dict[str, Any]) -> None:
    target = quantizer(**descriptor)
    for factor in (1.0, 1000.0):
        inputs = data(3, 50) * factor
        # Half a step, and float32's own error.
        step = inputs.abs().amax(dim=1, keepdim=True) / 127 if descriptor else inputs.abs().max() / 127
        assert bool(((target(inputs) - inputs).abs() <= step * 0.50001).all())
        assert target.amax is None


def test_disabled_passes_the_same_object() -> None:
    target, inputs = quantizer(amax=0.1), data(5)
    assert not torch.equal(target(inputs), inputs)
    target.disable()
    assert target(inputs) is inputs
    target.enable()
    assert not torch.equal(target(inputs), inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_quantizer_is_switched_off_and_on() -> None:
    target, inputs = quantizer(amax=0.1), data(5)
    torch._dynamo.reset()
    compiled = torch.compile(lambda values: target(values), backend="eager", fullgraph=True)
    switches: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
        (target.disable, target.enable),
        (target.disable_quant, target.enable_quant),
        (lambda: target.hold_off(7), lambda: target.let_go(7)),
    ]
    rounded = target(inputs)
    assert not torch.equal(rounded, inputs)
    for off, on in switches:
        off()
        assert torch.equal(compiled(inputs), inputs)
        on()
        assert torch.equal(compiled(inputs), rounded)


def test_disabled_does_not_calibrate() -> None:
    target = quantizer()
    target.enable_calib()
    target.disable()
    target(data(5))
    with pytest.raises(RuntimeError, match="seen no tensor"):
        target.load_calib_amax()


def test_without_quantization_the_same_object_passes() -> None:
    target, inputs = quantizer(amax=0.1), data(5)
    target.disable_quant()
    assert target(inputs) is inputs
    target.enable_quant()
    assert not torch.equal(target(inputs), inputs)


def test_calibrates_and_quantizes_at_once() -> None:
    target, inputs = quantizer(amax=0.5), data(50)
    target.enable_calib()
    assert torch.equal(target(inputs), fake_quant(inputs, torch.tensor(0.5)))  # tolerance 0.0
    target.load_calib_amax()
    assert torch.equal(amax_of(target), inputs.abs().max())  # before it was quantized; tolerance 0.0


class _Away(Tensor):
    """A tensor that says that it is on another device, so that what runs there runs here."""

    @property
    def device(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(type="cuda")


def test_another_device_is_asked_for_negative_values_once_for_each_range() -> None:
    target = quantizer(unsigned=True, amax=1.0)
    good, bad = (torch.tensor(each).as_subclass(_Away) for each in ([0.5], [-0.5]))
    with pytest.raises(TypeError, match="negative values"):
        target._refuse_negative(bad)
    target._refuse_negative(good)
    target._refuse_negative(bad)  # not looked at
    target.amax = 2.0
    with pytest.raises(TypeError, match="negative values"):
        target._refuse_negative(bad)
    target._refuse_negative(good.as_subclass(Tensor))  # the CPU is asked each time
    with pytest.raises(TypeError, match="negative values"):
        target._refuse_negative(bad.as_subclass(Tensor))


@pytest.mark.parametrize("native", [False, True], ids=["legacy", "native"])
def test_negative_values_and_an_unsigned_grid(native: bool) -> None:
    target = quantizer(unsigned=True, amax=1.0)
    target.use_fb_fake_quant = native
    inputs = torch.tensor([-0.6, 0.6])
    if native:  # as pytorch-quantization's native path, which clips
        assert target(inputs).tolist() == [0.0, pytest.approx(153 / 255, abs=1e-6)]
    else:
        with pytest.raises(TypeError, match="negative values"):
            target(inputs)
        with pytest.raises(CalibrationError, match=r"^a quantizer is given negative values.*write unsigned: false"):
            target(inputs)
        assert bool((target(inputs.abs()) >= 0).all())


@pytest.mark.parametrize("where", ["class", "instance"])
@pytest.mark.parametrize("amax", [1.25, [[0.5], [1.0], [2.0]]], ids=["per-tensor", "per-channel"])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
def test_native_switch(where: str, amax: Any, unsigned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    target, other = quantizer(amax=amax, unsigned=unsigned), quantizer(amax=amax, unsigned=unsigned)
    inputs = data(3, 100).abs() if unsigned else data(3, 100) * 2
    legacy = target(inputs)
    if where == "class":
        monkeypatch.setattr(quant_nn.TensorQuantizer, "use_fb_fake_quant", True)
    else:
        target.use_fb_fake_quant = True
    wanted = native_fake_quant(inputs, torch.tensor(amax), Grid(unsigned=unsigned))
    assert torch.equal(target(inputs), wanted)  # tolerance 0.0
    assert torch.equal(other(inputs), wanted if where == "class" else legacy)  # tolerance 0.0
    assert torch.equal(target._fb_fake_quant(inputs, amax_of(target)), wanted)  # tolerance 0.0
    monkeypatch.undo()
    assert not quant_nn.TensorQuantizer.use_fb_fake_quant
    # The two formulas round differently, in the last bit.
    assert not torch.equal(legacy, wanted)


def test_native_switch_chooses_another_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    target, inputs = quantizer(amax=1.0, narrow_range=True), torch.tensor([-9.0, 9.0])
    assert torch.equal(target(inputs), torch.tensor([-1.0, 1.0]))
    monkeypatch.setattr(quant_nn.TensorQuantizer, "use_fb_fake_quant", True)
    assert float(target(inputs)[0]) == pytest.approx(-128 / 127, abs=1e-6)


@pytest.mark.parametrize("descriptor", [{}, {"axis": (0,)}], ids=["per-tensor", "per-channel"])
def test_native_with_a_dynamic_range_is_that_of_pytorch_quantization(
    descriptor: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quant_nn.TensorQuantizer, "use_fb_fake_quant", True)
    inputs = data(4, 50)
    assert torch.equal(quantizer(**descriptor)(inputs), real(**descriptor)(inputs))  # tolerance 0.0


@pytest.mark.parametrize("dtype", HALF, ids=HALF_IDS)
@pytest.mark.parametrize("native", [False, True], ids=["legacy", "native"])
@pytest.mark.parametrize(
    "descriptor",
    [{}, {"axis": (0,)}, {"amax": 1.2}, {"unsigned": True}],
    ids=["dynamic", "dynamic-channels", "fixed", "unsigned"],
)
def test_half_precision(dtype: torch.dtype, native: bool, descriptor: dict[str, Any]) -> None:
    target = quantizer(**descriptor)
    target.use_fb_fake_quant = native
    inputs = data(4, 50).to(dtype)
    inputs = inputs.abs() if descriptor.get("unsigned") else inputs
    outputs = target(inputs)
    assert outputs.dtype == dtype
    assert torch.equal(outputs, target(inputs.float()).to(dtype))  # tolerance 0.0
    assert not torch.equal(outputs, inputs)


@pytest.mark.parametrize("dtype", HALF, ids=HALF_IDS)
@pytest.mark.parametrize("name", ["max", "percentile"])
def test_half_precision_is_calibrated_in_float32(dtype: torch.dtype, name: str) -> None:
    spec = QuantSpec(calibrator=CalibratorSpec(name))
    half, full = from_spec(spec), from_spec(spec)
    batches = [data(7, 40).to(dtype), data(7, 40, seed=1).to(dtype) * 3]
    calibrate(half, batches)
    calibrate(full, [batch.float() for batch in batches])
    half.load_calib_amax()
    full.load_calib_amax()
    assert amax_of(half).dtype == torch.float32
    assert torch.equal(amax_of(half), amax_of(full))  # tolerance 0.0


def test_half_precision_batch_does_not_round_the_next_one() -> None:
    target = quantizer()
    calibrate(target, [torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.2345678])])
    target.load_calib_amax()
    assert torch.equal(amax_of(target), torch.tensor(1.2345678))  # tolerance 0.0


@pytest.mark.parametrize("amax", [0.1, [[0.1], [0.7]]], ids=["per-tensor", "per-channel"])
@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.double(),
        lambda module: module.half().to(torch.float64).to("cpu", torch.bfloat16),
    ],
    ids=["to-bfloat16", "half", "bfloat16", "double", "one-after-another"],
)
def test_casting_a_model_keeps_ranges_in_float32(amax: Any, cast: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), quantizer(amax=amax))
    result = cast(model)
    assert next(result.parameters()).dtype != torch.float32
    target = result[1]
    assert isinstance(target, TensorQuantizer)
    assert torch.equal(amax_of(target), torch.tensor(amax))  # float32 is part of that; tolerance 0.0
    assert set(dict(target.named_buffers())) == {"_amax"}
    target.reset_amax()
    target.amax = 0.3
    assert torch.equal(amax_of(target), torch.tensor(0.3))
    model.load_state_dict({"1._amax": torch.tensor(0.7)}, strict=False)
    assert torch.equal(amax_of(target), torch.tensor(0.7))


def test_range_follows_the_device() -> None:
    target = quantizer(amax=0.1).to("meta", torch.bfloat16)
    assert amax_of(target).device.type == "meta"
    assert amax_of(target).dtype == torch.float32
    target.reset_amax()
    target.amax = 3.0
    assert amax_of(target).device.type == "meta"


@pytest.mark.parametrize(
    ("spec", "calibrator"),
    [
        (QuantSpec(), MaxCalibrator),
        (QuantSpec(num_bits=4), MaxCalibrator),
        (QuantSpec(axis=0), MaxCalibrator),
        (QuantSpec(axis=1, narrow_range=True), MaxCalibrator),
        (QuantSpec(unsigned=True, num_bits=7), MaxCalibrator),
        (QuantSpec(max_amax=3.0, learn=True), MaxCalibrator),
        (QuantSpec(calibrator=CalibratorSpec("histogram")), HistogramCalibrator),
        (QuantSpec(calibrator=CalibratorSpec("percentile", percentile=99.0)), HistogramCalibrator),
        (QuantSpec(calibrator=CalibratorSpec("entropy", num_bins=256)), HistogramCalibrator),
        (QuantSpec(calibrator=CalibratorSpec("mse"), unsigned=True, num_bits=5), HistogramCalibrator),
        (QuantSpec(calibrator=CalibratorSpec("best")), HistogramCalibrator),
        (QuantSpec(axis=0, calibrator=CalibratorSpec("mse")), ChannelCalibrator),
        (QuantSpec(axis=1, narrow_range=True, calibrator=CalibratorSpec("mse")), ChannelCalibrator),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_every_field_of_the_spec_arrives(spec: QuantSpec, calibrator: type) -> None:
    # A default that has every field otherwise, so that nothing of it may be taken.
    default = QuantDescriptor(num_bits=3, axis=(2,), unsigned=not spec.unsigned, narrow_range=not spec.narrow_range)
    target = from_spec(spec, default)
    axis = None if spec.axis is None else (spec.axis,)
    assert target.num_bits == spec.num_bits
    assert target.axis == axis
    assert target.unsigned == spec.unsigned
    assert target.narrow_range == spec.narrow_range
    assert target.fake_quant is True
    assert target.amax is None
    assert target.spec is spec
    assert target.provenance is PROVENANCE
    assert type(target._calibrator) is calibrator
    assert target._calibrator._num_bits == spec.num_bits
    assert target._calibrator._unsigned == spec.unsigned
    # What finds ranges on a weight itself knows one axis, not several.
    assert target._calibrator._axis == (spec.axis if calibrator is ChannelCalibrator else axis)
    if calibrator is ChannelCalibrator:
        assert target._calibrator._narrow_range == spec.narrow_range
    else:
        wanted = calib.MaxCalibrator if calibrator is MaxCalibrator else calib.HistogramCalibrator
        assert isinstance(target._calibrator, wanted)


@pytest.mark.parametrize("descriptor", [{}, {"calib_method": "histogram"}], ids=["max", "histogram"])
def test_calibrators_are_pytorch_quantizations_too(descriptor: dict[str, Any]) -> None:
    ours, theirs = quantizer(**descriptor)._calibrator, real(**descriptor)._calibrator
    assert isinstance(ours, type(theirs))
    assert type(ours).__module__ == "qdq_surgery.quantize.calibrators"


def test_default_descriptor_is_used_without_a_spec() -> None:
    default = QuantDescriptor(
        num_bits=5, axis=None, unsigned=True, narrow_range=True, amax=0.3, calib_method="histogram", scale_amax=0.5
    )
    target = from_spec(None, default)
    assert (target.num_bits, target.axis, target.unsigned, target.narrow_range) == (5, None, True, True)
    assert torch.equal(amax_of(target), torch.tensor(0.3))
    assert target.spec is None
    assert target.provenance is PROVENANCE
    assert isinstance(target._calibrator, calib.HistogramCalibrator)
    theirs = quant_nn.TensorQuantizer(default)
    assert torch.equal(target(data(50).abs()), theirs(data(50).abs()))  # tolerance 0.0
    # Two quantizers share the descriptor, not the range.
    other = from_spec(None, default)
    other.amax = 9.0
    assert torch.equal(amax_of(target), torch.tensor(0.3))


def test_ranges_go_to_the_device_given() -> None:
    target = make_quantizer(QuantSpec(), QuantDescriptor(), PROVENANCE, torch.device("meta"))
    target.amax = 1.0
    assert amax_of(target).device.type == "meta"
    loaded = make_quantizer(QuantSpec(), QuantDescriptor(), PROVENANCE, torch.device("meta"))
    with pytest.warns(UserWarning, match="to a meta parameter"):
        loaded.load_state_dict({"_amax": torch.ones(2, 1)})
    assert amax_of(loaded).device.type == "meta"
    assert amax_of(loaded).shape == (2, 1)
