"""Rounding for the product: against what the paper says, by brute force, and where there is nothing to divide by."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qdq_surgery.numerics.adaptive_rounding import adapted_integers, product_error


def subject(rows: int, columns: int, tokens: int, seed: int = 0, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, the moments of correlated inputs, and a step for each row."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return weight, inputs.T @ inputs, weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)


def nearest(weight: Tensor, step: Tensor) -> Tensor:
    return (weight / step).round().clamp(-8, 7)


def error(integers: Tensor, weight: Tensor, moments: Tensor, step: Tensor) -> float:
    return product_error(integers * step - weight, weight, moments)


def test_the_error_is_that_of_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(50, 6, generator=generator), torch.randn(3, 6, generator=generator)
    off = 0.1 * torch.randn(3, 6, generator=generator)
    wanted = (inputs @ off.T).square().sum() / (inputs @ weight.T).square().sum()
    # Float32 sums in another order.
    assert product_error(off, weight, inputs.T @ inputs) == pytest.approx(float(wanted), rel=1e-4)


@given(st.integers(0, 10_000))
def test_products_lose_less_than_by_the_nearest_integers(seed: int) -> None:
    weight, moments, step = subject(8, 40, 200, seed)
    found = adapted_integers(weight, moments, step, -8, 7)
    assert torch.equal(found, found.round())
    assert float(found.min()) >= -8
    assert float(found.max()) <= 7
    assert error(found, weight, moments, step) < 0.8 * error(nearest(weight, step), weight, moments, step)


def test_it_is_near_the_best_of_all_integers() -> None:
    """By brute force: each of five values at either neighbor or one further."""
    gains, possible = 0.0, 0.0
    for seed in range(20):
        weight, moments, step = subject(1, 5, 30, seed, bits=3)
        floors = (weight / step).floor()
        choices = [floors + torch.tensor([offsets]) for offsets in itertools.product((-1.0, 0.0, 1.0, 2.0), repeat=5)]
        best = min(error(each, weight, moments, step) for each in choices)
        plain = error((weight / step).round(), weight, moments, step)
        found = error(adapted_integers(weight, moments, step, -9, 9), weight, moments, step)
        assert best <= found + 1e-7  # a float32 sum
        gains, possible = gains + plain - found, possible + plain - best
    assert gains > 0.5 * possible


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 130])
def test_what_a_column_costs_reaches_all_that_come_after(columns: int) -> None:
    """Blocks of columns are a matter of speed: the same without them, column by column, in float64."""
    weight, moments, step = subject(4, columns, 4 * columns + 8)
    found = adapted_integers(weight, moments, step, -8, 7)
    order = moments.diagonal().argsort(descending=True, stable=True)
    left, sorted_moments = weight[:, order].double(), moments[order][:, order].double()
    damped = sorted_moments + 0.01 * sorted_moments.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    wanted = torch.zeros_like(weight)
    for at in range(columns):
        integers = (left[:, at] / step[:, 0]).round().clamp(-8, 7)
        wanted[:, order[at]] = integers.float()
        left -= ((left[:, at] - integers * step[:, 0]) / upper[at, at])[:, None] * torch.where(
            torch.arange(columns) >= at, upper[at], 0.0
        )
    # What float32 rounds differently can turn a tie, after which the columns behind it may differ, too.
    assert float((found != wanted).float().mean()) <= 0.02


def test_inputs_that_do_not_go_together_leave_the_nearest() -> None:
    weight, _, step = subject(4, 20, 1)
    found = adapted_integers(weight, torch.eye(20), step, -8, 7)
    assert torch.equal(found, nearest(weight, step))


@pytest.mark.parametrize(
    "moments",
    [
        torch.zeros(12, 12),  # nothing came
        torch.ones(12, 12),  # all channels are one
        torch.diag(torch.tensor([1e30] + [1e-30] * 11)),
        torch.diag(torch.tensor([0.0, 1.0] * 6)),  # dead channels
    ],
)
def test_moments_that_have_no_inverse(moments: Tensor) -> None:
    weight, _, step = subject(4, 12, 1)
    found = adapted_integers(weight, moments, step, -8, 7)
    assert bool(found.isfinite().all())
    assert error(found, weight, moments, step) <= error(nearest(weight, step), weight, moments, step) + 1e-6


def test_a_row_without_a_range_is_zero() -> None:
    weight, moments, step = subject(4, 12, 60)
    weight[2], step[2] = 0.0, 0.0
    found = adapted_integers(weight, moments, step, -8, 7)
    assert not found[2].any()
    assert found[1].any()
