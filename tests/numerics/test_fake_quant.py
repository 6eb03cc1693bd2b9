"""The formulas: bit-equal to pytorch-quantization 2.1.3 in float32, and what must hold of any fake quantization."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pytorch_quantization import nn as quant_nn
from pytorch_quantization import tensor_quant
from torch import Tensor, nn

from qdq_surgery.numerics.fake_quant import (
    exporting_to_onnx,
    fake_quant,
    learned_fake_quant,
    native_fake_quant,
    onnx_fake_quant,
)
from qdq_surgery.numerics.grid import INT8, Grid

PROPERTY = settings(max_examples=80)

#: The smallest positive float16: a range up to here counts as 0.
EPSILON = 2.0**-24

HALF = [torch.float16, torch.bfloat16]
HALF_IDS = ["float16", "bfloat16"]

#: Ranges that are easily got wrong: none, as good as none, on both sides of the limit, and near the end of float32.
ODD_RANGES = [0.0, 1e-9, EPSILON, float(np.nextafter(np.float32(EPSILON), np.float32(1))), 1e30, 3e38]


@dataclass(frozen=True)
class Case:
    """A tensor, its range and a grid."""

    inputs: Tensor
    amax: Tensor
    grid: Grid

    @property
    def theirs(self) -> tuple[int, bool, bool]:
        """The grid as pytorch-quantization takes it."""
        return self.grid.bits, self.grid.unsigned, self.grid.narrow_range

    def quantized(self, inputs: Tensor | None = None) -> Tensor:
        inputs = self.inputs if inputs is None else inputs
        return fake_quant(inputs, self.amax, self.grid)

    def gradient(self) -> Tensor:
        """The gradient that is sent back: another one for each element."""
        count = self.inputs.numel()
        return torch.linspace(-1.0, 1.0, count + 2)[1:-1].reshape(self.inputs.shape)


@st.composite
def cases(draw: st.DrawFn, odd_ranges: bool = True, wild_inputs: bool = True, narrow_range: bool | None = None) -> Case:
    """Random tensors with ties, grid points, -0, exactly +-amax and values out of the range.

    Args:
        odd_ranges: Whether amax may be one of ODD_RANGES.
        wild_inputs: Whether inputs may lie more than a few ranges away.
        narrow_range: Any, if None.
    """
    num_bits = draw(st.integers(4, 8))
    unsigned = draw(st.booleans()) if narrow_range is None else False
    narrow = draw(st.booleans()) if narrow_range is None else narrow_range
    grid = Grid(num_bits, unsigned, narrow)
    qmax = grid.qmax

    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, max_side=5))
    axis = draw(st.none() | st.integers(0, len(shape) - 1)) if shape else None
    if axis is not None:
        amax_shape: tuple[int, ...] = tuple(size if i == axis else 1 for i, size in enumerate(shape))
    else:
        amax_shape = draw(st.sampled_from([(), (1,) * len(shape)]))
    # With qmax * 2**k for a range, a step is a power of two and a tie is a tie without any rounding.
    ranges = st.floats(2.0**-10, 2.0**10, width=32) | st.integers(-3, 3).map(lambda k: qmax * 2.0**k)
    if odd_ranges:
        ranges = ranges | st.sampled_from(ODD_RANGES)
    amax = draw(hnp.arrays(np.float32, amax_shape, elements=ranges))

    # In steps, so that the grid is met.
    positions = (
        st.integers(-2 * qmax, 2 * qmax).map(lambda k: k + 0.5)
        | st.integers(-2 * qmax, 2 * qmax).map(float)
        | st.floats(-2.0 * qmax, 2.0 * qmax)
        | st.sampled_from([0.0, -0.0, float(qmax), -float(qmax)])
    )
    steps = draw(hnp.arrays(np.float64, shape, elements=positions))
    step = np.where(amax <= EPSILON, 1.0, amax.astype(np.float64) / qmax)
    limit = float(np.finfo(np.float32).max)
    inputs = np.clip(steps * step, -limit, limit).astype(np.float32)
    inputs = np.where(np.abs(steps) == qmax, np.sign(steps) * amax, inputs).astype(np.float32)
    if wild_inputs:
        wild = draw(hnp.arrays(np.bool_, shape, elements=st.sampled_from([False, False, False, True])))
        finite = st.floats(-limit, limit, width=32, allow_nan=False)
        inputs = np.where(wild, draw(hnp.arrays(np.float32, shape, elements=finite)), inputs)
    if unsigned:
        inputs = np.abs(inputs)
    return Case(torch.tensor(inputs), torch.tensor(amax), grid)


def bits(tensor: Tensor) -> Tensor:
    """The float32 bits, which tell -0 from 0 and one NaN from none."""
    assert tensor.dtype == torch.float32
    return tensor.detach().contiguous().view(torch.int32)


def assert_bit_equal(found: Tensor, wanted: Tensor) -> None:
    """Tolerance 0: shape, dtype and every bit."""
    assert found.shape == wanted.shape
    assert torch.equal(bits(found), bits(wanted)), f"found {found}, wanted {wanted}"


def with_gradient(function: Callable[[Tensor], Tensor], case: Case) -> tuple[Tensor, Tensor]:
    inputs = case.inputs.clone().requires_grad_()
    outputs = function(inputs)
    outputs.backward(case.gradient())
    assert inputs.grad is not None
    return outputs.detach(), inputs.grad


class Apply(nn.Module):
    """A formula with its range in a buffer, to export."""

    amax: Tensor

    def __init__(self, function: Callable[..., Tensor], amax: Tensor, **grid: Grid) -> None:
        super().__init__()
        self.register_buffer("amax", amax)
        self.function, self.grid = function, grid

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs, self.amax, **self.grid)


# -- the legacy formula against pytorch-quantization ---------------------------------------------------------------


@given(cases())
@PROPERTY
def test_legacy_is_bit_equal_to_pytorch_quantization(case: Case) -> None:
    real = tensor_quant.fake_tensor_quant(case.inputs, case.amax, *case.theirs)
    assert_bit_equal(case.quantized(), real)
    assert not bool(case.quantized().isnan().any())


@given(cases())
@PROPERTY
def test_legacy_gradient_is_bit_equal_to_pytorch_quantization(case: Case) -> None:
    found = with_gradient(case.quantized, case)
    wanted = with_gradient(lambda x: tensor_quant.fake_tensor_quant(x, case.amax, *case.theirs), case)
    assert_bit_equal(found[0], wanted[0])
    assert_bit_equal(found[1], wanted[1])


@pytest.mark.parametrize("amax", ODD_RANGES, ids=lambda value: f"amax={value:.9g}")
@pytest.mark.parametrize("channels", [False, True], ids=["per-tensor", "per-channel"])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
def test_legacy_with_odd_ranges(amax: float, channels: bool, unsigned: bool) -> None:
    inputs = torch.tensor([[0.0, 1e-12, 1e-8, 0.3, 7.0], [-0.0, -1e-12, -1e-8, -0.3, -3e38]])
    inputs = inputs.abs() if unsigned else inputs
    # The other channel has an ordinary range.
    limits = torch.tensor([[amax], [2.0]]) if channels else torch.tensor(amax)
    found = fake_quant(inputs, limits, Grid(8, unsigned))
    assert_bit_equal(found, tensor_quant.fake_tensor_quant(inputs, limits, 8, unsigned, False))
    row = found[0]
    assert bool((row == 0).all()) == (amax <= EPSILON or amax >= 1e30)


def test_legacy_without_elements() -> None:
    assert fake_quant(torch.empty(0, 3), torch.tensor(1.0)).shape == (0, 3)
    assert fake_quant(torch.empty(2, 0), torch.ones(2, 1)).shape == (2, 0)


def test_legacy_leaves_its_arguments_alone() -> None:
    inputs, amax = torch.linspace(-2, 2, 9), torch.tensor(0.0)
    before = inputs.clone()
    fake_quant(inputs, amax)
    assert_bit_equal(inputs, before)
    assert_bit_equal(amax, torch.tensor(0.0))


# -- the native formula against pytorch-quantization ---------------------------------------------------------------


def real_native(case: Case, inputs: Tensor) -> Tensor:
    """The real quantizer's own way: a Python float for a scale, or one per channel."""
    quantizer = quant_nn.TensorQuantizer(
        tensor_quant.QuantDescriptor(num_bits=case.grid.bits, unsigned=case.grid.unsigned)
    )
    outputs: Tensor = quantizer._fb_fake_quant(inputs, case.amax)
    return outputs


