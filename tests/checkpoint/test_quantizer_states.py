"""Ranges that are zero: only where the weight is, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qdq_surgery.checkpoint.quantizer_states import _zero_range

ROWS, COLUMNS = 5, 3


def every_value(amax: Tensor, weight: Tensor) -> bool:
    """Whether a value that is not zero has a range that is, looked up one by one."""
    ranges = amax.expand(weight.shape)
    return any(
        float(ranges[row, column]) == 0 and float(weight[row, column]) != 0
        for row in range(ROWS)
        for column in range(COLUMNS)
    )


@pytest.mark.parametrize("shape", [(), (1, 1), (ROWS, 1), (1, COLUMNS), (ROWS, COLUMNS)], ids=str)
@pytest.mark.parametrize("zero_row", [None, 0, 2, ROWS - 1])
def test_a_range_is_zero_only_where_the_weight_is(shape: tuple[int, ...], zero_row: int | None) -> None:
    drawn = torch.Generator().manual_seed(0)
    weight = torch.rand(ROWS, COLUMNS, generator=drawn) + 1.0
    if zero_row is not None:
        weight[zero_row] = 0.0
    seen = set()
    for at in [None, *range(torch.ones(shape).numel())]:
        amax = torch.ones(shape)
        if at is not None:
            amax.view(-1)[at] = 0.0
        wrong = every_value(amax, weight)
        assert (_zero_range(amax, weight) is not None) == wrong
        seen.add(wrong)
    # A whole row of zeros may have a range of zero; in the other shapes a zero always meets a value.
    assert seen == {False, True}


def test_all_may_be_zero() -> None:
    weight = torch.zeros(ROWS, COLUMNS)
    assert all(_zero_range(torch.zeros(shape), weight) is None for shape in [(), (ROWS, 1), (1, COLUMNS)])


def test_of_a_weight_that_is_not_in_memory_nothing_is_known() -> None:
    assert _zero_range(torch.zeros(ROWS, 1), torch.empty(ROWS, COLUMNS, device="meta")) is None
