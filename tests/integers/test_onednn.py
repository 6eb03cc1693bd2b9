"""oneDNN's product is exact, and its packed weights are shared, made anew, and let go."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch.nn import functional

from qdq_surgery.integers import onednn
from qdq_surgery.integers.onednn import OneDNNProduct, integer_linear


def case(rows: int = 5, inner: int = 48, outer: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (rows, inner), generator=generator).to(torch.uint8)
    weight = torch.randint(-128, 128, (outer, inner), generator=generator).to(torch.int8)
    return inputs, weight


def product_of(weight: torch.Tensor, zero_point: int = 128, **more: Any) -> OneDNNProduct:
    given = {"scale": torch.ones(len(weight)), "step": torch.tensor(1.0), **more}
    return OneDNNProduct(weight, given["scale"], given["step"], zero_point)


@pytest.mark.parametrize("zero_point", [0, 32, 128])
def test_accumulations_are_exact(zero_point: int) -> None:
    """Sums below 2^24 are integers in float32, too."""
    inputs, weight = case()
    wanted = (inputs.int() - zero_point) @ weight.int().t()
    assert torch.equal(product_of(weight, zero_point)(inputs, None, torch.float32, ""), wanted.float())


def test_scales_and_bias() -> None:
    torch.manual_seed(0)
    inputs, weight = case()
    scale, bias, step = torch.rand(24) + 0.5, torch.randn(24), torch.tensor(0.25)
    sums = ((inputs.int() - 128) @ weight.int().t()).double()
    found = product_of(weight, scale=scale, step=step)(inputs, bias, torch.float32, "")
    # A product and a sum in float32: two roundings.
    torch.testing.assert_close(found.double(), sums * 0.25 * scale + bias, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("", lambda values: values),
        ("relu", functional.relu),
        ("gelu", functional.gelu),
        ("gelu_tanh", lambda values: functional.gelu(values, approximate="tanh")),
    ],
)
def test_epilogues(activation: str, function: Any) -> None:
    inputs, weight = case()
    step = torch.tensor(0.0005)
    sums = function(((inputs.int() - 128) @ weight.int().t()).double() * step.double())
    found = product_of(weight, step=step)(inputs, None, torch.float32, activation)
    torch.testing.assert_close(found.double(), sums, rtol=1e-5, atol=1e-6)


def test_more_axes_and_no_rows() -> None:
    inputs, weight = case(6)
    product = product_of(weight)
    flat = product(inputs, None, torch.float32, "")
    assert torch.equal(product(inputs.reshape(2, 3, -1), None, torch.float32, ""), flat.reshape(2, 3, -1))
    assert product(inputs[:0], None, torch.float32, "").shape == (0, 24)
    # A row does not depend on those beside it.
    assert torch.equal(product(inputs[:1], None, torch.float32, ""), flat[:1])


def test_the_shape_is_known_without_values() -> None:
    inputs, weight = case()
    found = integer_linear(
        inputs.to("meta"),
        product_of(weight).number.to("meta"),
        torch.ones(24, device="meta"),
        None,
        torch.tensor(1.0, device="meta"),
        128,
        torch.bfloat16,
        "none",
        "",
        None,
        0,
    )
    assert (found.shape, found.dtype) == ((5, 24), torch.bfloat16)


def test_packed_weights_are_shared_by_copies_and_made_anew_by_pickles() -> None:
    inputs, weight = case()
    product = product_of(weight)
    assert torch.equal(product.integers(), weight)
    assert product.nbytes == weight.numel()
    assert copy.deepcopy(product) is product
    wanted = product(inputs, None, torch.float32, "")
    again = pickle.loads(pickle.dumps(product))
    assert int(again.number) != int(product.number)
    assert torch.equal(again.integers(), weight)
    assert torch.equal(again(inputs, None, torch.float32, ""), wanted)


def test_packed_weights_are_let_go() -> None:
    product = product_of(case()[1])
    number = int(product.number)
    assert number in onednn._PACKED
    del product
    gc.collect()
    assert number not in onednn._PACKED


@pytest.mark.parametrize("shape", [(2, 0, 48), (0, 48), (48,)])
def test_of_nothing_the_shape_is_kept(shape: tuple[int, ...]) -> None:
    found = product_of(case()[1])(torch.zeros(shape, dtype=torch.uint8), None, torch.float32, "")
    assert found.shape == (*shape[:-1], 24)


def test_tensors_are_made_where_the_kernel_is() -> None:
    """Where torch makes tensors by default, there is no memory of the kernel's."""
    inputs, weight = case()
    wanted = product_of(weight)(inputs, None, torch.float32, "")
    with torch.device("meta"):
        made = OneDNNProduct(weight, torch.ones(24, device="cpu"), torch.tensor(1.0, device="cpu"), 128)
        again = pickle.loads(pickle.dumps(made))
    for each in (made, again):
        assert torch.equal(each(inputs, None, torch.float32, ""), wanted)
