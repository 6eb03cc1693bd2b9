"""The linear: bit-equal to pytorch-quantization's, with one of its quantizers or both, and what may become one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn
from torch.nn import functional

from qdq_surgery.graph.operators import is_plain_linear
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.quantize.quantizer import TensorQuantizer

ROW = QuantDescriptor(axis=(0,))
TENSOR = QuantDescriptor()

DESCRIPTORS: dict[str, tuple[QuantDescriptor, QuantDescriptor]] = {
    "default": (TENSOR, ROW),
    "per-tensor": (TENSOR, TENSOR),
    "int4-narrow": (QuantDescriptor(num_bits=4, narrow_range=True), QuantDescriptor(num_bits=4, axis=(0,))),
    "fixed": (QuantDescriptor(amax=1.5), QuantDescriptor(amax=[[0.1], [0.2], [0.3], [0.0]])),
}


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(bias: bool = True, inputs: int = 16, outputs: int = 4) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias)
    with torch.no_grad():
        for seed, parameter in enumerate(linear.parameters()):
            parameter.copy_(data(*parameter.shape, seed=100 + seed))
    return linear


def swapped(linear: nn.Linear, inputs: QuantDescriptor | None, weight: QuantDescriptor | None) -> QuantLinear:
    """What the conversion does to a linear."""
    linear.__class__ = QuantLinear
    for name, descriptor in (("_input_quantizer", inputs), ("_weight_quantizer", weight)):
        linear.register_module(name, None if descriptor is None else TensorQuantizer(descriptor))
    assert isinstance(linear, QuantLinear)
    return linear


def real(linear: nn.Linear, inputs: QuantDescriptor, weight: QuantDescriptor) -> quant_nn.QuantLinear:
    """pytorch-quantization's own, with the same parameters."""
    target = quant_nn.QuantLinear(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        quant_desc_input=inputs,
        quant_desc_weight=weight,
    )
    target.load_state_dict(linear.state_dict(), strict=False)
    return target


@pytest.mark.parametrize(("inputs", "weight"), DESCRIPTORS.values(), ids=DESCRIPTORS.keys())
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 5, 16)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("native", [False, True], ids=["legacy", "native"])
def test_outputs_and_gradients_are_those_of_pytorch_quantization(
    inputs: QuantDescriptor,
    weight: QuantDescriptor,
    bias: bool,
    shape: tuple[int, ...],
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quant_nn.TensorQuantizer, "use_fb_fake_quant", native)
    linear = plain(bias)
    theirs = real(linear, inputs, weight)
    ours = swapped(copy.deepcopy(linear), inputs, weight)
    results = []
    for target in (ours, theirs):
        leaf = data(*shape).requires_grad_()
        outputs = target(leaf)
        outputs.backward(data(*outputs.shape, seed=1))
        results.append([outputs, leaf.grad, target.weight.grad, *([target.bias.grad] if bias else [])])
    for found, wanted in zip(*results, strict=True):
        assert found.shape == wanted.shape
        assert torch.equal(found, wanted)  # tolerance 0.0
    assert not torch.equal(results[0][0], linear(data(*shape)))


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5)),
    num_bits=st.integers(4, 8),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_any_size_is_that_of_pytorch_quantization(
    shape: tuple[int, int, int], num_bits: int, scale: float, seed: int
) -> None:
    batch, features, outputs = shape
    linear = plain(inputs=features, outputs=outputs)
    descriptors = QuantDescriptor(num_bits=num_bits), QuantDescriptor(num_bits=num_bits, axis=(0,))
    theirs, ours = real(linear, *descriptors), swapped(copy.deepcopy(linear), *descriptors)
    inputs = data(batch, features, seed=seed) * scale
    assert torch.equal(ours(inputs), theirs(inputs))  # tolerance 0.0


def test_calibrated_is_that_of_pytorch_quantization() -> None:
    linear = plain()
    theirs, ours = real(linear, TENSOR, ROW), swapped(copy.deepcopy(linear), TENSOR, ROW)
    for target in (theirs, ours):
        quantizers = [m for m in target.modules() if isinstance(m, quant_nn.TensorQuantizer)]
        assert len(quantizers) == 2
        for quantizer in quantizers:
            quantizer.enable_calib()
            quantizer.disable_quant()
        for seed in range(3):
            target(data(8, 16, seed=seed))
        for quantizer in quantizers:
            quantizer.disable_calib()
            quantizer.enable_quant()
            quantizer.load_calib_amax()
    state = theirs.state_dict()
    assert set(ours.state_dict()) == set(state)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, state[name]), name  # tolerance 0.0
    inputs = data(8, 16, seed=9) * 2
    assert torch.equal(ours(inputs), theirs(inputs))  # tolerance 0.0
    # The range is fixed now: a wide tensor is clipped.
    assert not torch.equal(ours(inputs * 100), swapped(linear, TENSOR, ROW)(inputs * 100))


