"""The integer product is exact, and what cannot run is told."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from qdq_surgery.freeze import kernel
from qdq_surgery.freeze.kernel import PackedWeight, integer_linear, unsupported


def case(rows: int = 5, inner: int = 48, outer: int = 24) -> tuple[torch.Tensor, torch.Tensor, PackedWeight]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (rows, inner), generator=generator).to(torch.uint8)
    weight = torch.randint(-128, 128, (outer, inner), generator=generator).to(torch.int8)
    return inputs, weight, PackedWeight(weight)


def multiply(inputs: torch.Tensor, packed: PackedWeight, **more: Any) -> torch.Tensor:
    given: dict[str, Any] = {
        "scale": torch.ones(packed.shape[0]),
        "bias": None,
        "step": torch.tensor(1.0),
        "zero_point": 128,
        "dtype": torch.float32,
        "post_op": "none",
        "algorithm": "",
        **more,
    }
    result: torch.Tensor = integer_linear(inputs, torch.tensor(packed.number), *given.values())
    return result


@pytest.mark.parametrize("zero_point", [0, 32, 128])
def test_accumulations_are_exact(zero_point: int) -> None:
    """Sums below 2^24 are integers in float32, too."""
    inputs, weight, packed = case()
    wanted = (inputs.int() - zero_point) @ weight.int().t()
    assert torch.equal(multiply(inputs, packed, zero_point=zero_point), wanted.float())


def test_scales_and_bias() -> None:
    inputs, weight, packed = case()
    scale, bias, step = torch.rand(24) + 0.5, torch.randn(24), torch.tensor(0.25)
    sums = ((inputs.int() - 128) @ weight.int().t()).double()
    found = multiply(inputs, packed, scale=scale, bias=bias, step=step)
    # A product and a sum in float32: two roundings.
    torch.testing.assert_close(found.double(), sums * 0.25 * scale + bias, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize(
    ("post_op", "algorithm", "function"),
    [
        ("none", "", lambda values: values),
        ("relu", "", functional.relu),
        ("gelu", "none", functional.gelu),
        ("gelu", "tanh", lambda values: functional.gelu(values, approximate="tanh")),
    ],
)
def test_epilogues(post_op: str, algorithm: str, function: Any) -> None:
    inputs, weight, packed = case()
    step = torch.tensor(0.0005)
    sums = function(((inputs.int() - 128) @ weight.int().t()).double() * step.double())
    found = multiply(inputs, packed, step=step, post_op=post_op, algorithm=algorithm)
    torch.testing.assert_close(found.double(), sums, rtol=1e-5, atol=1e-6)


def test_more_axes_and_no_rows() -> None:
    inputs, _, packed = case(6)
    flat = multiply(inputs, packed)
    assert torch.equal(multiply(inputs.reshape(2, 3, -1), packed), flat.reshape(2, 3, -1))
    assert multiply(inputs[:0], packed).shape == (0, 24)
    # A row does not depend on those beside it.
    assert torch.equal(multiply(inputs[:1], packed), flat[:1])


def test_the_shape_is_known_without_values() -> None:
    inputs, _, packed = case()
    found = integer_linear(
        inputs.to("meta"),
        torch.tensor(packed.number, device="meta"),
        torch.ones(24, device="meta"),
        None,
        torch.tensor(1.0, device="meta"),
        128,
        torch.bfloat16,
        "none",
        "",
    )
    assert (found.shape, found.dtype) == ((5, 24), torch.bfloat16)


def test_packed_weights_are_shared_by_copies_and_made_anew_by_pickles() -> None:
    inputs, weight, packed = case()
    assert torch.equal(packed.integers(), weight)
    assert packed.nbytes == weight.numel()
    assert copy.deepcopy(packed) is packed
    again = pickle.loads(pickle.dumps(packed))
    assert again.number != packed.number
    assert torch.equal(again.integers(), weight)
    assert torch.equal(multiply(inputs, again), multiply(inputs, packed))


def test_packed_weights_are_let_go() -> None:
    _, _, packed = case()
    number = packed.number
    assert number in kernel._PACKED
    del packed
    gc.collect()
    assert number not in kernel._PACKED


@pytest.fixture
def asked_anew() -> Iterator[None]:
    unsupported.cache_clear()
    yield
    unsupported.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_what_runs_here_and_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unsupported(torch.float32) is None
    assert unsupported(torch.bfloat16) is None
    assert "float32 or bfloat16, not float16" in str(unsupported(torch.float16))

    def saturates(*args: Any) -> torch.Tensor:
        found = integer_linear(*args)
        return found.clamp(-32768, 32767) if found.is_floating_point() else found

    unsupported.cache_clear()
    monkeypatch.setattr(kernel, "integer_linear", saturates)
    assert "saturates on this machine" in str(unsupported(torch.float32))

    def missing(*_: Any) -> torch.Tensor:
        raise RuntimeError("could not create a primitive")

    unsupported.cache_clear()
    monkeypatch.setattr(kernel, "integer_linear", missing)
    assert "has no int8 linear of oneDNN that runs on this machine (could not create" in str(unsupported(torch.float32))