def native(case: Case, inputs: Tensor) -> Tensor:
    return native_fake_quant(inputs, case.amax, case.grid)


# Inputs more than 2**63 steps away are undefined in torch's kernels.
@given(cases(odd_ranges=False, wild_inputs=False))
@PROPERTY
def test_native_is_bit_equal_to_pytorch_quantization(case: Case) -> None:
    assert_bit_equal(native(case, case.inputs), real_native(case, case.inputs))
    found = with_gradient(lambda x: native(case, x), case)
    wanted = with_gradient(lambda x: real_native(case, x), case)
    assert_bit_equal(found[0], wanted[0])
    assert_bit_equal(found[1], wanted[1])


@pytest.mark.parametrize("amax", [1e-30, 1e-9, 1e30], ids=lambda value: f"amax={value:g}")
@pytest.mark.parametrize("channels", [False, True], ids=["per-tensor", "per-channel"])
def test_native_with_odd_ranges(amax: float, channels: bool) -> None:
    limits = torch.tensor([[amax], [amax * 3]]) if channels else torch.tensor(amax)
    case = Case(torch.linspace(-2, 2, 64).reshape(2, 32) * amax, limits, INT8)
    found = native(case, case.inputs)
    assert_bit_equal(found, real_native(case, case.inputs))
    assert float(found.max()) == pytest.approx(amax * (2 if channels else 1), rel=0.01)