@pytest.mark.usefixtures("default_descriptors")
def test_default_descriptors_are_those_of_pytorch_quantization() -> None:
    quant_nn.QuantLinear.set_default_quant_desc_input(QuantDescriptor(num_bits=5))
    quant_nn.QuantLinear.set_default_quant_desc_weight(QuantDescriptor(num_bits=6, axis=None))
    theirs = quant_nn.QuantLinear(16, 4)
    ours = swapped(nn.Linear(16, 4), QuantLinear.default_quant_desc_input, QuantLinear.default_quant_desc_weight)
    ours.load_state_dict(theirs.state_dict())
    assert ours.input_quantizer.num_bits == 5
    assert ours.weight_quantizer.num_bits == 6
    assert torch.equal(ours(data(3, 16)), theirs(data(3, 16)))  # tolerance 0.0


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("inputs", "weight"), [(TENSOR, None), (None, ROW), (None, None)], ids=["input", "weight", "neither"]
)
def test_one_quantizer_is_enough(inputs: QuantDescriptor | None, weight: QuantDescriptor | None, bias: bool) -> None:
    linear = plain(bias)
    ours = swapped(copy.deepcopy(linear), inputs, weight)
    tensor = data(5, 16)
    wanted = functional.linear(
        tensor if inputs is None else quant_nn.TensorQuantizer(inputs)(tensor),
        linear.weight if weight is None else quant_nn.TensorQuantizer(weight)(linear.weight),
        linear.bias,
    )
    assert torch.equal(ours(tensor), wanted)  # tolerance 0.0
    assert torch.equal(ours(tensor), linear(tensor)) == (inputs is None and weight is None)


def test_disabled_is_the_linear() -> None:
    linear = plain()
    ours = swapped(copy.deepcopy(linear), TENSOR, ROW)
    for quantizer in (ours.input_quantizer, ours.weight_quantizer):
        assert not torch.equal(ours(data(5, 16)), linear(data(5, 16)))
        quantizer.disable()
    assert torch.equal(ours(data(5, 16)), linear(data(5, 16)))  # tolerance 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(dtype: torch.dtype) -> None:
    ours = swapped(plain(), TENSOR, ROW).to(dtype)
    inputs = data(5, 16).to(dtype)
    outputs = ours(inputs)
    assert outputs.dtype == dtype
    wanted = functional.linear(ours.input_quantizer(inputs), ours.weight_quantizer(ours.weight), ours.bias)
    assert torch.equal(outputs, wanted)  # tolerance 0.0


def test_is_the_same_linear() -> None:
    linear = plain()
    calls: list[str] = []
    linear.register_forward_hook(lambda *_: calls.append("hook"))
    weight, names = linear.weight, set(linear.state_dict())
    ours = swapped(linear, TENSOR, ROW)
    ours(data(5, 16))
    assert calls == ["hook"]
    assert ours.weight is weight
    assert isinstance(ours, nn.Linear)
    assert isinstance(ours, quant_nn.QuantLinear)
    assert set(ours.state_dict()) == names
    assert "_input_quantizer" in repr(ours)


# -- what may become one -------------------------------------------------------------------------------------------


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Linear gives it)
        return super().forward(input) * 2


class BelowOwnForward(OwnForward):
    pass


class Renamed(nn.Linear):
    """Computes what nn.Linear does."""


class MixedIn:
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return input


class MixedLinear(MixedIn, nn.Linear):
    pass


def patched() -> nn.Linear:
    linear = plain()
    linear.forward = linear.forward  # type: ignore[method-assign]
    return linear


def hooked() -> nn.Linear:
    linear = plain()
    linear.register_forward_pre_hook(lambda *_: None)
    return linear


MODULES: dict[str, tuple[Any, bool]] = {
    "linear": (plain, True),
    "no-bias": (lambda: plain(False), True),
    "half": (lambda: plain().half(), True),
    "hooked": (hooked, True),
    "subclass": (lambda: Renamed(2, 2), False),
    "out-projection": (lambda: nn.MultiheadAttention(4, 2).out_proj, False),
    "own-forward": (lambda: OwnForward(2, 2), False),
    "inherited-own-forward": (lambda: BelowOwnForward(2, 2), False),
    "mixed-in-forward": (lambda: MixedLinear(2, 2), False),
    "patched-instance": (patched, False),
    "converted": (lambda: swapped(plain(), TENSOR, ROW), False),
    "pytorch-quantization": (lambda: quant_nn.QuantLinear(2, 2), False),
    "bilinear": (lambda: nn.Bilinear(2, 2, 2), False),
    "conv": (lambda: nn.Conv1d(2, 2, 1), False),
    "identity": (nn.Identity, False),
    "quantizer": (lambda: TensorQuantizer(TENSOR), False),
}


@pytest.mark.parametrize(("make", "wanted"), MODULES.values(), ids=MODULES.keys())
def test_what_may_become_one(make: Any, wanted: bool) -> None:
    assert is_plain_linear(make()) is wanted


def test_a_parametrized_weight_does_not_fit() -> None:
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    assert not is_plain_linear(linear)
