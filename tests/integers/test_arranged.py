"""Weights whose rows and columns are sorted: from outside what they were."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from qdq_surgery.integers.arranged import ArrangedProduct, Arrangement, arranged, by_step
from qdq_surgery.integers.onednn import OneDNNProduct

STEPS = torch.tensor([3.0, 5.0, 3.0, 2.0, 5.0, 3.0, 3.0, 3.0])
COLUMNS = torch.tensor([5, 0, 3, 1, 2, 4])


def case() -> tuple[OneDNNProduct, Tensor, Tensor]:
    """A product of 6 to 8 channels, what it is given, and a bias."""
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-128, 128, (8, 6), generator=generator).to(torch.int8)
    stored = torch.randint(0, 256, (5, 6), generator=generator).to(torch.uint8)
    scale, bias = (torch.rand(8, generator=generator) + 0.5 for _ in range(2))
    return OneDNNProduct(integers, scale, torch.tensor(0.003), 32), stored, bias


def sorted_as(product: OneDNNProduct, rows: bool, columns: bool) -> ArrangedProduct:
    found = by_step(STEPS) if rows else ((), ())
    return arranged(product, Arrangement(*found, COLUMNS if columns else None))


def test_channels_of_one_step_stand_together_the_most_frequent_first() -> None:
    rows, factors = by_step(STEPS)
    assert [each.tolist() for each in rows] == [[0, 2, 5, 6, 7], [1, 4], [3]]
    assert [float(each) for each in factors] == [3.0, 5.0, 2.0]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("activation", ["", "gelu", "relu"])
def test_floats_are_those_of_the_plain_product(activation: str, rows: bool, columns: bool) -> None:
    plain, stored, bias = case()
    product = sorted_as(plain, rows, columns)
    given = stored[:, COLUMNS] if columns else stored
    for added in (bias, None):
        for dtype in (torch.float32, torch.bfloat16):
            wanted = plain(stored, added, dtype, activation)
            # The kernel may take another code for fewer rows: the last bit.
            torch.testing.assert_close(
                product(given.reshape(1, 5, 6), added, dtype, activation)[0],
                wanted,
                rtol=2 * torch.finfo(dtype).eps,
                atol=1e-6,
            )


@pytest.mark.parametrize("zero_point", [128, 32])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_what_is_rounded_is_in_the_order_of_the_arrangement(rows: bool, columns: bool, zero_point: int) -> None:
    plain, stored, bias = case()
    product = sorted_as(plain, rows, columns)
    factor = STEPS * 10 if rows else torch.tensor(30.0)
    if rows:
        found = by_step(factor)
        product = arranged(plain, Arrangement(*found, COLUMNS if columns else None))
    steps = (plain(stored, bias, torch.float32, "gelu") * factor + zero_point).clamp(0, 255)
    wanted = steps[:, torch.cat(by_step(STEPS)[0])] if rows else steps
    integers = product.rounded(stored[:, COLUMNS] if columns else stored, bias, "gelu", factor, zero_point)
    assert integers.dtype == torch.uint8
    assert float((integers.float() - wanted).abs().max()) <= 0.5 + 1e-3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_integers_stand_in_their_own_order(rows: bool, columns: bool, packed: bool) -> None:
    plain, stored, bias = case()
    wanted = plain.integers()
    product = sorted_as(plain, rows, columns)
    assert all(part._packed is None for part in product.parts)  # nothing is read before it is needed
    if packed:
        product(stored, bias, torch.float32, "")
        assert all(part._plain is None for part in product.parts)
    assert torch.equal(product.integers(), wanted)
    again = pickle.loads(pickle.dumps(product))
    assert torch.equal(again.integers(), wanted)
    assert torch.equal(again(stored, bias, torch.float32, ""), product(stored, bias, torch.float32, ""))
    assert copy.deepcopy(product) is product
    assert torch.equal(product.scale, plain.scale)
    assert product.shape == plain.shape
    assert product.nbytes == plain.nbytes


def test_one_that_is_sorted_stays_and_can_be_sorted_anew() -> None:
    plain, stored, bias = case()
    product = sorted_as(plain, rows=True, columns=False)
    assert arranged(product, product.arrangement) is product
    assert copy.deepcopy(product.arrangement) is product.arrangement
    product(stored, bias, torch.float32, "")
    other = arranged(product, Arrangement(columns=COLUMNS))
    assert torch.equal(other.integers(), plain.integers())


def test_its_tensors_have_names_of_their_own() -> None:
    buffers = sorted_as(case()[0], rows=True, columns=True).buffers()
    assert {"scale", "number_0", "number_1", "number_2"} <= buffers.keys()