@pytest.mark.parametrize("channels", [False, True], ids=["per-tensor", "per-channel"])
def test_native_with_a_range_of_zero_gives_zero(channels: bool) -> None:
    amax = torch.zeros(2, 1) if channels else torch.tensor(0.0)
    outputs = native_fake_quant(torch.tensor([[0.0, 1.0], [-1.0, 1e-8]]), amax)
    assert torch.equal(outputs, torch.zeros(2, 2))


def test_native_has_the_full_range_of_onnx() -> None:
    inputs = torch.tensor([-200.0, -128.0, -127.0, 127.0, 128.0])
    assert torch.equal(native_fake_quant(inputs, torch.tensor(127.0)), torch.tensor([-128.0, -128.0, -127, 127, 127]))
    assert torch.equal(
        native_fake_quant(torch.tensor([-1.0, 0.0, 255.0, 300.0]), torch.tensor(255.0), Grid(unsigned=True)),
        torch.tensor([0.0, 0.0, 255.0, 255.0]),
    )


@pytest.mark.parametrize("function", [native_fake_quant, onnx_fake_quant], ids=lambda function: function.__name__)
def test_ranges_along_two_axes_are_refused(function: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError, match=r"one axis .* \(2, 3\)"):
        function(torch.zeros(2, 3), torch.ones(2, 3))


# -- the native formula while something is traced ------------------------------------------------------------------


@given(cases(odd_ranges=False, wild_inputs=False))
@PROPERTY
def test_traceable_formula_is_the_kernel(case: Case) -> None:
    """Measured over 4000 random tensors of 2 to 16 bits: no bit differs where amax is a normal number, so 0.0 it is."""
    kernel = native(case, case.inputs)
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        formula = native(case, case.inputs)
    # +-0 is the only freedom: the kernel adds a zero point of 0, which turns -0 into 0.
    assert torch.equal(formula, kernel)


