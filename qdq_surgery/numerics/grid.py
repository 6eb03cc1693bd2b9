"""The grid: which numbers a quantized tensor may hold. Whoever needs a limit, a step or a type asks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from numpy.typing import NDArray
from torch import Tensor

__all__ = ["INT8", "Grid"]

_Amax = TypeVar("_Amax", Tensor, NDArray[Any], float)

#: Widths that ONNX has an integer type of.
_ONNX_BITS = (4, 8, 16)


@dataclass(frozen=True)
class Grid:
    """Evenly spaced numbers, a step apart, 0 among them: integers times the step.

    Attributes:
        bits: The width of an integer.
        unsigned: Whether the integers start at 0.
        narrow_range: Whether the lowest integer of a signed grid is left out, so that both ends are equally far away.
        zero_point: How many of an unsigned grid's integers lie below 0: as it is stored, this integer is 0. For what is
            hardly negative, such as a GELU's output.
    """

    bits: int = 8
    unsigned: bool = False
    narrow_range: bool = False
    zero_point: int = 0

    @property
    def qmax(self) -> int:
        """The highest integer, which ``amax`` becomes."""
        highest: int = 2 ** (self.bits - 1 + int(self.unsigned)) - 1
        return highest - self.zero_point

    @property
    def qmin(self) -> int:
        """The lowest integer."""
        return -self.zero_point if self.unsigned else -self.qmax if self.narrow_range else -self.qmax - 1

    @property
    def below(self) -> float:
        """How large ``amax`` has to be for the grid to reach down to -1; 0 for a grid without a zero point.

        A signed grid reaches as far down as up, and one of unsigned integers alone reaches nowhere.
        """
        return self.qmax / self.zero_point if self.zero_point else 0.0

    @property
    def levels(self) -> int:
        """How many integers a magnitude can become, 0 among them."""
        return self.qmax + 1

    @property
    def full(self) -> Grid:
        """The same grid with its lowest integer, as ONNX's operators have it."""
        return Grid(self.bits, self.unsigned, zero_point=self.zero_point)

    @property
    def onnx_type(self) -> str | None:
        """ONNX's name of the integers' type, such as ``UINT8``; ``None`` where ONNX has none."""
        return f"{'U' if self.unsigned else ''}INT{self.bits}" if self.bits in _ONNX_BITS else None

    def step(self, amax: _Amax) -> _Amax:
        """The distance of two neighbours, ONNX's scale: same shape and units as ``amax``."""
        return amax / self.qmax

    def __str__(self) -> str:
        return f"{'u' if self.unsigned else ''}int{self.bits}{' narrow' if self.narrow_range else ''}{self._below()}"

    def _below(self) -> str:
        return f" zero at {self.zero_point}" if self.zero_point else ""


INT8 = Grid()
