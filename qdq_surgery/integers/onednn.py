"""On CPUs: oneDNN's int8 linear behind one operator of torch, with weights that are packed once.

oneDNN's packed weights are opaque: they have no storage, so that nothing of torch can copy, save or trace them. So they
stay in :class:`OneDNNProduct` objects, and what the operator takes is the number of one. That is why a frozen model
runs under ``torch.compile`` without options: the compiler sees an operator over plain tensors, and calls it as it is.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

from qdq_surgery.integers.product import Product

__all__ = ["OneDNNProduct", "integer_linear"]

_NUMBERS = itertools.count()
_PACKED: weakref.WeakValueDictionary[int, OneDNNProduct] = weakref.WeakValueDictionary()

#: oneDNN's words for what is done in the epilogue.
_POST_OPS = {"": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}


class OneDNNProduct(Product):
    """The integers in oneDNN's own layout.

    They are packed when they are first multiplied by. What is loaded from a file is then not read before it is needed,
    as a float model's weights are not.
    """

    kernel = "oneDNN int8"
    stored = torch.uint8
    dtypes = (torch.float32, torch.bfloat16)
    missing = "torch {} has no int8 linear of oneDNN that runs on this machine"
    rounds = True
    inexact = "oneDNN's int8 linear saturates on this machine, whose CPU has no instruction for the product (VNNI)"

    def __init__(self, integers: Tensor, scale: Tensor, step: Tensor, zero_point: int) -> None:
        super().__init__(integers, scale, step, zero_point)
        self._plain: Tensor | None = integers
        self._packed: Tensor | None = None
        #: Where torch makes tensors by default may be elsewhere.
        self.zeros = torch.zeros(self.shape[0], dtype=torch.int64, device="cpu")
        number = next(_NUMBERS)
        #: What :func:`integer_linear` takes for it, int64, ().
        self.number = torch.tensor(number, device="cpu")
        _PACKED[number] = self

    @property
    def packed(self) -> Tensor:
        """In oneDNN's layout; the plain ones are given up for it."""
        # Two threads may both do it. The plain ones are looked at first, and go last: who finds none finds the others.
        plain, packed = self._plain, self._packed
        if packed is None:
            assert plain is not None
            packed = self._packed = torch.ops.onednn.qlinear_prepack(self.chosen(plain), None)
            self._plain = None
        return packed

    def chosen(self, plain: Tensor) -> Tensor:
        """What is packed of what was given."""
        return plain.contiguous()

    def integers(self) -> Tensor:
        """The integers as they were given, a new tensor."""
        plain = self._plain
        if plain is not None:
            return plain.clone(memory_format=torch.contiguous_format)
        dense: Tensor = self.packed.to_dense()
        return dense.t().contiguous()

    def buffers(self) -> dict[str, Tensor]:
        """As there."""
        return {**super().buffers(), "number": self.number}

    def __call__(self, stored: Tensor, bias: Tensor | None, dtype: torch.dtype, activation: str) -> Tensor:
        """As there."""
        return self._product(stored, bias, dtype, activation, None, 0)

    def rounded(self, stored: Tensor, bias: Tensor | None, activation: str, factor: Tensor, zero_point: int) -> Tensor:
        """As there, by its epilogue."""
        return self._product(stored, bias, torch.uint8, activation, factor, zero_point)

    def _product(
        self,
        stored: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        activation: str,
        factor: Tensor | None,
        zero_point: int,
    ) -> Tensor:
        of_self = self.number, self.scale, bias, self.step, self.zero_point
        result: Tensor = integer_linear(stored, *of_self, dtype, *_POST_OPS[activation], factor, zero_point)
        return result.reshape(*stored.shape[:-1], self.shape[0])  # of nothing, oneDNN's has two axes


_LIBRARY = torch.library.Library("qdq_surgery", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "integer_linear(Tensor input, Tensor weight, Tensor scale, Tensor? bias, Tensor step, int zero_point, "
    "ScalarType dtype, str post_op, str algorithm, Tensor? factor, int next_zero_point) -> Tensor"
)


def _on_cpu(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    step: Tensor,
    zero_point: int,
    dtype: torch.dtype,
    post_op: str,
    algorithm: str,
    factor: Tensor | None,
    next_zero_point: int,
) -> Tensor:
    packed = _PACKED[int(weight)]
    result: Tensor = torch.ops.onednn.qlinear_pointwise(
        input,
        float(step),
        zero_point,
        packed.packed,
        scale,
        packed.zeros,
        bias,
        1.0 if factor is None else 1.0 / float(factor),
        next_zero_point,
        dtype,
        post_op,
        [],
        algorithm,
    )
    return result


_LIBRARY.impl("integer_linear", _on_cpu, "CPU")  # type: ignore[no-untyped-call]


@torch.library.register_fake("qdq_surgery::integer_linear", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _shape_only(
    input: Tensor,  # noqa: A002
    weight: Tensor,  # noqa: ARG001
    scale: Tensor,
    bias: Tensor | None,  # noqa: ARG001
    step: Tensor,  # noqa: ARG001
    zero_point: int,  # noqa: ARG001
    dtype: torch.dtype,
    post_op: str,  # noqa: ARG001
    algorithm: str,  # noqa: ARG001
    factor: Tensor | None,  # noqa: ARG001
    next_zero_point: int,  # noqa: ARG001
) -> Tensor:
    return input.new_empty((*input.shape[:-1], scale.shape[0]), dtype=dtype)


#: (input, weight, scale, bias, step, zero_point, dtype, post_op, algorithm, factor, next_zero_point) -> ``dtype``:
#: ``post_op((input - zero_point) * step @ (integers * scale).T + bias)``. ``input`` is uint8, (..., in_features);
#: ``weight`` is the number of a :class:`OneDNNProduct`, int64, (); ``scale`` float32, (out_features,);
#: ``step`` float32, (). With a factor, float32, (), uint8: times ``factor``, rounded, plus ``next_zero_point``.
integer_linear = torch.ops.qdq_surgery.integer_linear.default
