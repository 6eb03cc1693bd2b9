"""Each device has its kernel, weights go from one to the other, and what cannot run is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qdq_surgery.integers import choice
from qdq_surgery.integers.choice import PRODUCTS, make_product, moved, unsupported
from qdq_surgery.integers.int_mm import IntMMProduct
from qdq_surgery.integers.onednn import OneDNNProduct

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    choice._problem.cache_clear()
    yield
    choice._problem.cache_clear()


def parts() -> tuple[Tensor, Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-128, 128, (9, 13), generator=generator).to(torch.int8)
    return integers, torch.rand(9, generator=generator), torch.tensor(0.5), 32


def test_weights_go_from_one_kernel_to_the_other_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_product(*parts())
    assert type(first) is OneDNNProduct
    assert moved(first, CPU) is first
    monkeypatch.setitem(PRODUCTS, "cpu", (IntMMProduct,))
    second = moved(first, CPU)
    assert type(second) is IntMMProduct
    monkeypatch.undo()
    third = moved(second, CPU)
    assert type(third) is OneDNNProduct
    for each in (second, third):
        assert torch.equal(each.integers(), first.integers())
        assert (each.zero_point, float(each.step)) == (32, 0.5)
        assert torch.equal(each.scale, first.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_runs_here(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unsupported(CPU, dtype) is None
    monkeypatch.setitem(PRODUCTS, "cpu", (IntMMProduct,))
    assert unsupported(CPU, dtype) is None


def test_types_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unsupported(CPU, torch.float16) == "their results are float32 or bfloat16, not float16"
    monkeypatch.setitem(PRODUCTS, "cpu", (IntMMProduct,))
    assert unsupported(CPU, torch.float16) is None
    assert unsupported(CPU, torch.float64) == "their results are float32, bfloat16 or float16, not float64"


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_devices_without_a_kernel(device: str) -> None:
    found = unsupported(torch.device(device), torch.float32)
    assert found == f"integer products run on a CPU or an NVIDIA GPU, not on {device}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without an NVIDIA GPU")
def test_a_gpu_that_is_not_there() -> None:
    found = str(unsupported(torch.device("cuda"), torch.float32))
    assert found.startswith(f"torch {torch.__version__} multiplies no int8 matrices on this GPU (")


@pytest.mark.parametrize("kind", [OneDNNProduct, IntMMProduct])
def test_kernels_that_are_wrong_or_missing(
    kind: type[OneDNNProduct | IntMMProduct], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRODUCTS, "cpu", (kind,))
    right = kind.__call__

    def saturates(self: OneDNNProduct | IntMMProduct, *args: object) -> Tensor:
        return right(self, *args).clamp(-32768, 32767)  # type: ignore[arg-type]

    def missing(*_: object) -> Tensor:
        raise RuntimeError("could not create\n a primitive")

    monkeypatch.setattr(kind, "__call__", saturates)
    assert unsupported(CPU, torch.float32) == kind.inexact
    choice._problem.cache_clear()
    monkeypatch.setattr(kind, "__call__", missing)
    wanted = f"{kind.missing.format(torch.__version__)} (could not create a primitive)"
    assert unsupported(CPU, torch.float32) == wanted
    # It is asked once.
    monkeypatch.undo()
    monkeypatch.setitem(PRODUCTS, "cpu", (kind,))
    assert unsupported(CPU, torch.float32) == wanted


def test_the_default_type_of_numbers_does_not_count() -> None:
    wanted = unsupported(torch.device("cpu"), torch.float32)
    choice._problem.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert unsupported(torch.device("cpu"), torch.float32) == wanted
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_lack_of_memory_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = unsupported(torch.device("cpu"), torch.float32)
    choice._problem.cache_clear()

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(OneDNNProduct, "__call__", full)
        with pytest.raises(torch.OutOfMemoryError):
            unsupported(torch.device("cpu"), torch.float32)
    assert unsupported(torch.device("cpu"), torch.float32) == wanted
