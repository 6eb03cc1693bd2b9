"""Numbers that know the graph node they came from, so that sizes stay symbolic through Python arithmetic.

They *are* numbers (subclasses of ``int`` and ``float``), so C++ code takes them. Arithmetic gives new ones; a
comparison gives a plain ``bool``, and the recorder notes it as a decision.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol, SupportsIndex

import torch
from torch.fx import Node

__all__ = ["NumberRecorder", "Real", "Size", "plain"]


class NumberRecorder(Protocol):
    """Who is told about arithmetic and decisions."""

    def number(self, function: Callable[..., Any], operands: tuple[Any, ...], value: Any) -> Any:
        """The symbolic result of ``function(*operands)``, which is ``value``."""

    def decide(self, function: Callable[..., Any], operands: tuple[Any, ...], value: bool) -> bool:
        """Note that ``function(*operands)`` is ``value`` and that Python will act on it."""

    def fix_size(self, size: Size, value: int) -> None:
        """Note that ``size`` leaves as the plain integer ``value``."""


class Size(int):
    """An integer that knows the node it came from."""

    node: Node
    recorder: NumberRecorder

    __hash__ = int.__hash__

    def __bool__(self) -> bool:
        return self.recorder.decide(operator.ne, (self, 0), int(self) != 0)

    def __int__(self) -> int:
        value = int.__int__(self)
        self.recorder.fix_size(self, value)
        return value

    def __float__(self) -> float:
        value = int.__float__(self)
        self.recorder.fix_size(self, int.__int__(self))
        return value

    __trunc__ = __floor__ = __ceil__ = __int__

    def __round__(self, ndigits: SupportsIndex = 0) -> int:
        return round(self.__int__(), ndigits)

    def __abs__(self) -> int:
        return abs(self.__int__())

    def __divmod__(self, other: int) -> tuple[int, int]:
        return divmod(self.__int__(), other)


class Real(float):
    """A float that knows the node it came from."""

    node: Node
    recorder: NumberRecorder

    __hash__ = float.__hash__

    def __bool__(self) -> bool:
        return self.recorder.decide(operator.ne, (self, 0.0), float.__ne__(self, 0.0))

    def _fixed(self) -> float:
        value = float.__float__(self)
        self.recorder.decide(operator.eq, (self, value), True)
        return value

    def __int__(self) -> int:
        return int(self._fixed())

    __trunc__ = __int__

    def __floor__(self) -> int:
        return math.floor(self._fixed())

    def __ceil__(self) -> int:
        return math.ceil(self._fixed())

    def __round__(self, ndigits: SupportsIndex | None = None) -> Any:
        return round(self._fixed(), ndigits)

    def __abs__(self) -> float:
        return abs(self._fixed())


def _install_arithmetic(cls: type[Size] | type[Real], base: type[int] | type[float]) -> None:
    def binary(name: str, function: Callable[[Any, Any], Any], reflected: bool) -> None:
        method = getattr(base, name)

        def compute(self: Any, other: Any) -> Any:
            value = method(self, other)
            if value is NotImplemented:
                return value
            operands = (other, self) if reflected else (self, other)
            return self.recorder.number(function, operands, value)

        setattr(cls, name, compute)

    for stem in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"):
        binary(f"__{stem}__", getattr(operator, stem), reflected=False)
        binary(f"__r{stem}__", getattr(operator, stem), reflected=True)
    for stem in ("eq", "ne", "lt", "le", "gt", "ge"):
        method, function = getattr(base, f"__{stem}__"), getattr(operator, stem)

        def compare(self: Any, other: Any, method: Any = method, function: Any = function) -> Any:
            value = method(self, other)
            if value is NotImplemented:
                return value
            return self.recorder.decide(function, (self, other), value)

        setattr(cls, f"__{stem}__", compare)

    def negative(self: Any) -> Any:
        return self.recorder.number(operator.neg, (self,), base.__neg__(self))

    cls.__neg__ = negative  # type: ignore[method-assign]


_install_arithmetic(Size, int)
_install_arithmetic(Real, float)


def plain(value: Any) -> Any:
    """The value with ordinary numbers in place of symbolic ones."""
    if isinstance(value, Size):
        return int.__int__(value)
    if isinstance(value, Real):
        return float.__float__(value)
    if isinstance(value, torch.Size):
        return torch.Size([int.__int__(item) for item in value])
    if type(value) in (tuple, list):
        return type(value)(plain(item) for item in value)
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    return value
