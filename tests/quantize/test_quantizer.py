"""The quantizer: pytorch-quantization's in float32, and what that version cannot do: CPU, half precision, silence."""

from __future__ import annotations

import copy
import math
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from absl import logging as absl_logging
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_quantization import calib
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn

from qdq_surgery.errors import CalibrationError
from qdq_surgery.numerics.fake_quant import fake_quant, native_fake_quant
from qdq_surgery.numerics.grid import Grid
from qdq_surgery.quantize.calibrators import ChannelCalibrator, HistogramCalibrator, MaxCalibrator
from qdq_surgery.quantize.factory import make_quantizer
from qdq_surgery.quantize.provenance import Provenance
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec

PROPERTY = settings(deadline=None, max_examples=40)
CPU = torch.device("cpu")
HALF = [torch.float16, torch.bfloat16]
HALF_IDS = ["float16", "bfloat16"]

PROVENANCE = Provenance(
    quantizer="encoder.layer.0.attention.matmul_q_input_quantizer",
    role="input",
    rule="attention-matmuls",
    rules="qdqbert",
    why="both matmuls run in int8",
    declared="qdqbert.yaml:12",
    operand="matmul(q)",
    source="modeling_bert.py:180",
    descriptor="int8 per-tensor max",
)


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(**descriptor: Any) -> TensorQuantizer:
    return TensorQuantizer(QuantDescriptor(**descriptor))


def real(**descriptor: Any) -> quant_nn.TensorQuantizer:
    return quant_nn.TensorQuantizer(QuantDescriptor(**descriptor))


def from_spec(spec: QuantSpec | None, default: QuantDescriptor | None = None) -> TensorQuantizer:
    return make_quantizer(spec, default or QuantDescriptor(), PROVENANCE, CPU)


def calibrate(target: quant_nn.TensorQuantizer, batches: list[Tensor]) -> None:
    target.enable_calib()
    target.disable_quant()
    for batch in batches:
        target(batch)
    target.disable_calib()
    target.enable_quant()


def amax_of(target: TensorQuantizer) -> Tensor:
    """The range, which there must be."""
    assert target.amax is not None
    return target.amax


# -- it is pytorch-quantization's ----------------------------------------------------------------------------------

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
        assert bool((target(inputs.abs()) >= 0).all())


# -- the native switch ---------------------------------------------------------------------------------------------


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


# -- half precision ------------------------------------------------------------------------------------------------


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


# -- state dicts ---------------------------------------------------------------------------------------------------

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


# -- the amax property ---------------------------------------------------------------------------------------------


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


# -- calibration ---------------------------------------------------------------------------------------------------

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


# -- copies --------------------------------------------------------------------------------------------------------


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


# -- silence -------------------------------------------------------------------------------------------------------


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
def test_nothing_is_logged(
    method: str, args: tuple[Any, ...], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
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
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_pytorch_quantization_is_heard_by_that_test(caplog: pytest.LogCaptureFixture) -> None:
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.INFO)  # what runs as a program has turned it down
    try:
        life_of(real(), ())
    finally:
        absl_logging.set_verbosity(before)
    assert {record.name for record in caplog.records} == {"absl"}
    assert any("Load calibrated amax" in record.getMessage() for record in caplog.records)


# -- made from a spec ----------------------------------------------------------------------------------------------


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


# -- in words ------------------------------------------------------------------------------------------------------


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


# -- traced --------------------------------------------------------------------------------------------------------


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


# -- ranges with a limit -------------------------------------------------------------------------------------------


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


# -- ranges that are learned ---------------------------------------------------------------------------------------

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
