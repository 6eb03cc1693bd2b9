"""What the file needs to know of each quantizer, and whether the file can hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from qdq_surgery.errors import CalibrationError, ExportError
from qdq_surgery.graph.operators import PRODUCTS
from qdq_surgery.match.site_names import LINEAR_NAMES
from qdq_surgery.numerics.channel_scales import channel_scale
from qdq_surgery.numerics.fake_quant import SMALLEST_AMAX, native_quantize, quantize
from qdq_surgery.numerics.grid import Grid
from qdq_surgery.quantize.embedding import QuantEmbedding
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.surgery.model_state import quantizers, refuse_broken
from qdq_surgery.targets.target import Target

__all__ = ["QParams", "read_qparams"]

#: How many names a message holds.
_SHOWN = 12

#: The scale of a range that is 0, for which PyTorch rounds every value to 0: a step so large that each is nearest
#: to 0, and that half precision holds, times the scale of another tensor too.
_NO_RANGE = np.float32(4096.0)


@dataclass(frozen=True)
class QParams:
    """What QuantizeLinear and DequantizeLinear need to know of one quantizer.

    Attributes:
        name: The quantizer's qualified name.
        role: ``"input"`` or ``"weight"``.
        amax: float32, of one value or one for each channel; ``None`` for a weight whose range is that of its values.
        axis: The per-channel axis, from the end where it is negative; ``None`` for one range.
        grid: Its integers.
        native: Whether the model rounds by the native formula (``use_fb_fake_quant``).
        channels: float32, (channels,): what an activation is divided by, channel by channel, before it is rounded, and
            what the columns of a weight are multiplied by; ``None``: nothing.
        taken_back: Whether the weight behind an activation is multiplied by ``channels``, so that nothing else has to
            be.
        alone: Whether a weight is multiplied by ``channels``, and no pair divides what it is multiplied with by them.
        rounding: int8, shape of the weight: how many steps each of its values is moved by before it is rounded;
            ``None``: by none.
        table: Whether it is of an embedding's table, whose rows are looked up.
    """

    name: str
    role: str
    amax: NDArray[np.float32] | None
    axis: int | None
    grid: Grid
    native: bool
    channels: NDArray[np.float32] | None = None
    taken_back: bool = False
    alone: bool = False
    rounding: NDArray[np.int8] | None = None
    table: bool = False

    def scale(self, amax: NDArray[np.float32]) -> NDArray[np.float32]:
        """ONNX's scale for ``amax``, float32, same shape, > 0."""
        ranges = amax.astype(np.float32)
        scale = self.grid.step(ranges).astype(np.float32)
        none = scale < np.finfo(np.float32).tiny if self.native else ranges <= np.float32(SMALLEST_AMAX)
        found: NDArray[np.float32] = np.where(none, _NO_RANGE, scale)
        return found

    def largest(self) -> float:
        """The largest value that it lets pass; 0 where its range is that of its values."""
        top = 0.0 if self.amax is None else float(self.amax.max())
        return top if self.channels is None or self.role == "weight" else top * float(self.channels.max())

    def amax_of(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The range, shape () or (channels,); of the values themselves where none is fixed."""
        if self.amax is not None:
            return self.amax
        if self.axis is None:
            return np.asarray(np.abs(values).max(), dtype=np.float32)
        others = tuple(axis for axis in range(values.ndim) if axis != self.axis % values.ndim)
        found: NDArray[np.float32] = np.abs(values).max(axis=others).astype(np.float32)
        return found

    def integers(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """Constant ``values`` on the grid, by the formula by which the model itself rounds them."""
        amax = self.amax_of(values)
        if self.axis is not None:
            amax = amax.reshape([-1 if axis == self.axis % values.ndim else 1 for axis in range(values.ndim)])
        work, ranges = torch.from_numpy(np.ascontiguousarray(values)), torch.from_numpy(np.asarray(amax))
        if self.rounding is not None:
            work = work + torch.from_numpy(self.rounding) * self.grid.step(ranges)
        found = (native_quantize if self.native else quantize)(work, ranges, self.grid)
        return found.to(getattr(torch, integer_type(self.grid).name)).numpy()


def integer_type(grid: Grid) -> np.dtype[Any]:
    """NumPy's type of a grid's integers, which ONNX has, too."""
    assert grid.onnx_type is not None
    return np.dtype(grid.onnx_type.lower())


def read_qparams(qmodel: PreTrainedModel, target: Target) -> dict[str, QParams]:
    """Those of all quantizers that do something, by name.

    Raises:
        CalibrationError: Some have no range, or are collecting; names them all.
        ExportError: Some have a grid that the target's operators lack; names them all.
    """
    acting = {name: each for name, each in quantizers(qmodel).items() if each.enabled and each._if_quant}
    collecting = [name for name, each in quantizers(qmodel).items() if each.enabled and each._if_calib]
    if collecting:
        raise CalibrationError(
            f"{_some(collecting)} in the middle of calibration; load their ranges and call disable_calib() first"
        )
    _check_ranges(acting)
    _refuse(acting, target)
    refuse_broken(qmodel)
    found = {name: _qparams(name, each) for name, each in acting.items()}
    _refuse_axes(found, acting, target)
    for name, linear in qmodel.named_modules():
        if isinstance(linear, QuantLinear):
            _pass_scale(found, f"{name}.{LINEAR_NAMES['input']}", f"{name}.{LINEAR_NAMES['weight']}", linear)
    tables = [f"{n}.{LINEAR_NAMES['weight']}" for n, each in qmodel.named_modules() if isinstance(each, QuantEmbedding)]
    return {**found, **{name: _of_table(found[name], target) for name in tables if name in found}}


def _refuse_axes(found: dict[str, QParams], acting: dict[str, TensorQuantizer], target: Target) -> None:
    """What goes into a product of integers has one scale, and a linear's weight one for each output channel.

    Raises:
        ExportError: Some have others, or an activation elsewhere has some where the target takes them for weights only.
    """
    for name, own in found.items():
        if own.axis is None:
            continue
        operator = _operator(name, acting[name])
        fix = "write axis: null, or axis: -1 for a scale for each channel, in its spec"
        if own.role == "weight":
            if operator == "linear" and own.axis == -1:
                raise ExportError(
                    f"{name} has a range for each input channel of a linear, over which an integer product sums; write "
                    "axis: 0 in its spec"
                )
        elif operator in PRODUCTS:
            raise ExportError(
                f"{name} has ranges along an axis of what goes into a {operator}, and runtimes multiply integers with "
                f"one scale for all of them; {fix}"
            )
        elif not target.activation_axes:
            raise ExportError(
                f"{name} has ranges along an axis of an activation, and {target.title} takes them for weights; {fix}"
            )


def _operator(name: str, quantizer: TensorQuantizer) -> str:
    """Of which operator it quantizes an operand, as far as is known of one that was put in by hand."""
    if quantizer.provenance is not None:
        return quantizer.provenance.operand.partition("(")[0]
    return "linear" if name.rpartition(".")[2] in LINEAR_NAMES.values() else ""


def _of_table(qparams: QParams, target: Target) -> QParams:
    """The same, of an embedding's table.

    Raises:
        ExportError: The target has no form for its rows.
    """
    if not target.int8_rows:
        raise ExportError(
            f"{qparams.name} is of an embedding's table, and {target.name} takes tables in float only; disable it for "
            f"the export, or convert by the rules {target.name}"
        )
    if qparams.axis not in (None, -2):
        raise ExportError(
            f"{qparams.name} has a range for each column of an embedding's table, and files have one for each row; "
            "write axis: 0 in its spec"
        )
    return replace(qparams, table=True)


def _pass_scale(found: dict[str, QParams], activation: str, weight: str, linear: QuantLinear) -> None:
    """What a linear's input is divided by, its weight takes back; where it is off, the weight alone has the scale."""
    scale = linear.channel_scale
    if scale is not None and weight in found:
        channels, divides = scale.float().cpu().numpy(), activation in found
        found[weight] = replace(found[weight], channels=channels, alone=not divides)
        if divides:
            found[activation] = replace(found[activation], taken_back=True)


def _check_ranges(acting: dict[str, TensorQuantizer]) -> None:
    # A weight is a constant: so is its range.
    without = [name for name, each in acting.items() if each.amax is None and _role(name, each) != "weight"]
    if without:
        names = "\n  ".join(without)
        count = f"{len(without)} quantizers have" if len(without) > 1 else "a quantizer has"
        raise CalibrationError(
            f"{count} no range; calibrate the model (qdq_surgery.calibrate), or disable them:\n  {names}"
        )
    broken = [
        name for name, each in acting.items() if each.amax is not None and not bool(torch.isfinite(each.amax).all())
    ]
    if broken:
        raise CalibrationError(f"{_some(broken)} without a finite range; calibrate the model again")


def _refuse(acting: dict[str, TensorQuantizer], target: Target) -> None:
    def refuse(names: Sequence[str], what: str, fix: str) -> None:
        if names:
            raise ExportError(f"{_some(names)} {what}; {fix}")

    refuse(
        [name for name, each in acting.items() if each.grid.bits != 8],
        "of another width than the 8 bits of QuantizeLinear",
        "disable them for the export, or convert with num_bits: 8",
    )
    refuse(
        [name for name, each in acting.items() if not each._fake_quant or each._learn_amax or each._if_clip],
        "in a mode of pytorch-quantization that is no fake quantization to a fixed range",
        "set the ranges with qdq_surgery.calibrate or learn_ranges instead",
    )
    refuse(
        [name for name, each in acting.items() if each.grid.narrow_range and _role(name, each) != "weight"],
        "with narrow_range on an activation, which QuantizeLinear does not know (it clips at -128)",
        "convert with narrow_range: false",
    )
    if not target.unsigned:
        refuse(
            [name for name, each in acting.items() if each.grid.unsigned],
            f"with an unsigned grid, and {target.name} has only symmetric ones",
            "convert with unsigned: false",
        )
    refuse(
        [name for name, each in acting.items() if each.amax is not None and _axes(each.amax) > 1],
        "with ranges along more than one axis",
        "one axis can have ranges of its own",
    )


def _qparams(name: str, quantizer: TensorQuantizer) -> QParams:
    if quantizer.scaled and quantizer.amax is not None:
        ranges = quantizer.amax.detach().float().cpu()
        scale = channel_scale(ranges)
        channels = None if bool((scale == 1).all()) else scale.numpy()
        native = bool(quantizer.use_fb_fake_quant)
        return QParams(name, quantizer.role, ranges.min().numpy(), None, quantizer.grid, native, channels)
    amax, axes = quantizer.amax, quantizer.axes
    axis = axes[0] if axes is not None and len(axes) == 1 else None
    if amax is not None:
        amax = amax.detach().float().cpu()
        wide = [at for at, size in enumerate(amax.shape) if size != 1]
        axis = wide[0] - amax.ndim if wide else None  # as it broadcasts
        amax = amax.reshape(-1) if wide else amax.reshape(())
    values = None if amax is None else amax.numpy()
    rounding = None if quantizer.rounding is None else quantizer.rounding.cpu().numpy()
    native = bool(quantizer.use_fb_fake_quant)
    return QParams(name, _role(name, quantizer), values, axis, quantizer.grid, native, rounding=rounding)


def _role(name: str, quantizer: TensorQuantizer) -> str:
    """One that was put in by hand tells by its name."""
    return "weight" if quantizer.provenance is None and name.endswith("weight_quantizer") else quantizer.role


def _axes(amax: Tensor) -> int:
    return sum(size != 1 for size in amax.shape)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names)} quantizers ({shown}) are" if len(names) > 1 else f"the quantizer {shown} is"