@pytest.mark.parametrize("function", [fake_quant, native_fake_quant], ids=["legacy", "native"])
@pytest.mark.parametrize("channels", [False, True], ids=["per-tensor", "per-channel"])
@pytest.mark.parametrize(
    "grid",
    [{}, {"grid": Grid(4, unsigned=True)}],
    ids=["int8", "uint4"],
)
def test_export(function: Callable[..., Tensor], channels: bool, grid: dict[str, Grid]) -> None:
    amax = torch.tensor([[0.7], [1.3], [2.9]]) if channels else torch.tensor(1.3)
    module = Apply(function, amax.clone(), **grid)
    generator = torch.Generator().manual_seed(0)
    example, other = torch.randn(2, 3, 64, generator=generator).unbind()
    if grid:
        example, other = example.abs(), other.abs()
    program = torch.export.export(module, (example,)).module()
    # Tolerance 0.0. Data that the exporter has not seen, so that nothing can have been baked in.
    assert torch.equal(program(other), module(other))
    # The range is an input of the graph, not a constant in it.
    before = module(other)
    program.load_state_dict({"amax": amax * 0.5})
    assert torch.equal(program(other), function(other, amax * 0.5, **grid))
    assert not torch.equal(program(other), before)


def test_export_with_a_range_of_zero_and_a_free_batch_size() -> None:
    amax = torch.tensor([0.0, 1.0, 1e-9, 2.0])
    module = Apply(fake_quant, amax, grid=Grid(narrow_range=True))
    inputs = torch.linspace(-3, 3, 12).reshape(3, 4)
    program = torch.export.export(
        module, (inputs,), dynamic_shapes={"inputs": {0: torch.export.Dim("batch", min=1, max=64)}}
    )
    assert torch.equal(program.module()(inputs[:2]), module(inputs[:2]))  # tolerance 0.0
    wanted = tensor_quant.fake_tensor_quant(inputs, amax, 8, False, True)
    assert torch.equal(program.module()(inputs), wanted)  # tolerance 0.0


@pytest.mark.parametrize("num_bits", [2, 4, 7, 9, 16])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
def test_onnx_has_8_bits_only(num_bits: int, unsigned: bool) -> None:
    with pytest.raises(ValueError, match=f"8 bits, this quantizer has {num_bits}"):
        onnx_fake_quant(torch.ones(3), torch.tensor(1.0), Grid(num_bits, unsigned))


def test_no_onnx_export_is_running() -> None:
    assert not exporting_to_onnx()
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        assert not exporting_to_onnx()
        with mock.patch("torch.onnx.is_in_onnx_export", return_value=True):
            assert exporting_to_onnx()


# -- what holds of any fake quantization ---------------------------------------------------------------------------


@given(cases(odd_ranges=False))
@PROPERTY
def test_error_is_at_most_half_a_step_inside_the_range(case: Case) -> None:
    inside = case.inputs.abs() <= case.amax
    amax = case.amax.double()
    error = (case.quantized().double() - case.inputs.double()).abs()
    # Four float32 roundings, each of half an ulp (2**-24) of at most amax, are on top; twice that is allowed.
    allowed = amax / case.grid.qmax / 2 + 2.0**-21 * amax
    assert bool((error <= allowed)[inside].all())


@given(cases(odd_ranges=False))
@PROPERTY
def test_outputs_lie_on_the_grid(case: Case) -> None:
    integers = case.quantized().double() / (case.amax.double() / case.grid.qmax)
    # Two float32 roundings of an integer of at most 8 bits: within 256 * 2**-23.
    assert float((integers - integers.round()).abs().max()) <= 256 * 2.0**-23
    assert int(integers.round().min()) >= case.grid.qmin
    assert int(integers.round().max()) <= case.grid.qmax
    # Whatever is out of the range ends up at its end.
    assert bool((integers.round() == case.grid.qmax)[(case.inputs > case.amax)].all())
    assert bool((integers.round() == case.grid.qmin)[(case.inputs < -case.amax * 1.1)].all())


@given(cases())
@PROPERTY
def test_zero_stays_zero(case: Case) -> None:
    zeros = torch.zeros_like(case.inputs)
    assert torch.equal(case.quantized(zeros), zeros)
    assert torch.equal(case.quantized(-zeros), zeros)


