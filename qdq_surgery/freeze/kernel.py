"""The integer product: oneDNN's int8 linear behind one operator of torch, with weights that are packed once.

oneDNN's packed weights are opaque: they have no storage, so that nothing of torch can copy, save or trace them. So they
stay in :class:`PackedWeight` objects, and what the operator takes is the number of one. That is why a frozen model runs
under ``torch.compile`` without options: the compiler sees an operator over plain tensors, and calls it as it is.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "PackedWeight", "integer_linear", "unsupported"]

#: What the results may be in.
DTYPES = (torch.float32, torch.bfloat16)

_NUMBERS = itertools.count()
_PACKED: weakref.WeakValueDictionary[int, PackedWeight] = weakref.WeakValueDictionary()


class PackedWeight:
    """The integers of a linear's weight in oneDNN's own layout. They never change, so that copies share them.

    They are packed when they are first multiplied by. What is loaded from a file is then not read before it is needed,
    as a float model's weights are not.

    Args:
        integers: int8, (out_features, in_features).

    Attributes:
        number: What :func:`integer_linear` takes for it.
        shape: (out_features, in_features).
    """

    def __init__(self, integers: Tensor) -> None:
        self.shape = (int(integers.shape[0]), int(integers.shape[1]))
        self._plain: Tensor | None = integers
        self._packed: Tensor | None = None
        self.zeros = torch.zeros(self.shape[0], dtype=torch.int64)
        self.number = next(_NUMBERS)
        _PACKED[self.number] = self

    @property
    def packed(self) -> Tensor:
        """In oneDNN's layout; the plain ones are given up for it."""
        # Two threads may both do it. The plain ones are looked at first, and go last: who finds none finds the others.
        plain, packed = self._plain, self._packed
        if packed is None:
            assert plain is not None
            packed = self._packed = torch.ops.onednn.qlinear_prepack(plain.contiguous(), None)
            self._plain = None
        return packed

    def integers(self) -> Tensor:
        """The integers as they were given, a new tensor."""
        plain = self._plain
        if plain is not None:
            return plain.clone(memory_format=torch.contiguous_format)
        dense: Tensor = self.packed.to_dense()
        return dense.t().contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of the integers."""
        return self.shape[0] * self.shape[1]

    def __deepcopy__(self, _: dict[int, Any]) -> PackedWeight:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeight, (self.integers(),)


_LIBRARY = torch.library.Library("qdq_surgery", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "integer_linear(Tensor input, Tensor weight, Tensor scale, Tensor? bias, Tensor step, int zero_point, "
    "ScalarType dtype, str post_op, str algorithm) -> Tensor"
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
        1.0,  # what results are rounded to, were they integers, and where 0 is among these
        0,
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
) -> Tensor:
    return input.new_empty((*input.shape[:-1], scale.shape[0]), dtype=dtype)


#: (input, weight, scale, bias, step, zero_point, dtype, post_op, algorithm) -> Tensor in ``dtype``:
#: ``post_op((input - zero_point) * step @ (integers * scale).T + bias)``. ``input`` is uint8, (..., in_features);
#: ``weight`` is the number of a :class:`PackedWeight`, int64, (); ``scale`` float32, (out_features,); ``step`` float32,
#: ().
integer_linear = torch.ops.qdq_surgery.integer_linear.default


@functools.cache
def unsupported(dtype: torch.dtype) -> str | None:
    """Why integer products do not run here with results in ``dtype``; ``None`` if they do.

    What decides is a product of the largest integers there are: it must be right to the last integer. (Instructions of
    CPUs before VNNI saturate.)
    """
    if dtype not in DTYPES:
        return f"their results are float32 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    rows = torch.tensor([[255], [0], [3]], dtype=torch.uint8).expand(3, 64).contiguous()
    columns = torch.tensor([[127], [-128], [5]], dtype=torch.int8).expand(3, 64).contiguous()
    wanted = (rows.int() - 128) @ columns.int().t()
    try:
        packed = PackedWeight(columns)
        ones = torch.ones(3)
        number = torch.tensor(packed.number)
        one = torch.tensor(1.0)
        found = integer_linear(rows, number, ones, None, one, 128, torch.float32, "none", "")
        integer_linear(rows, number, ones, None, one, 128, dtype, "gelu", "none")
    except (RuntimeError, NotImplementedError, AttributeError) as error:  # no oneDNN in this torch, or no such kernel
        words = " ".join(str(error).split())
        return f"torch {torch.__version__} has no int8 linear of oneDNN that runs on this machine ({words[:200]})"
    if not torch.equal(found.int(), wanted):
        return "oneDNN's int8 linear saturates on this machine, whose CPU has no instruction for the product (VNNI)"
    return None
