"""What a kernel for integer linears is: the weight stored as that kernel takes it, and the product."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ACTIVATIONS", "LEAST", "SIGNED", "Product", "Rounding", "words_of"]

#: Floats, what they are multiplied by (float32, () or the last axis's), two limits and the integer for 0, to int8.
Rounding = Callable[[Tensor, Tensor, int, int, int], Tensor]

#: What a product can compute of its results, by name. The empty name is nothing.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}

#: No result of theirs is smaller.
LEAST = {"": -math.inf, "gelu": -0.1701, "gelu_tanh": -0.1701, "relu": 0.0}

#: The zero point of signed integers that are stored as uint8, and what lies between the two ways to store one.
SIGNED = 128


class Product(ABC):
    """The integers of a linear's weight, and what multiplies by them. They never change, so that copies share them.

    Args:
        integers: int8, (out_features, in_features).
        scale: What an integer of each row is worth, float32, (out_features,).
        step: What an integer of the activations is worth, float32, ().
        zero_point: The integer of the activations that means 0, where they are stored as uint8.

    Attributes:
        kernel: Its name, for receipts.
        stored: The type that activations come in: uint8, or int8, in which each integer is 128 less.
        dtypes: What the results may be in.
        missing: Why it does not run, where calling it fails, with the place of torch's version.
        inexact: Why it does not run, where its sums are wrong.
        shape: (out_features, in_features).
        rounds: Whether it can round its results for the next product: whether it has :meth:`rounded`.
    """

    kernel: ClassVar[str]
    stored: ClassVar[torch.dtype]
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    missing: ClassVar[str]
    inexact: ClassVar[str]
    rounds: ClassVar[bool] = False

    def __init__(self, integers: Tensor, scale: Tensor, step: Tensor, zero_point: int) -> None:
        self.shape = (int(integers.shape[0]), int(integers.shape[1]))
        self.scale, self.step, self.zero_point = scale, step, zero_point

    @classmethod
    def suits(cls, device: torch.device) -> bool:  # noqa: ARG003
        """Whether it is the one to take on this device, if it runs there."""
        return True

    @classmethod
    def rounding(cls) -> Rounding | None:
        """What rounds activations for it on a GPU without a compiler; ``None`` if torch's operators do."""
        return None

    @abstractmethod
    def integers(self) -> Tensor:
        """The integers as they were given, a new tensor."""

    @abstractmethod
    def __call__(self, stored: Tensor, bias: Tensor | None, dtype: torch.dtype, activation: str) -> Tensor:
        """``activation((stored - zero) * step @ (integers * scale).T + bias)``.

        Args:
            stored: Of the type :attr:`stored`, (..., in_features).
            bias: Floating point, (out_features,).
            activation: A name of :data:`ACTIVATIONS`, or the empty one.

        Returns:
            (..., out_features), in ``dtype``.
        """

    def rounded(self, stored: Tensor, bias: Tensor | None, activation: str, factor: Tensor, zero_point: int) -> Tensor:
        """The integers that the next product reads, of the type :attr:`stored`: rounded from what it is to give.

        Args:
            factor: How many steps of the next grid are 1, float32, ().
            zero_point: Its integer for 0; integers are cut off at 0 and 255.
        """
        raise NotImplementedError(f"{self.kernel} does not round")

    @property
    def device(self) -> torch.device:
        """Where it multiplies."""
        return self.scale.device

    @property
    def nbytes(self) -> int:
        """Bytes of the integers."""
        return self.shape[0] * self.shape[1]

    def buffers(self) -> dict[str, Tensor]:
        """Its tensors, which the linear lists among its own: then they are counted, and CUDA graphs leave them."""
        return {"scale": self.scale}

    def __deepcopy__(self, _: dict[int, Any]) -> Product:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.integers(), self.scale, self.step, self.zero_point)


def words_of(dtypes: tuple[torch.dtype, ...]) -> str:
    """Such as ``float32 or bfloat16``."""
    *others, last = (str(each).removeprefix("torch.") for each in dtypes)
    return f"{', '.join(others)} or {last}"
