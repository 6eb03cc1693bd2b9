"""torch._int_mm's products are oneDNN's to the integer, and obey what a GPU wants, of which a CPU asks nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_kernels import int_mm_as_on_cuda
from torch import Tensor
from torch.nn import functional

from qdq_surgery.integers.int_mm import IntMMProduct
from qdq_surgery.integers.onednn import OneDNNProduct
from qdq_surgery.integers.product import Product
from qdq_surgery.safety import torch_private

#: (in_features, out_features): multiples of 8; a classifier with 2 outputs; odd on both axes; next to nothing.
SIZES = [(48, 24), (32, 2), (13, 9), (1, 1)]

#: As uint8: of unsigned, asymmetric and signed grids.
ZEROS = [0, 32, 128, 255]


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private, "int_mm", int_mm_as_on_cuda)


def case(rows: int = 5, inner: int = 48, outer: int = 24) -> tuple[Tensor, Tensor]:
    """Activations as uint8, and a weight."""
    generator = torch.Generator().manual_seed(rows)
    stored = torch.randint(0, 256, (rows, inner), generator=generator).to(torch.uint8)
    weight = torch.randint(-128, 128, (outer, inner), generator=generator).to(torch.int8)
    return stored, weight


def signed(stored: Tensor) -> Tensor:
    """As int8, which is 128 less."""
    return (stored.int() - 128).to(torch.int8)


@pytest.fixture(autouse=True)
def same_every_time() -> None:
    torch.manual_seed(0)


def product_of(
    weight: Tensor,
    zero_point: int = 128,
    scale: Tensor | None = None,
    step: float = 1.0,
    kind: type[Product] | None = None,
) -> Product:
    scale = torch.ones(len(weight)) if scale is None else scale
    return (kind or IntMMProduct)(weight, scale, torch.tensor(step), zero_point)


@pytest.mark.parametrize("zero_point", ZEROS)
@pytest.mark.parametrize(("inner", "outer"), SIZES)
def test_sums_are_those_of_onednn_to_the_integer(inner: int, outer: int, zero_point: int) -> None:
    """Sums below 2^24 are integers in float32, too."""
    for rows in (0, *range(1, 41)):
        stored, weight = case(rows, inner, outer)
        found = product_of(weight, zero_point)(signed(stored), None, torch.float32, "")
        assert torch.equal(found, ((stored.int() - zero_point) @ weight.int().t()).float())
        other = product_of(weight, zero_point, kind=OneDNNProduct)(stored, None, torch.float32, "")
        assert torch.equal(found, other)


def test_the_largest_sums_there_are() -> None:
    """3072 products of the largest integers: 2^26 and more, of which float32 keeps 24 bits."""
    stored, weight = torch.full((20, 3072), 255, dtype=torch.uint8), torch.full((8, 3072), -128, dtype=torch.int8)
    for zero_point in (0, 128):
        found = product_of(weight, zero_point)(signed(stored), None, torch.float32, "")
        assert torch.equal(found, torch.full((20, 8), -128.0 * 3072 * (255 - zero_point)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("zero_point", [32, 128])
def test_scales_bias_and_activations(
    zero_point: int, bias: bool, activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, weight = case()
    scale, added = torch.rand(24) + 0.5, torch.randn(24).to(dtype) if bias else None
    product = product_of(weight, zero_point, scale, 0.0005)
    sums = ((stored.int() - zero_point) @ weight.int().t()).double() * float(product.step) * scale
    sums = sums if added is None else sums + added
    wanted = {"": lambda x: x, "relu": functional.relu, "gelu": functional.gelu}.get(
        activation, lambda x: functional.gelu(x, approximate="tanh")
    )(sums)
    # A half-precision result is rounded once, or twice: half of its last bit each time.
    near: dict[str, float] = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2e-2 * torch.finfo(dtype).eps + 2e-6}
    if dtype == torch.float32:
        near["rtol"] = 2e-5  # a GELU of large negative values ends in a difference of numbers near 1
    found = product(signed(stored), added, dtype, activation)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, **near)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(product(signed(stored), added, dtype, activation).double(), wanted, **near)


@pytest.mark.parametrize("inner", [48, 13])
def test_more_axes_and_rows_that_are_not_beside_each_other(inner: int) -> None:
    stored, weight = case(36, inner)
    given, product = signed(stored), product_of(weight)
    flat = product(given, None, torch.float32, "")
    for shape in ((2, 18), (3, 4, 3), (36, 1)):
        assert torch.equal(product(given.reshape(*shape, inner), None, torch.float32, ""), flat.reshape(*shape, -1))
    turned = given.reshape(2, 18, inner).transpose(0, 1)
    assert torch.equal(product(turned, None, torch.float32, ""), flat.reshape(2, 18, -1).transpose(0, 1))
    assert torch.equal(product(given.t().contiguous().t(), None, torch.float32, ""), flat)
    # A row does not depend on those beside it.
    assert torch.equal(product(given[7:8], None, torch.float32, ""), flat[7:8])
    assert torch.equal(product(given[7], None, torch.float32, ""), flat[7])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("backend", "zero_point"), [("aot_eager", 128), pytest.param("inductor", 32, marks=pytest.mark.slow)]
)
def test_compiled_it_is_one_graph(backend: str, zero_point: int) -> None:
    """And one for any number of rows above 16."""
    stored, weight = case(40, 13, 9)
    scale, bias = torch.rand(9) + 0.5, torch.randn(9)
    product = product_of(weight, zero_point, scale, 0.0005)
    compiles: list[int] = []

    def count(graph: Any, examples: Any) -> Callable[..., Any]:
        compiles.append(1)
        return torch._dynamo.lookup_backend(backend)(graph, examples)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    compiled = torch.compile(lambda given: product(given, bias, torch.float32, "gelu"), backend=count, fullgraph=True)
    for rows in (3, 40, 33, 20):
        given = signed(stored[:rows])
        found, wanted = compiled(given), product(given, bias, torch.float32, "gelu")
        # Scales are multiplied in another order, and inductor's error function is another one.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert len(compiles) <= 3  # few rows; the first shape of many; any other


@pytest.mark.parametrize(("inner", "outer"), SIZES)
def test_copies_share_it_and_pickles_make_it_anew(inner: int, outer: int) -> None:
    stored, weight = case(20, inner, outer)
    product = product_of(weight, 32, torch.rand(outer), 0.5)
    assert torch.equal(product.integers(), weight)
    assert product.integers().is_contiguous()
    assert product.nbytes == weight.numel()
    assert copy.deepcopy(product) is product
    again = pickle.loads(pickle.dumps(product))
    assert type(again) is IntMMProduct
    wanted = product(signed(stored), None, torch.float32, "")
    assert torch.equal(again(signed(stored), None, torch.float32, ""), wanted)


def test_what_it_holds_is_listed_and_small() -> None:
    _, weight = case(1, 48, 24)
    assert {name: tuple(each.shape) for name, each in product_of(weight).buffers().items()} == {
        "scale": (24,),
        "rows": (24, 48),
        "factor": (24,),
    }
    assert product_of(weight, 32).buffers()["excess"].dtype == torch.int32
    assert product_of(case(1, 13, 9)[1]).buffers()["rows"].shape == (16, 16)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.ones(16, 8, dtype=torch.int8), torch.ones(8, 8, dtype=torch.int8).t()),
        (torch.ones(17, 4, dtype=torch.int8), torch.ones(8, 4, dtype=torch.int8).t()),
        (torch.ones(17, 8, dtype=torch.int8), torch.ones(2, 8, dtype=torch.int8).t()),
        (torch.ones(8, 17, dtype=torch.int8).t(), torch.ones(8, 8, dtype=torch.int8).t()),
        (torch.ones(17, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8)),
        (torch.ones(17, 8, dtype=torch.uint8), torch.ones(8, 8, dtype=torch.int8).t()),
    ],
    ids=["few rows", "inner", "outer", "rows last", "columns last", "uint8"],
)
def test_the_conditions_can_fail(one: Tensor, other: Tensor) -> None:
    with pytest.raises(AssertionError):
        torch_private.int_mm(one, other)
