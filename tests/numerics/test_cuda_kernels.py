"""The GPU's kernels compiled for the CPU, so that their arithmetic is tested where there is no GPU.

What runs on one is tested in tests/contract/test_cuda.py.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qdq_surgery.numerics import cuda_kernels
from qdq_surgery.numerics.fake_quant import fake_quant, learned_fake_quant
from qdq_surgery.numerics.grid import Grid

GRIDS = [Grid(8, False, True), Grid(8), Grid(8, True), Grid(8, True, False, 32), Grid(4, False, True), Grid(16)]

_MAIN = """
extern "C" void run(long n, const float** in, float** out, const float* numbers) {
    for (long i = 0; i < n; i++) { %s; }
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """torch's jiterator on a CPU: the same code, a loop around it."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    made: dict[str, Any] = {}

    def kernel(code: str, *numbers: str, outputs: int = 1) -> Callable[..., Any]:
        def run(*tensors: Tensor, **given: float) -> Any:
            assert list(given) == list(numbers)
            full = [each.float().contiguous() for each in torch.broadcast_tensors(*tensors)]
            results = [torch.empty_like(full[0]) for _ in range(outputs)]
            if code not in made:
                made[code] = _library(code, len(full), len(numbers), outputs)
            pointers = ctypes.c_void_p * 8
            made[code].run(
                ctypes.c_long(full[0].numel()),
                pointers(*(each.data_ptr() for each in full)),
                pointers(*(each.data_ptr() for each in results)),
                (ctypes.c_float * 8)(*given.values()),
            )
            return results[0] if outputs == 1 else tuple(results)

        return run

    def _library(code: str, inputs: int, numbers: int, outputs: int) -> Any:
        folder: Path = tmp_path_factory.mktemp("kernel")
        name = code.split("(")[0].split()[-1]
        given = [*(f"in[{i}][i]" for i in range(inputs)), *(f"numbers[{i}]" for i in range(numbers))]
        call = f"out[0][i] = {name}<float>({', '.join(given)})"
        if outputs > 1:
            call = f"{name}<float>({', '.join([*given, *(f'out[{i}][i]' for i in range(outputs))])})"
        (folder / "kernel.cpp").write_text("#include <cmath>\n" + code + _MAIN % call)
        options = ["-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o", str(folder / "kernel.so")]
        subprocess.run([compiler, str(folder / "kernel.cpp"), *options], check=True)
        return ctypes.CDLL(str(folder / "kernel.so"))

    return kernel


@pytest.fixture
def kernels(compiled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Fake quantization takes the GPU's way; how often is told."""
    counted = mock.Mock(side_effect=compiled)
    monkeypatch.setattr(cuda_kernels, "_kernel", counted)
    monkeypatch.setattr(cuda_kernels, "runs", lambda *_: True)
    return counted


def cases() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 33, generator=generator) * 3
    values[0, :5] = torch.tensor([0.0, -0.0, 2.5, -2.5, torch.nan])
    ranges = (
        torch.tensor(2.5),
        torch.tensor([2.5]),
        torch.tensor(0.0),
        torch.rand(40, 1, generator=generator) + 0.5,
        torch.rand(33, generator=generator) + 0.5,
    )
    return [(values, amax) for amax in ranges]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_is_the_formula_to_the_bit(grid: Grid, dtype: torch.dtype, kernels: mock.Mock) -> None:
    for values, amax in cases():
        values = values.to(dtype)
        found = fake_quant(values, amax, grid)
        with mock.patch.object(cuda_kernels, "runs", return_value=False):
            wanted = fake_quant(values, amax, grid)
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert kernels.call_count == len(cases())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_integers_are_those_of_the_formula(dtype: torch.dtype, kernels: mock.Mock) -> None:
    values = torch.linspace(-3.0, 3.0, 4004).reshape(-1, 4).to(dtype)
    for factor in (torch.tensor(60.0), torch.tensor([0.0, 1.0, 37.5, 60.0])):
        found = cuda_kernels.to_integers(values, factor, -128, 127, 32)
        assert found.dtype == torch.float32
        assert torch.equal(found, (values.float() * factor).round().clamp(-128, 127) + 32)
    assert kernels.called


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_are_those_of_the_formula(grid: Grid, dtype: torch.dtype, learned: bool, kernels: mock.Mock) -> None:
    formula = learned_fake_quant if learned else fake_quant
    for values, amax in cases():
        if learned and not bool(amax.all()):
            continue
        values = values.nan_to_num().to(dtype)
        factor = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        found = []
        for plain in (False, True):
            x, top = values.clone().requires_grad_(), amax.clone().requires_grad_(learned)
            with mock.patch.object(cuda_kernels, "runs", return_value=not plain):
                (formula(x, top, grid) * factor).sum().backward()
            found.append((x.grad, top.grad))
        (of_x, of_amax), (wanted, amax_wanted) = found
        assert of_x is not None
        assert of_x.dtype == dtype
        torch.testing.assert_close(of_x, wanted, rtol=0, atol=0)
        if learned:
            # the quotient is rounded once here, and twice there
            torch.testing.assert_close(of_amax, amax_wanted, rtol=1e-3, atol=1e-4)
    assert kernels.called


class _OnGpu(Tensor):
    """A tensor of a class of its own that says that it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def test_they_are_for_plain_tensors_of_a_gpu_alone() -> None:
    assert not cuda_kernels.runs(torch.ones(2), torch.tensor(1.0))
    assert not cuda_kernels.runs(torch.ones(2).as_subclass(_OnGpu), torch.tensor(1.0))