@given(cases())
@PROPERTY
def test_quantizing_twice_is_quantizing_once(case: Case) -> None:
    once = case.quantized()
    assert torch.equal(case.quantized(once), once)  # tolerance 0.0


@given(cases(odd_ranges=False, wild_inputs=False))
@PROPERTY
def test_native_twice_is_native_once(case: Case) -> None:
    once = native(case, case.inputs)
    assert torch.equal(native(case, once), once)  # tolerance 0.0


@given(cases())
@PROPERTY
def test_order_is_kept(case: Case) -> None:
    amax = case.amax.flatten()[0]
    ordered = case.inputs.flatten().sort().values
    outputs = fake_quant(ordered, amax, case.grid)
    assert bool((outputs[1:] >= outputs[:-1]).all())


@given(cases(narrow_range=True))
@PROPERTY
def test_narrow_range_is_symmetric(case: Case) -> None:
    assert torch.equal(case.quantized(-case.inputs), -case.quantized())  # tolerance 0.0


@given(cases())
@PROPERTY
def test_each_channel_is_quantized_by_itself(case: Case) -> None:
    axes = [axis for axis, size in enumerate(case.amax.shape) if size > 1]
    outputs = case.quantized()
    for axis in axes:
        for index, amax in enumerate(case.amax.flatten()):
            alone = fake_quant(case.inputs.select(axis, index), amax, case.grid)
            assert torch.equal(outputs.select(axis, index), alone)  # tolerance 0.0


@given(cases(odd_ranges=False, wild_inputs=False))
@PROPERTY
def test_native_quantizes_each_channel_by_itself(case: Case) -> None:
    axes = [axis for axis, size in enumerate(case.amax.shape) if size > 1]
    outputs = native(case, case.inputs)
    for axis in axes:
        for index, amax in enumerate(case.amax.flatten()):
            alone = native_fake_quant(case.inputs.select(axis, index), amax, case.grid)
            assert torch.equal(outputs.select(axis, index), alone)  # tolerance 0.0


# -- gradients -----------------------------------------------------------------------------------------------------


@given(cases())
@PROPERTY
def test_gradient_passes_inside_the_range_only(case: Case) -> None:
    _, gradient = with_gradient(case.quantized, case)
    inside = case.inputs.abs() <= case.amax
    assert torch.equal(gradient, torch.where(inside, case.gradient(), 0.0))  # tolerance 0.0


@pytest.mark.parametrize("channels", [False, True], ids=["per-tensor", "per-channel"])
def test_amax_gets_no_gradient(channels: bool) -> None:
    amax = torch.ones(2, 1) if channels else torch.tensor(1.0)
    inputs = torch.tensor([[0.3, 1.5], [-0.3, -1.0]], requires_grad=True)
    fake_quant(inputs, amax.requires_grad_()).sum().backward()
    assert amax.grad is None
    assert inputs.grad is not None
    assert torch.equal(inputs.grad, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))


def test_outputs_need_a_gradient_only_where_inputs_do() -> None:
    inputs, amax = torch.linspace(-1, 1, 5), torch.tensor(1.0)
    assert not fake_quant(inputs, amax).requires_grad
    assert fake_quant(inputs.requires_grad_(), amax).requires_grad
    with torch.no_grad():
        assert not fake_quant(inputs, amax).requires_grad


# -- half precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=HALF_IDS)
@given(case=cases())
@PROPERTY
def test_legacy_in_half_precision_rounds_once(dtype: torch.dtype, case: Case) -> None:
    inputs = case.inputs.to(dtype).nan_to_num()  # what float16 cannot hold becomes its end
    outputs = case.quantized(inputs)
    assert outputs.dtype == dtype
    assert torch.equal(outputs, case.quantized(inputs.float()).to(dtype))  # tolerance 0.0


@pytest.mark.parametrize("dtype", HALF, ids=HALF_IDS)
@given(case=cases(odd_ranges=False, wild_inputs=False))
@PROPERTY
def test_native_in_half_precision_rounds_once(dtype: torch.dtype, case: Case) -> None:
    inputs = case.inputs.to(dtype)
    outputs = native(case, inputs)
    assert outputs.dtype == dtype
    assert torch.equal(outputs, native(case, inputs.float()).to(dtype))  # tolerance 0.0


