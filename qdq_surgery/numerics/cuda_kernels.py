"""The arithmetic of quantization in one pass over an NVIDIA GPU's memory, where torch's operators take eight.

Compiled by torch's jiterator when first called. The formulas are those of
:mod:`~qdq_surgery.numerics.fake_quant`, to the bit: a product, a rounding, a quotient, each rounded as float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["inside", "learned_gradients", "round_to_grid", "runs", "to_integers"]

_ROUND = """
template <typename T> T qdq_round(T x, T amax, T qmin, T qmax, T smallest) {
    T scale = amax <= smallest ? T(0) : qmax / amax;
    T integer = rintf(x * scale);
    integer = integer < qmin ? qmin : (integer > qmax ? qmax : integer);
    return integer / (scale == T(0) ? T(1) : scale);
}
"""

_INTEGERS = """
template <typename T> T qdq_integers(T x, T factor, T lowest, T highest, T zero) {
    T integer = rintf(x * factor);
    return zero + (integer < lowest ? lowest : (integer > highest ? highest : integer));
}
"""

_INSIDE = """
template <typename T> T qdq_inside(T gradient, T x, T amax) {
    return (x < T(0) ? -x : x) <= amax ? gradient : T(0);
}
"""

_LEARNED = """
template <typename T> void qdq_learned(T gradient, T x, T amax, T qmin, T qmax, T& of_x, T& of_amax) {
    T steps = x * (qmax / amax);
    T integer = rintf(steps);
    integer = integer < qmin ? qmin : (integer > qmax ? qmax : integer);
    of_x = (x < T(0) ? -x : x) <= amax ? gradient : T(0);
    of_amax = (steps >= qmin && x <= amax ? integer - steps : integer) * gradient;
}
"""


def runs(inputs: Tensor, amax: Tensor) -> bool:
    """Whether these can be used: on plain tensors of one NVIDIA GPU, and not on what stands for them in a trace."""
    return (
        inputs.is_cuda
        and amax.device == inputs.device
        and all(type(each) in (Tensor, nn.Parameter) for each in (inputs, amax))
        and inputs.dtype != torch.float64
        and inputs.ndim > 0
        and torch.version.hip is None
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def round_to_grid(inputs: Tensor, amax: Tensor, qmin: int, qmax: int, smallest: float) -> Tensor:
    """``inputs`` on the grid; shape and dtype of ``inputs``.

    Args:
        smallest: An ``amax`` up to this counts as 0.
    """
    limits = {"qmin": float(qmin), "qmax": float(qmax), "smallest": smallest}
    with torch.cuda.device_of(inputs):  # type: ignore[no-untyped-call]
        rounded: Tensor = _kernel(_ROUND, *limits)(inputs, _with_axes(amax, inputs), **limits)
    return rounded.to(inputs.dtype)


def to_integers(inputs: Tensor, factor: Tensor, lowest: int, highest: int, zero: int) -> Tensor:
    """``clamp(round(inputs * factor), lowest, highest) + zero``, float32.

    Args:
        factor: () or (channels,), those of the last axis.
    """
    numbers = {"lowest": float(lowest), "highest": float(highest), "zero": float(zero)}
    with torch.cuda.device_of(inputs):  # type: ignore[no-untyped-call]
        integers: Tensor = _kernel(_INTEGERS, *numbers)(inputs, _with_axes(factor, inputs), **numbers)
    return integers


def inside(gradient: Tensor, inputs: Tensor, amax: Tensor) -> Tensor:
    """``gradient`` where ``|inputs| <= amax``, 0 elsewhere; its shape and dtype."""
    with torch.cuda.device_of(inputs):  # type: ignore[no-untyped-call]
        kept: Tensor = _kernel(_INSIDE)(gradient, inputs, _with_axes(amax, inputs))
    return kept.to(gradient.dtype)


def learned_gradients(gradient: Tensor, inputs: Tensor, amax: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """:func:`inside`; and what each element adds to the gradient of the step, float32, not yet summed."""
    limits = {"qmin": float(qmin), "qmax": float(qmax)}
    with torch.cuda.device_of(inputs):  # type: ignore[no-untyped-call]
        of_inputs, of_amax = _kernel(_LEARNED, *limits, outputs=2)(gradient, inputs, _with_axes(amax, inputs), **limits)
    return of_inputs.to(gradient.dtype), of_amax


def _with_axes(amax: Tensor, inputs: Tensor) -> Tensor:
    """``amax`` in float32 with an axis: a single number would take half-precision inputs' dtype, and not they its."""
    return amax.float().reshape((1,) * inputs.ndim) if amax.numel() == 1 else amax.float()


@functools.cache
def _kernel(code: str, *numbers: str, outputs: int = 1) -> Callable[..., Any]:
    make = torch.cuda.jiterator
    given = dict.fromkeys(numbers, 0.0)
    if outputs == 1:
        return make._create_jit_fn(code, **given)
    return make._create_multi_output_jit_fn(code, outputs, **given)
