"""The integers in front of a product are those of fake quantization."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pytorch_quantization.tensor_quant import QuantDescriptor

from qdq_surgery.errors import ModelError
from qdq_surgery.integers.input_grid import InputGrid
from qdq_surgery.numerics import cuda_kernels
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec


def quantizer_of(amax: Any, **fields: Any) -> TensorQuantizer:
    """A calibrated quantizer; ``zero_point`` and a vector of ranges are a spec's."""
    ranges = torch.as_tensor(amax, dtype=torch.float32)
    axis = {"axis": -1, "calibrator": CalibratorSpec("outliers")} if ranges.ndim else {}
    spec = QuantSpec(**axis, **fields) if axis or "zero_point" in fields else None
    words = {name: value for name, value in fields.items() if name != "zero_point"}
    made = TensorQuantizer(QuantDescriptor(**words), spec=spec)
    made.set_range(ranges)
    return made


GRIDS: list[Any] = [
    pytest.param(2.0, {}, id="signed"),
    pytest.param(2.0, {"narrow_range": True}, id="narrow"),
    pytest.param(2.0, {"unsigned": True, "zero_point": 32}, id="unsigned with a zero point"),
    pytest.param([2.0, 4.0, 2.0, 16.0], {}, id="scaled"),
    pytest.param([2.0, 4.0, 2.0, 16.0], {"unsigned": True, "zero_point": 32}, id="scaled, unsigned"),
    pytest.param(0.0, {}, id="no range"),
]


STORED = [torch.uint8, torch.int8]


def grid_of(quantizer: TensorQuantizer, stored: torch.dtype) -> InputGrid:
    grid = InputGrid(quantizer)
    grid.stored = stored
    return grid


@pytest.mark.parametrize("stored_as", STORED, ids=str)
@pytest.mark.parametrize(("amax", "fields"), GRIDS)
def test_integers_are_those_of_fake_quantization(amax: Any, fields: dict[str, Any], stored_as: torch.dtype) -> None:
    quantizer = quantizer_of(amax, **fields)
    grid = grid_of(quantizer, stored_as)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 50, 4, generator=generator) * 3.0
    stored = grid(values)
    assert stored.dtype == stored_as
    scale = quantizer.channel_scale
    wanted = quantizer(values) if scale is None else quantizer(values) / scale
    # The integers are exact; a step is rounded once more, or twice.
    torch.testing.assert_close(grid.dequantize(stored), wanted, rtol=1e-6, atol=1e-7)


def test_integers_are_those_of_the_native_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorQuantizer, "use_fb_fake_quant", True)
    quantizer = quantizer_of(2.0, narrow_range=True)
    grid = InputGrid(quantizer)
    values = torch.linspace(-3.0, 3.0, 1001)
    assert grid(values).min() == 0  # the full grid, whatever the descriptor says
    off = (grid.dequantize(grid(values)) - quantizer(values)).abs()
    # 1 / step is not qmax / amax to the last bit: a value between two integers may become the other one.
    assert (off < 1e-6).sum() >= 999


@pytest.mark.parametrize("stored_as", STORED, ids=str)
@pytest.mark.parametrize(("amax", "fields"), GRIDS)
def test_what_a_compiler_or_a_gpu_sees_gives_the_same(
    amax: Any, fields: dict[str, Any], stored_as: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = grid_of(quantizer_of(amax, **fields), stored_as)
    values = torch.linspace(-20.0, 20.0, 4004).reshape(-1, 4)
    wanted = grid(values)

    def kernel(inputs: torch.Tensor, factor: torch.Tensor, lowest: int, highest: int, zero: int) -> torch.Tensor:
        """What tests/numerics/test_cuda_kernels.py tests."""
        return (inputs * factor).round().clamp(lowest, highest) + zero

    with monkeypatch.context() as patch:
        patch.setattr(cuda_kernels, "runs", lambda *_: True)
        patch.setattr(cuda_kernels, "to_integers", kernel)
        assert torch.equal(grid(values), wanted)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(grid(values), wanted)


@pytest.mark.parametrize(("amax", "fields"), GRIDS)
def test_as_int8_each_is_128_less(amax: Any, fields: dict[str, Any]) -> None:
    one, other = (grid_of(quantizer_of(amax, **fields), stored) for stored in STORED)
    values = torch.linspace(-20.0, 20.0, 4004).reshape(-1, 4)
    assert torch.equal(one(values).int() - 128, other(values).int())
    assert one.key == other.key


@pytest.mark.parametrize("stored_as", STORED, ids=str)
def test_what_is_stored_passes(stored_as: torch.dtype) -> None:
    stored = torch.tensor([1, 2], dtype=stored_as)
    assert grid_of(quantizer_of(2.0), stored_as)(stored) is stored


def test_negative_values_on_a_grid_without_them() -> None:
    grid = InputGrid(quantizer_of(2.0, unsigned=True))
    assert grid(torch.tensor([0.0, 2.0])).tolist() == [0, 255]
    with pytest.raises(TypeError, match="negative values"):
        grid(torch.tensor([-0.1]))


def test_equal_grids_have_equal_keys() -> None:
    one, other = InputGrid(quantizer_of(2.0)), InputGrid(quantizer_of(3.0))
    assert one.key == InputGrid(quantizer_of(2.0)).key != other.key
    assert InputGrid(quantizer_of([2.0, 2.0])).key == one.key
    assert InputGrid(quantizer_of([2.0, 4.0])).key != one.key


def test_casting_a_model_leaves_steps_in_float32() -> None:
    grid = InputGrid(quantizer_of([2.0, 3.0]))
    cast = copy.deepcopy(grid).to(torch.bfloat16)
    assert cast.factor.dtype == cast.step.dtype == torch.float32
    assert cast.key == grid.key
    assert "a scale for each of 2 channels" in repr(grid)


def test_gradients_are_refused_but_for_integers_and_where_there_are_none() -> None:
    grid = grid_of(quantizer_of(2.0), torch.uint8)
    values = torch.ones(3, requires_grad=True)
    with pytest.raises(
        ModelError, match=r"integers pass no gradients on, and its input wants gradients; call model\.eval"
    ):
        grid(values)
    with torch.no_grad():
        assert torch.equal(grid(grid(values)), grid(values.detach()))