@pytest.mark.parametrize("dtype", HALF, ids=HALF_IDS)
@pytest.mark.parametrize("amax_dtype", [torch.float32, *HALF], ids=["float32", *HALF_IDS])
def test_half_precision_is_off_by_half_a_step_and_one_rounding(dtype: torch.dtype, amax_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4000, generator=generator).to(dtype)
    amax = torch.tensor(2.5, dtype=amax_dtype)
    error = (fake_quant(inputs, amax).double() - inputs.double()).abs()[inputs.abs() <= amax]
    # The rounding to float16 or bfloat16 is half an ulp (2**-11 or 2**-8) of at most amax.
    rounding = 2.5 * (2.0**-11 if dtype == torch.float16 else 2.0**-8)
    assert float(error.max()) <= 2.5 / 127 / 2 + rounding
    assert float(error.max()) > 2.5 / 127 / 2 * 0.9


@pytest.mark.parametrize("dtype", HALF, ids=HALF_IDS)
@pytest.mark.parametrize("function", [fake_quant, native_fake_quant], ids=["legacy", "native"])
def test_half_precision_gradient(dtype: torch.dtype, function: Callable[..., Tensor]) -> None:
    inputs = torch.tensor([-3.0, -1.5, -1.0, -0.25, 0.0, 0.25, 1.0, 1.5, 3.0], dtype=dtype, requires_grad=True)
    function(inputs, torch.tensor(1.0)).sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.dtype == dtype
    assert inputs.grad.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


