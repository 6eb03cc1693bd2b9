"""What surrounds Triton's kernels, on a CPU: what they are given, who takes them, and what a model makes of it.

The kernels themselves run on a GPU: tests/contract/test_cuda_frozen.py.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import batch_for
from frozen_models import apart, frozen, outputs
from gpu_kernels import take_kernel

from qdq_surgery.freeze.linear import IntegerLinear
from qdq_surgery.integers import choice
from qdq_surgery.integers.choice import PRODUCTS, moved, product_on
from qdq_surgery.integers.int_mm import IntMMProduct
from qdq_surgery.integers.onednn import OneDNNProduct
from qdq_surgery.integers.triton_product import TritonProduct, to_integers

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    choice._problem.cache_clear()
    yield
    choice._problem.cache_clear()


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    take_kernel("Triton", monkeypatch)


@pytest.mark.usefixtures("in_torch")
@pytest.mark.parametrize("zero_point", [0, 32, 128])
@pytest.mark.parametrize(("inner", "outer"), [(48, 24), (32, 2), (13, 9), (1, 1)])
def test_sums_are_those_of_int_mm_to_the_integer(inner: int, outer: int, zero_point: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (outer, inner), generator=generator).to(torch.int8)
    one, other = (
        kind(weight, torch.ones(outer), torch.tensor(1.0), zero_point) for kind in (TritonProduct, IntMMProduct)
    )
    for shape in ((0,), (1,), (17,), (3, 5), (3, 4, 2)):
        stored = torch.randint(-128, 128, (*shape, inner), generator=generator).to(torch.int8)
        found = one(stored, None, torch.float32, "")
        assert torch.equal(found, other(stored, None, torch.float32, ""))
        turned = stored.transpose(0, -1).contiguous().transpose(0, -1)
        assert torch.equal(one(turned, None, torch.float32, ""), found)
    assert torch.equal(one.integers(), weight)
    assert torch.equal(pickle.loads(pickle.dumps(one)).integers(), weight)


@pytest.mark.usefixtures("in_torch")
@pytest.mark.parametrize("activation", ["", "gelu"])
@pytest.mark.parametrize("zero_point", [0, 32, 128])
def test_it_rounds_for_the_next_as_onednn_does(zero_point: int, activation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (24, 48), generator=generator).to(torch.int8)
    stored = torch.randint(-128, 128, (20, 48), generator=generator).to(torch.int8)
    bias, given = torch.randn(24, generator=generator), (torch.full((24,), 0.01), torch.tensor(0.05), 128)
    one, other = (kind(weight, *given) for kind in (TritonProduct, OneDNNProduct))
    unsigned, factor = (stored.int() + 128).to(torch.uint8), torch.tensor(9.3)
    wanted = other.rounded(unsigned, bias, activation, factor, zero_point).int() - 128
    for each in (factor, factor.expand(24).contiguous()):
        off = one.rounded(stored, bias, activation, each, zero_point).int() - wanted
        assert off.abs().max() <= 1  # a tie
        assert (off != 0).float().mean() < 0.01


def test_the_first_that_suits_and_runs_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the one after it: where there is no Triton, where its compiler fails, where it is wrong."""
    before = TritonProduct.rounded
    monkeypatch.setitem(PRODUCTS, "cpu", (TritonProduct, OneDNNProduct))
    assert product_on(CPU) is OneDNNProduct  # Triton is for Hopper GPUs
    monkeypatch.setattr(TritonProduct, "suits", lambda *_: True)
    with monkeypatch.context() as patch:
        patch.setattr("qdq_surgery.integers.triton_product.kernels", _no_compiler)
        assert product_on(CPU) is OneDNNProduct
    choice._problem.cache_clear()
    with monkeypatch.context() as patch:
        take_kernel("Triton", patch)
        patch.setattr(TritonProduct, "rounded", lambda *given: before(*given) + 1)
        patch.setitem(PRODUCTS, "cpu", (TritonProduct, OneDNNProduct))
        assert product_on(CPU) is OneDNNProduct
    choice._problem.cache_clear()
    with monkeypatch.context() as patch:
        take_kernel("Triton", patch)
        patch.setitem(PRODUCTS, "cpu", (TritonProduct, OneDNNProduct))
        assert product_on(CPU) is TritonProduct
        weight = torch.ones(8, 16, dtype=torch.int8)
        plain = OneDNNProduct(weight, torch.ones(8), torch.tensor(1.0), 128)
        taken = moved(plain, CPU)
        assert type(taken) is TritonProduct
        assert moved(taken, CPU) is taken
    monkeypatch.undo()
    assert type(moved(taken, CPU)) is OneDNNProduct


def _no_compiler() -> Any:
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without an NVIDIA GPU")
def test_it_is_for_gpus_of_one_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not TritonProduct.suits(CPU)
    gpu = torch.device("cuda")
    assert not TritonProduct.suits(gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, there, wanted in (((9, 0), object(), True), ((8, 0), object(), False), ((9, 0), None, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=found: found)
        monkeypatch.setattr(importlib.util, "find_spec", lambda _, there=there: there)
        assert TritonProduct.suits(gpu) is wanted


@pytest.mark.parametrize("rules", ["pytorch", "openvino", "qdqbert"])
def test_a_model_goes_there_and_back(rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a product rounds with a factor for each channel, and no weight is sorted for it."""
    model = frozen("bert", rules, num_hidden_layers=1)
    batch = batch_for(model, (3, 8))
    wanted = outputs(model, batch)
    linears = [each for each in model.modules() if isinstance(each, IntegerLinear)]
    with monkeypatch.context() as patch:
        take_kernel("Triton", patch)
        model.to(torch.float32)
        assert all(type(each.product) is TritonProduct for each in linears)
        assert all(each.input_grid.in_one_pass is to_integers and each.input_grid.order is None for each in linears)
        assert apart(outputs(model, batch), wanted) < 0.05
        again = pickle.loads(pickle.dumps(model))
        assert all(torch.equal(each, outputs(model, batch)[name]) for name, each in outputs(again, batch).items())
    model.to(torch.float32)
    assert all(each.input_grid.in_one_pass is None for each in linears)
    assert all(torch.equal(wanted[name], value) for name, value in outputs(model, batch).items())


@pytest.mark.usefixtures("in_torch")
def test_integers_pass_from_one_product_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen("bert", "pytorch")
    batch, handed = batch_for(model, (3, 8)), []
    before = TritonProduct.rounded
    monkeypatch.setattr(
        TritonProduct, "rounded", lambda self, *args: handed.append(args[3].shape) or before(self, *args)
    )
    outputs(model, batch)
    assert len(handed) == model.config.num_hidden_layers


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("in_torch")
def test_a_compiler_is_given_torch_s_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """And merges the rounding for the next product: no kernel of Triton's is called."""
    model = frozen("bert", "pytorch", num_hidden_layers=1)
    batch = batch_for(model, (3, 8))
    wanted = outputs(model, batch)
    monkeypatch.setattr("qdq_surgery.integers.triton_product.kernels", _no_compiler)
    torch._dynamo.reset()
    found = outputs(torch.compile(model, backend="aot_eager", fullgraph=True), batch)
    assert apart(found, wanted) < 0.05
