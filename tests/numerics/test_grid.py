"""The grid: limits, step, type and words, in one place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qdq_surgery.numerics.grid import INT8, Grid

GRIDS = {
    "int8": (INT8, -128, 127, "INT8"),
    "int8 narrow": (Grid(narrow_range=True), -127, 127, "INT8"),
    "uint8": (Grid(unsigned=True), 0, 255, "UINT8"),
    "int4": (Grid(4), -8, 7, "INT4"),
    "uint4": (Grid(4, unsigned=True), 0, 15, "UINT4"),
    "int16": (Grid(16), -32768, 32767, "INT16"),
    "uint16": (Grid(16, unsigned=True), 0, 65535, "UINT16"),
    "int2": (Grid(2), -2, 1, None),
    "int6 narrow": (Grid(6, narrow_range=True), -31, 31, None),
    "uint8 zero at 32": (Grid(unsigned=True, zero_point=32), -32, 223, "UINT8"),
}


@pytest.mark.parametrize(("words", "case"), GRIDS.items(), ids=GRIDS)
def test_limits_type_and_words(words: str, case: tuple[Grid, int, int, str | None]) -> None:
    grid, lowest, highest, onnx_type = case
    assert (str(grid), grid.qmin, grid.qmax, grid.onnx_type) == (words, lowest, highest, onnx_type)
    assert (grid.levels, grid.full.qmin) == (
        highest + 1,
        -grid.zero_point if grid.unsigned else -highest - 1,
    )


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
def test_the_step_is_the_range_over_the_highest_integer(bits: int, unsigned: bool) -> None:
    """Tolerance 0: a float64 quotient, and a float32 one that torch and NumPy round once."""
    grid, amax = Grid(bits, unsigned), np.array([0.3, 7.0, 1e-30], np.float32)
    highest = 2 ** (bits if unsigned else bits - 1) - 1
    assert grid.step(0.3) == 0.3 / highest
    assert np.array_equal(grid.step(amax), amax / np.float32(highest))
    assert torch.equal(grid.step(torch.tensor(amax)), torch.tensor(amax / np.float32(highest)))
    assert grid.step(torch.tensor(0.3)).shape == ()


def test_grids_are_values() -> None:
    assert Grid(8, False, False) == INT8 == Grid(narrow_range=True).full
    assert len({INT8, Grid(), Grid(4)}) == 2