class _Native(nn.Module):
    def __init__(self, amax: Tensor) -> None:
        super().__init__()
        self.register_buffer("amax", amax)

    def forward(self, x: Tensor) -> Tensor:
        return native_fake_quant(x, self.amax)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_range_of_zero_is_traced_like_the_kernel() -> None:
    module = _Native(torch.tensor([[0.0], [1.0]]))
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    traced = torch.export.export(module, (x,)).module()
    assert torch.equal(traced(x), module(x))
    assert torch.equal(traced(x)[0], torch.zeros(3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_native_formula_has_its_gradient_under_compile() -> None:
    torch._dynamo.reset()
    module = _Native(torch.tensor(1.0))
    for shift in (0.0, 0.3):
        eager = (torch.linspace(-2, 2, 9) + shift).requires_grad_()
        compiled = eager.detach().clone().requires_grad_()
        module(eager).sum().backward()
        torch.compile(module, backend="eager")(compiled).sum().backward()
        assert torch.equal(compiled.grad, eager.grad)
        assert 0 < float(eager.grad.sum()) < 9


def test_a_range_gets_no_gradient_even_where_inputs_need_none() -> None:
    amax = torch.tensor(1.0, requires_grad=True)
    outputs = fake_quant(torch.tensor([0.33, 2.0], requires_grad=True), amax)
    outputs.sum().backward()
    assert amax.grad is None
    assert not fake_quant(torch.tensor([0.33]), amax.detach()).requires_grad


def test_the_edge_of_the_range_is_not_rounded_for_half_precision() -> None:
    x = torch.tensor([1.0009765625], dtype=torch.float16, requires_grad=True)
    fake_quant(x, torch.tensor(1.0006)).sum().backward()
    assert float(x.grad) == 0.0


@pytest.mark.parametrize("function", [fake_quant, learned_fake_quant], ids=["fake_quant", "learned_fake_quant"])
@pytest.mark.parametrize("amax", [1e-30, 2.0**-24, 0.1, 0.7, 1.0, 127.0, 3e38], ids=lambda value: f"{value:g}")
@pytest.mark.parametrize("path", ["fast", "channels", "scalar-in-an-axis", "float64-gradient"])
def test_the_gradient_ends_exactly_at_the_range(function: Callable[..., Tensor], amax: float, path: str) -> None:
    """The fast way on a CPU compares with a bound of its own; both must draw the line between the same two floats."""
    limit = torch.tensor(amax)
    below, above = (torch.nextafter(limit, torch.tensor(to)) for to in (0.0, math.inf))
    row = torch.stack([limit, -limit, below, -below, above, -above])
    inputs = torch.stack([row, row]).requires_grad_()
    ranges = {"fast": limit, "channels": torch.stack([limit, limit * 1.0]).reshape(2, 1)}.get(path, limit.reshape(1, 1))
    if path == "float64-gradient":  # inputs of another dtype go the general way
        inputs = inputs.detach().double().requires_grad_()
    gradient = torch.arange(1.0, 13.0, dtype=inputs.dtype).reshape(2, 6)
    function(inputs, ranges).backward(gradient)
    assert inputs.grad is not None
    inside = torch.tensor([[True, True, True, True, False, False]])
    assert torch.equal(inputs.grad, torch.where(inside, gradient, 0.0))  # tolerance 0.0


@pytest.mark.parametrize("function", [fake_quant, learned_fake_quant], ids=["fake_quant", "learned_fake_quant"])
@pytest.mark.parametrize("dtype", HALF, ids=HALF_IDS)
@pytest.mark.parametrize("channels", [False, True], ids=["per-tensor", "per-channel"])
def test_the_gradient_ends_exactly_at_the_range_in_half_precision(
    function: Callable[..., Tensor], dtype: torch.dtype, channels: bool
) -> None:
    value = torch.tensor(1.1, dtype=dtype)
    above = torch.nextafter(value, torch.tensor(math.inf, dtype=dtype))
    inputs = torch.stack([value, -value, above, -above]).reshape(2, 2).requires_grad_()
    # A float32 range between two half-precision numbers, just at and just below the first.
    for amax, wanted in ((value.float(), [[1.0, 1.0], [0.0, 0.0]]), (value.float() * (1 - 1e-6), [[0.0, 0.0]] * 2)):
        inputs.grad = None
        function(inputs, amax.expand(2, 1).clone() if channels else amax).sum().backward()
        assert inputs.grad is not None
        assert inputs.grad.dtype == dtype
        assert inputs.grad.tolist() == wanted


# -- learned ranges ------------------------------------------------------------------------------------------------


def lsq(inputs: Tensor, amax: Tensor, grid: Grid) -> Tensor:
    """Learned step sizes as the paper writes them (arXiv 1902.08153, its appendix A), by autograd alone."""
    qmin, qmax = grid.qmin, grid.qmax
    step = amax / qmax
    factor = 1.0 / math.sqrt(inputs.numel() / amax.numel() * qmax)
    step = (step - step * factor).detach() + step * factor  # grad_scale
    ratio = (inputs / step).clamp(qmin, qmax)
    return (ratio + (ratio.round() - ratio).detach()) * step  # round_pass


LEARNED_GRIDS = {
    "int8": INT8,
    "int4": Grid(4),
    "int4-narrow": Grid(4, narrow_range=True),
    "int2": Grid(2),
    "uint8": Grid(unsigned=True),
    "uint3": Grid(3, unsigned=True),
}

#: What stands for one range, and for one range per channel of a tensor of (6, 5, 40).
RANGES: dict[str, Tensor] = {
    "per-tensor": torch.tensor(1.3),
    "one-element": torch.tensor([[[1.3]]]),
    "axis-0": torch.linspace(0.2, 3.0, 6).reshape(6, 1, 1),
    "axis-1": torch.linspace(0.2, 3.0, 5).reshape(1, 5, 1),
    "last-axis": torch.linspace(0.2, 3.0, 40),
}


def learned_case(grid: Grid) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 5, 40, generator=generator) * 1.5
    return inputs.abs() if grid.unsigned else inputs, torch.randn(6, 5, 40, generator=generator)


@pytest.mark.parametrize("grid", LEARNED_GRIDS.values(), ids=LEARNED_GRIDS.keys())
@pytest.mark.parametrize("name", RANGES)
def test_learned_is_fake_quant_with_a_gradient_for_the_range(name: str, grid: Grid) -> None:
    inputs, gradient = learned_case(grid)
    fixed, learned = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    amax = RANGES[name].clone().requires_grad_()
    wanted = fake_quant(fixed, RANGES[name], grid)
    found = learned_fake_quant(learned, amax, grid)
    assert_bit_equal(found, wanted)
    wanted.backward(gradient)
    found.backward(gradient)
    assert fixed.grad is not None
    assert learned.grad is not None
    assert_bit_equal(learned.grad, fixed.grad)
    assert 0 < int((fixed.grad == 0).sum()) < inputs.numel()
    # Against the paper's formula in float64.
    exact = RANGES[name].double().requires_grad_()
    lsq(inputs.double(), exact, grid).backward(gradient.double())
    assert amax.grad is not None
    assert exact.grad is not None
    assert amax.grad.dtype == torch.float32
    assert amax.grad.shape == amax.shape
    # 1e-4 of the largest gradient: terms of both signs cancel in the sum of a channel.
    scale = float(exact.grad.abs().max())
    torch.testing.assert_close(amax.grad.double(), exact.grad, rtol=1e-4, atol=1e-4 * scale)
    assert scale > 0


@pytest.mark.parametrize("dtype", HALF, ids=HALF_IDS)
def test_learned_in_half_precision(dtype: torch.dtype) -> None:
    inputs, gradient = (tensor.to(dtype) for tensor in learned_case(INT8))
    amax, full = (RANGES["axis-0"].clone().requires_grad_() for _ in range(2))
    leaf = inputs.clone().requires_grad_()
    found = learned_fake_quant(leaf, amax)
    assert_bit_equal(found.float(), fake_quant(inputs, RANGES["axis-0"]).float())
    found.backward(gradient)
    learned_fake_quant(inputs.float(), full).backward(gradient.float())
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    assert amax.grad is not None
    assert amax.grad.dtype == torch.float32
    # The same arithmetic, in float32.
    torch.testing.assert_close(amax.grad, full.grad, rtol=1e-5, atol=1e-6)


def test_learned_signs() -> None:
    """By hand: a value beyond the range wants a wider one where the output should grow, and only beyond."""
    amax = torch.tensor(1.27, requires_grad=True)
    for value, wanted in [(9.0, 127.0), (-9.0, -128.0), (0.504, -0.4), (0.506, 0.4), (0.0, 0.0)]:
        amax.grad = None
        learned_fake_quant(torch.tensor([value]), amax).sum().backward()
        # In steps of 0.01; its weight is 1 / sqrt(127) for one element, and 1 / 127 leads from step to range.
        assert float(amax.grad) * 127 * math.sqrt(127) == pytest.approx(wanted, abs=1e-3)


def test_learned_range_alone_and_inputs_alone() -> None:
    inputs, amax = torch.linspace(-2, 2, 9), torch.tensor(1.0)
    learned_fake_quant(inputs, amax.requires_grad_()).sum().backward()
    assert amax.grad is not None
    assert inputs.grad is None
    fixed = torch.tensor(1.0)
    learned_fake_quant(inputs.requires_grad_(), fixed).sum().backward()
    assert inputs.grad is not None
    assert fixed.grad is None


@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
def test_at_the_range_itself_the_step_has_a_rounding_error_only(unsigned: bool) -> None:
    """The largest value of calibration data stands exactly at the range: no float32 rounding may put it outside."""
    grid = Grid(unsigned=unsigned)
    for amax in torch.linspace(0.1, 9.0, 500):
        leaf = amax.clone().requires_grad_()
        learned_fake_quant(amax.reshape(1), leaf, grid).sum().backward()
        # Outside it would be 1 / sqrt(qmax); inside it is next to nothing.
        assert leaf.grad is not None
        assert abs(float(leaf.grad)) < 1e-3 / math.sqrt(255)


def test_learned_without_elements() -> None:
    inputs, amax = torch.empty(0, 3, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    learned_fake_quant(inputs, amax).sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.shape == (0, 3)
    assert amax.grad == 0
