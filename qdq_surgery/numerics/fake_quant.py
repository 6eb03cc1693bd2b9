"""Fake quantization as pure functions: float in, the nearest point of the integer grid out.

Two formulas, as in pytorch-quantization 2.1.3:

- *legacy* (:func:`fake_quant`): multiplies by ``qmax / amax`` and divides by it again. Bit-equal to
  ``pytorch_quantization.tensor_quant.fake_tensor_quant`` in float32, outputs and gradients, but without its branches on
  the values of ``amax``, which no exporter can trace.
- *native* (:func:`native_fake_quant`): torch's own operators, which exporters turn into QuantizeLinear and
  DequantizeLinear. Always the full range [-2^(b-1), 2^(b-1) - 1], as ONNX has it.

While a model is exported by ``torch.onnx.export``, :func:`onnx_fake_quant` stands in for both: the ONNX operators
themselves.

Half precision is computed in float32 and rounded once, at the end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qdq_surgery.numerics import cuda_kernels
from qdq_surgery.numerics.grid import INT8, Grid
from qdq_surgery.safety.torch_private import onnx_flags

__all__ = [
    "SMALLEST_AMAX",
    "exporting_to_onnx",
    "fake_quant",
    "learned_fake_quant",
    "native_fake_quant",
    "native_quantize",
    "onnx_fake_quant",
    "quantize",
]

#: An amax up to the smallest positive float16 counts as 0: everything is quantized to 0.
SMALLEST_AMAX = 1.0 / (1 << 24)


def fake_quant(inputs: Tensor, amax: Tensor, grid: Grid = INT8) -> Tensor:
    """Round ``inputs`` to the grid that ``amax`` spans, by the legacy formula.

    Args:
        inputs: Any shape, floating point.
        amax: In the units of ``inputs``, >= 0; shape () or one that broadcasts to ``inputs``.
        grid: Whose limits become the ends.

    Returns:
        Shape and dtype of ``inputs``. The gradient passes where ``|inputs| <= amax`` and is 0 elsewhere
        (straight-through estimation with clipping); ``amax`` gets none. (What ``torch.jit.trace`` makes is for
        inference: it holds the arithmetic alone, the same with gradients on and off, and can be saved.)
    """
    if torch.is_grad_enabled() and (inputs.requires_grad or amax.requires_grad) and not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        result: Tensor = _FakeQuant.apply(inputs, amax, grid.qmin, grid.qmax)  # type: ignore[no-untyped-call]
        return result
    return _round_to_grid(inputs, amax, grid.qmin, grid.qmax)


def quantize(inputs: Tensor, amax: Tensor, grid: Grid = INT8) -> Tensor:
    """The integers, as floats, that :func:`fake_quant` multiplies by the step size; 0 where ``amax`` counts as 0.

    Args and shapes as there; for what is stored rather than simulated, such as the weights of an ONNX file.
    """
    return _integers(inputs, amax, grid.qmin, grid.qmax)[0]


def native_quantize(inputs: Tensor, amax: Tensor, grid: Grid = INT8) -> Tensor:
    """The integers, as floats, that :func:`native_fake_quant` multiplies by the step size."""
    return _native_grid(inputs, grid.step(amax)).clamp(grid.full.qmin, grid.qmax)


def learned_fake_quant(inputs: Tensor, amax: Tensor, grid: Grid = INT8) -> Tensor:
    """:func:`fake_quant` with a gradient for ``amax`` too: learned step sizes (LSQ, arXiv 1902.08153).

    The paper's step size is ``amax / qmax``; its gradient is weighted by 1 / sqrt(elements per range * qmax), so that
    ranges learn at the pace of weights.
    """
    result: Tensor = _LearnedFakeQuant.apply(inputs, amax, grid.qmin, grid.qmax)  # type: ignore[no-untyped-call]
    return result


def native_fake_quant(inputs: Tensor, amax: Tensor, grid: Grid = INT8) -> Tensor:
    """Round ``inputs`` to the full grid that ``amax`` spans, by torch's own operators.

    Args:
        amax: One value, or one per channel with 1 in every other axis.
        grid: Taken with its lowest integer, whether or not it is narrow.

    Returns:
        Shape and dtype of ``inputs``.

    Raises:
        TypeError: ``amax`` varies over more than one axis.
    """
    qmin, qmax = grid.full.qmin, grid.qmax
    work = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
    scale = grid.step(amax.float())
    axis = _channel_axis(amax, inputs.ndim)
    if torch.compiler.is_compiling():
        # The operator with a tensor as scale has no shape function, so no exporter can trace it: this is its formula.
        if torch.is_grad_enabled() and inputs.requires_grad:
            traced: Tensor = _TracedNative.apply(work, scale, qmin, qmax)  # type: ignore[no-untyped-call]
        else:
            traced = _native_grid(work, scale).clamp(qmin, qmax) * scale
        return traced.to(inputs.dtype)
    if axis is None:
        # The tensor form of the operator: the scale stays on its device.
        zero_point = torch.zeros((), dtype=torch.int32, device=inputs.device)
        outputs = torch.fake_quantize_per_tensor_affine(work, scale.reshape(()), zero_point, qmin, qmax)
    else:
        zero_points = torch.zeros(amax.numel(), dtype=torch.int32, device=inputs.device)
        outputs = torch.fake_quantize_per_channel_affine(work, scale.reshape(-1), zero_points, axis, qmin, qmax)
    return outputs.to(inputs.dtype)


def exporting_to_onnx(inputs: Tensor | None = None) -> bool:
    """Whether ``torch.onnx.export`` (with ``dynamo=True``, its default) is tracing right now.

    Args:
        inputs: Whether it is tracing these. torch's flags are the process's: in another thread that a model runs in
            meanwhile they are set, too.
    """
    if not torch.compiler.is_compiling():
        return False
    if inputs is not None and type(inputs) in (Tensor, nn.Parameter) and not torch.compiler.is_dynamo_compiling():
        return False
    # The exporter's second try goes through dynamo, where torch.onnx.is_in_onnx_export() is a constant False: what was
    # refused in the first try would be exported as plain arithmetic. So the flag behind it is read where there is one.
    return bool(getattr(onnx_flags, "_is_onnx_exporting", False)) or torch.onnx.is_in_onnx_export()


def onnx_fake_quant(inputs: Tensor, amax: Tensor, grid: Grid = INT8) -> Tensor:
    """QuantizeLinear and DequantizeLinear with an explicit zero point. Only while :func:`exporting_to_onnx`.

    Raises:
        ValueError: The grid does not have 8 bits, which is what these operators have in every opset.
        TypeError: ``amax`` varies over more than one axis.
    """
    if grid.bits != 8:
        raise ValueError(f"ONNX's QuantizeLinear has 8 bits, this quantizer has {grid.bits}; disable it for the export")
    kind = torch.uint8 if grid.unsigned else torch.int8
    axis = _channel_axis(amax, inputs.ndim)
    shape = () if axis is None else (amax.numel(),)
    work = inputs.float()
    scale = grid.step(amax.float()).reshape(shape)
    zero_point = torch.full(shape, grid.zero_point, dtype=kind, device=inputs.device)
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    integers = torch.onnx.ops.symbolic(
        "QuantizeLinear", (work, scale, zero_point), attributes, dtype=kind, shape=inputs.shape
    )
    outputs = torch.onnx.ops.symbolic(
        "DequantizeLinear", (integers, scale, zero_point), attributes, dtype=torch.float32, shape=inputs.shape
    )
    return outputs.to(inputs.dtype)


def _channel_axis(amax: Tensor, rank: int) -> int | None:
    """The axis of a tensor of so many along which ``amax``, as it broadcasts, varies; ``None`` for a single value."""
    axes = [axis for axis, size in enumerate(amax.shape, rank - amax.ndim) if size != 1]
    if len(axes) > 1:
        raise TypeError(f"one axis can have ranges of its own, but amax has the shape {tuple(amax.shape)}")
    return axes[0] if axes else None


def _round_to_grid(inputs: Tensor, amax: Tensor, qmin: int, qmax: int) -> Tensor:
    if amax.device != inputs.device:
        amax = amax.to(inputs.device)  # torch divides by a number of the CPU as by its reciprocal, which rounds twice
    if cuda_kernels.runs(inputs, amax):
        return cuda_kernels.round_to_grid(inputs, amax, qmin, qmax, SMALLEST_AMAX)
    integers, inv_scale = _integers(inputs, amax, qmin, qmax)
    return integers.div_(torch.where(inv_scale == 0, 1.0, inv_scale)).to(inputs.dtype)


def _integers(inputs: Tensor, amax: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    work = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
    amax = amax.float()
    # pytorch-quantization calls this "scale"; it is the reciprocal of ONNX's.
    # (A Python number divided by a tensor would be a product with the reciprocal, which rounds twice.)
    inv_scale = torch.where(amax <= SMALLEST_AMAX, 0.0, torch.full_like(amax, qmax) / amax)
    # In place: what costs is memory that is touched for the first time.
    return (work * inv_scale).round_().clamp_(qmin, qmax), inv_scale


# What is traced takes the grid's limits, which are plain numbers, and not the grid.
class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, amax: Tensor, qmin: int, qmax: int) -> Tensor:
        ctx.save_for_backward(inputs, amax)
        return _round_to_grid(inputs, amax, qmin, qmax)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        inputs, amax = ctx.saved_tensors
        (gradient,) = gradients
        return _inside(gradient, inputs, amax), None, None, None


def _inside(gradient: Tensor, inputs: Tensor, amax: Tensor) -> Tensor:
    """``gradient`` where ``|inputs| <= amax``, 0 elsewhere."""
    on_cpu = inputs.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and amax.numel() == 1 and inputs.dtype == gradient.dtype == torch.float32:
        # One pass over memory instead of three. This operator's bounds lie outside, amax inside. (It also lets the
        # gradient of a NaN pass, whose value has spoiled the loss by then.)
        bound = torch.nextafter(amax.float(), torch.tensor(math.inf)).item()
        kept: Tensor = torch.ops.aten.hardtanh_backward(gradient, inputs, -bound, bound)
        return kept
    if cuda_kernels.runs(inputs, amax):
        return cuda_kernels.inside(gradient, inputs, amax)
    # In float32: a 0-dimensional amax would be rounded to the dtype of half-precision inputs.
    return torch.where(inputs.abs().float() <= amax.float(), gradient, 0.0)


class _LearnedFakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, amax: Tensor, qmin: int, qmax: int) -> Tensor:
        ctx.save_for_backward(inputs, amax)
        ctx.limits = qmin, qmax
        return _round_to_grid(inputs, amax, qmin, qmax)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        inputs, amax = ctx.saved_tensors
        (gradient,) = gradients
        qmin, qmax = ctx.limits
        weight = 1.0 / (qmax * math.sqrt(qmax * max(inputs.numel(), 1) / amax.numel()))
        if cuda_kernels.runs(inputs, amax):
            of_inputs, of_amax = cuda_kernels.learned_gradients(gradient, inputs, amax, qmin, qmax)
            return of_inputs, of_amax.sum_to_size(amax.shape) * weight, None, None
        work = inputs.float()
        steps = work * (qmax / amax)
        integers = steps.round().clamp_(qmin, qmax)
        # Inside the grid the step's gradient is the rounding error, outside it is the grid's end (in steps).
        slope = torch.where((steps >= qmin) & (work <= amax), integers - steps, integers).mul_(gradient)
        total = slope.sum_to_size(amax.shape)
        return _inside(gradient, inputs, amax), total * weight, None, None


def _native_grid(work: Tensor, scale: Tensor) -> Tensor:
    """Integers before clamping; 0 where the range is 0."""
    usable = scale >= torch.finfo(torch.float32).tiny
    return (work * torch.where(usable, 1.0 / scale, 0.0)).round()


class _TracedNative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        integers = _native_grid(work, scale)
        ctx.save_for_backward((integers >= qmin) & (integers <= qmax))
        return integers.clamp(qmin, qmax) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        (gradient,) = gradients
        return gradient * inside, None, None, None
