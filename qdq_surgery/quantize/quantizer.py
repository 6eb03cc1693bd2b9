"""The quantizer: pytorch-quantization's ``TensorQuantizer`` without the defects that keep it from a CPU or an exporter.

It is a subclass, so that ``isinstance`` checks and loops written for QDQBERT work. What differs from version 2.1.3:
a state dict with ranges loads into a fresh model on any device; ``amax`` stays float32 on the model's device when the
model is cast; float16 and bfloat16 are quantized; nothing is logged; the scale comes from a buffer, so that it can be
traced; and each quantizer knows the rule that put it there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pytorch_quantization import calib, tensor_quant
from pytorch_quantization import nn as quant_nn
from torch import Tensor, nn

from qdq_surgery.errors import CalibrationError, NegativeValueError
from qdq_surgery.numerics.channel_scales import channel_scale
from qdq_surgery.numerics.fake_quant import (
    exporting_to_onnx,
    fake_quant,
    learned_fake_quant,
    native_fake_quant,
    native_quantize,
    onnx_fake_quant,
    quantize,
)
from qdq_surgery.numerics.grid import Grid
from qdq_surgery.quantize.calibrators import (
    OWN_CALIBRATORS,
    ChannelCalibrator,
    HistogramCalibrator,
    MaxCalibrator,
)
from qdq_surgery.quantize.descriptors import grid_of, kept_axes
from qdq_surgery.quantize.export_node import tag
from qdq_surgery.quantize.misfits import range_misfit, scales_misfit
from qdq_surgery.quantize.provenance import Provenance
from qdq_surgery.rules.quant_spec import QuantSpec

__all__ = ["SMALLEST_LEARNED", "TensorQuantizer"]

#: A learned range does not fall below this.
SMALLEST_LEARNED = 1e-6

#: What every module has of its own: tables of parameters, children and hooks, and their types.
_TABLES = {name: type(value) for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))}


class TensorQuantizer(quant_nn.TensorQuantizer):  # type: ignore[misc]
    """A fake quantizer with a calibrator.

    Args:
        descriptor: As pytorch-quantization defines it.
        spec: The spec it was made from; its calibrator's method is what :meth:`load_calib_amax` uses by itself.
        provenance: Why it is where it is.
        device: Where ranges that are loaded or computed later go; follows ``.to(device)``.
    """

    _amax: Tensor
    _calibrator: Any
    #: There is nothing here for transformers to initialize when it loads a model.
    _is_hf_initialized = True
    #: Who lets everything pass for a while, see :meth:`hold_off`; a copy has none.
    _holders: dict[int, None] | None = None
    #: Whether a tensor on another device was looked at since the range was set, and had no negative value.
    _never_negative = False
    #: The descriptor that a rule's ``default`` meant when this was made; ``None`` where a spec says it all.
    default: tensor_quant.QuantDescriptor | None = None

    def __init__(
        self,
        descriptor: tensor_quant.QuantDescriptor,
        *,
        spec: QuantSpec | None = None,
        provenance: Provenance | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(descriptor)
        self.spec, self.provenance = spec, provenance
        self._learns = False
        self._device = torch.device("cpu") if device is None else device
        if hasattr(self, "_amax"):  # the descriptor's own
            fixed = self._amax
            del self._amax
            self.set_range(fixed)
        if type(self._calibrator) is calib.MaxCalibrator:
            self._calibrator = self.fresh_calibrator(histogram=False)
        elif type(self._calibrator) is calib.HistogramCalibrator:
            self._calibrator = self.fresh_calibrator(histogram=True)

        if spec is not None and spec.axis is not None and spec.calibrator.by_channel is not None:
            self._calibrator = ChannelCalibrator(
                spec.num_bits, spec.axis, spec.unsigned, spec.narrow_range, spec.calibrator.name
            )

    def fresh_calibrator(self, histogram: bool) -> MaxCalibrator | HistogramCalibrator:
        """An empty calibrator for this quantizer: of histograms, or of maxima (also where each channel has its own)."""
        if not histogram or self._axis is not None:
            return MaxCalibrator(self._num_bits, self._axis, self._unsigned, zero_point=self.grid.zero_point)
        bins = None if self.spec is None else self.spec.calibrator.num_bins
        given = () if bins is None else (bins,)
        return HistogramCalibrator(self._num_bits, None, self._unsigned, *given, zero_point=self.grid.zero_point)

    @property
    def grid(self) -> Grid:
        """The integers that it rounds to."""
        return grid_of(self)

    @property
    def axes(self) -> tuple[int, ...] | None:
        """The axes along which each channel has its own range; ``None``: one range for the whole tensor."""
        return kept_axes(self._axis)

    @property
    def scaled(self) -> bool:
        """Whether each channel of what it sees has a scale, so that they share one step: its rule says ``axis: -1``."""
        return self.spec is not None and self.spec.scaled

    @property
    def channel_scale(self) -> Tensor | None:
        """What each channel is divided by before it is rounded, (channels,); ``None``: nothing, or it has no range."""
        amax = self.amax
        return channel_scale(amax.detach()) if self.scaled and amax is not None else None

    @property
    def rounding(self) -> Tensor | None:
        """By how many steps each value is moved before it is rounded, int8, shape of the weight; ``None``: by none.

        Set by :func:`qdq_surgery.round_weights`, and gone with the range that it was found for.
        """
        own: Tensor | None = self._buffers.get("_rounding")
        return own

    def set_rounding(self, steps: Tensor | None) -> None:
        """Set :attr:`rounding`.

        Args:
            steps: int8, shape of the weight; ``None``: each value goes to the nearest integer.
        """
        if "_rounding" in self._buffers:
            del self._rounding
        if steps is not None:
            with torch.inference_mode(False):  # a buffer is copied and broadcast later
                self.register_buffer("_rounding", steps.clone() if steps.is_inference() else steps)

    def moved(self, values: Tensor) -> Tensor:
        """``values`` before they are rounded: moved by :attr:`rounding`, in float32; without one, as they are."""
        amax, steps = self.amax, self.rounding
        if amax is None or steps is None:
            return values
        moved = values.float() + steps * self.grid.step(amax.detach())
        return moved.clamp(min=0) if self.grid.unsigned and not self.grid.zero_point else moved

    def integers(self, values: Tensor) -> Tensor:
        """The integers nearest to ``values``, as floats; those that it rounds to if the values were :meth:`moved`.

        Raises:
            CalibrationError: There is none.
        """
        if self.amax is None:
            raise CalibrationError(f"{self._name()} has no range: calibrate the model first")
        formula = native_quantize if self.use_fb_fake_quant else quantize
        return formula(values, self.amax.detach(), self.grid)

    @property
    def quantizes(self) -> bool:
        """Whether what passes is rounded."""
        return self.enabled and bool(self._if_quant)

    @property
    def role(self) -> str:
        """``"weight"`` for what is constant, in a linear or anywhere else, ``"input"`` for what is computed."""
        return "input" if self.provenance is None else self.provenance.role

    @property
    def enabled(self) -> bool:
        """Whether it does anything."""
        return not self._disabled and not self.held_off

    @property
    def held_off(self) -> bool:
        """Whether it lets everything pass for a while, see :meth:`hold_off`."""
        return bool(self._holders)

    def hold_off(self, holder: int) -> None:
        """Let everything pass until ``holder``, and whoever else holds it off, lets go. A calibrator still sees it."""
        # Single operations of a dict, which no thread comes between. A lock would stay locked after an interrupt.
        self.__dict__.setdefault("_holders", {})[holder] = None

    def let_go(self, holder: int) -> None:
        """The end of :meth:`hold_off` by the same ``holder``; also where there was no beginning."""
        self.__dict__.setdefault("_holders", {}).pop(holder, None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_holders"}

    def set_range(self, amax: Tensor) -> None:
        """Set ``amax``, of whatever shape; a range that is learned stays the same parameter if its shape does.

        Values are rounded to the nearest integer from then on: :attr:`rounding` was for the range before.

        Raises:
            ValueError: It is negative somewhere, or zero where each channel has a scale.
        """
        amax = amax.detach()
        if not amax.is_meta and bool((amax < 0).any()):
            raise ValueError(f"a range cannot be negative, found {float(amax.min())}")
        if self.scaled and not amax.is_meta and not bool(amax.all()):
            raise ValueError("a scale per channel needs a range above 0 in each, found 0")
        self._never_negative = False
        self.set_rounding(None)
        # Outside of inference mode, so that the buffer can be saved for a backward pass later.
        with torch.inference_mode(False):
            if not hasattr(self, "_amax") or self._amax.shape != amax.shape:
                self.reset_amax()
                self.register_buffer("_amax", torch.empty(amax.shape, dtype=torch.float32, device=self._device))
            self._amax.data.copy_(amax)

    def misfit(
        self, shape: Sequence[int], weight: Sequence[int] | None = None, channels: int | None = None
    ) -> str | None:
        """Why a range of this shape cannot be this quantizer's; ``None`` if it can.

        Args:
            shape: That of the range.
            weight: The shape of the weight that it quantizes, if that is known.
            channels: How many channels what it sees has, if that is known.
        """
        return scales_misfit(shape, channels) if self.scaled else range_misfit(shape, self.axes, weight)

    def settle(self, device: torch.device, training: bool, amax: Tensor | None, rounding: Tensor | None = None) -> None:
        """Take the place that a module has in a model that was just loaded.

        Args:
            device: Where its range belongs, a fixed one or one that is loaded or computed later.
            training: The module's mode.
            amax: From a checkpoint: float32, checked already, of whatever shape, and this quantizer's own. ``None``:
                the range stays.
            rounding: The same for :attr:`rounding`.
        """
        own = self.__dict__  # nn.Module's way to set an attribute takes longer than all the rest
        own["training"], own["_device"] = training, device
        if amax is not None:
            if self.amax is not None:
                self.reset_amax()
            self._buffers["_amax"] = amax if amax.device == device else amax.to(device)
            self._learn_by_rule()
        elif self.amax is not None and self._amax.device != device:
            self.to(device)
        if rounding is not None:
            self.set_rounding(rounding.to(device))

    def sibling(self, provenance: Provenance) -> TensorQuantizer:
        """A new quantizer of the same make at the place ``provenance``: the constructor's, in a tenth of its time.

        Only for one that was never used, and has neither a range nor a clip.
        """
        made = TensorQuantizer.__new__(TensorQuantizer)
        own = made.__dict__
        own.update(vars(self))
        own.pop("_holders", None)
        for name, kind in _TABLES.items():
            own[name] = kind()
        own["provenance"] = provenance
        if isinstance(self._calibrator, ChannelCalibrator):
            own["_calibrator"] = copy.deepcopy(self._calibrator)
        elif self._calibrator is not None:
            own["_calibrator"] = self.fresh_calibrator(isinstance(self._calibrator, HistogramCalibrator))
        return made

    @property
    def amax(self) -> Tensor | None:
        """The range, float32, in the units of the tensor; ``None`` while it is found anew for each tensor."""
        own: Tensor | None = self._buffers.get("_amax", self._parameters.get("_amax"))
        return own

    @amax.setter
    def amax(self, value: Tensor | float | list[float]) -> None:
        if value is None:
            raise TypeError("amax cannot be set to None; call reset_amax() to find the range anew for each tensor")
        amax = torch.as_tensor(value)
        known = self.amax
        if known is not None and known.shape != amax.shape:
            raise TypeError(
                f"amax has the shape {tuple(known.shape)}, found {tuple(amax.shape)}; call reset_amax() first"
            )
        self.set_range(amax)

    def reset_amax(self) -> None:
        """Forget the range: it is found anew for each tensor, and not learned."""
        self._learns = False
        self.set_rounding(None)
        if hasattr(self, "_amax"):
            del self._amax

    @property
    def learns(self) -> bool:
        """Whether the range is a parameter that training moves."""
        return self._learns

    def learn_amax(self, learn: bool = True) -> None:
        """Make the range a parameter (``learn``), or fix it again. Its name in a state dict stays.

        Raises:
            CalibrationError: There is no range to start from.
        """
        amax = self.amax
        if amax is None:
            if learn:
                raise CalibrationError(f"{self._name()} has no range to learn from: calibrate the model first")
            return
        if learn == self._learns:
            return
        self._learns = learn
        del self._amax
        with torch.inference_mode(False):  # as in set_range
            if learn:
                self._amax = nn.Parameter(amax.detach().clone())
            else:
                self.register_buffer("_amax", amax.detach().clone())

    def _learn_by_rule(self) -> None:
        if self.spec is not None and self.spec.learn and self.amax is not None:
            self.learn_amax()

    def _name(self) -> str:
        return "a quantizer" if self.provenance is None else self.provenance.quantizer

    @property
    def step_size(self) -> Tensor | None:
        """ONNX's scale: the distance of two neighbors on the grid; ``None`` without a range."""
        amax = self.amax
        return None if amax is None else self.grid.step(amax)

    def enable_calib(self) -> None:
        """Collect statistics from now on.

        Raises:
            ValueError: There is no calibrator, as in pytorch-quantization.
        """
        if self._calibrator is None:
            raise ValueError("this quantizer has no calibrator")
        self._if_calib = True

    def disable_calib(self) -> None:
        """Collect no more statistics; those that were collected stay."""
        self._if_calib = False

    def enable_quant(self) -> None:
        """Quantize from now on."""
        self._if_quant = True

    def disable_quant(self) -> None:
        """Let values pass from now on; statistics are collected as before."""
        self._if_quant = False

    def load_calib_amax(self, *args: Any, **kwargs: Any) -> None:
        """Take the range from the calibrator.

        Args:
            args, kwargs: For the calibrator's ``compute_amax``. Left out, the rule's own method is used.
            strict: Whether to raise, rather than set NaN, when the calibrator has seen nothing.

        Raises:
            RuntimeError: There is no calibrator, it has seen nothing, or there is a scale per channel.
        """
        strict = kwargs.pop("strict", True)
        calibrator = getattr(self, "_calibrator", None)
        if calibrator is None:
            raise RuntimeError("this quantizer has no calibrator")
        if self.scaled:
            raise RuntimeError(
                f"{self._name()} has a scale per channel, on which its linear's weight depends: call "
                "qdq_surgery.calibrate, which finds both"
            )
        own = None if self.spec is None or args or "method" in kwargs else self.spec.calibrator
        if own is not None and own.name != "histogram" and isinstance(calibrator, calib.HistogramCalibrator):
            percentile = {} if own.percentile is None else {"percentile": own.percentile}
            kwargs = {"method": own.name, **percentile, **kwargs}
        empty = isinstance(calibrator, HistogramCalibrator) and calibrator.histogram is None
        amax = None if empty else calibrator.compute_amax(*args, **kwargs)
        if amax is None:
            if strict:
                where = f" ({self.provenance.operand}, rule {self.provenance.rule})" if self.provenance else ""
                raise RuntimeError(
                    f"this quantizer's calibrator{where} has seen no tensor: run data through the model between "
                    "enable_calib() and load_calib_amax(), or pass strict=False"
                )
            amax = torch.tensor(math.nan)
        self.set_range(self.limited(torch.as_tensor(amax)))
        self._learn_by_rule()

    def limited(self, amax: Tensor) -> Tensor:
        """``amax``, or the spec's ``max_amax`` where that is less."""
        return amax if self.spec is None or self.spec.max_amax is None else amax.clamp(max=self.spec.max_amax)

    def forward(self, inputs: Tensor) -> Tensor:
        """Calibrate on ``inputs``, quantize them, both or neither, as enabled.

        Returns:
            Shape and dtype of ``inputs``, which pass as they are where nothing is quantized.
        """
        if self._disabled:
            return inputs
        if self._holders:
            if self._if_calib:
                self._calibrate(inputs)
            return inputs
        # torch.compile has no export under way, and would break its graph to ask.
        left = tag(self, inputs) if self._if_quant and not torch.compiler.is_dynamo_compiling() else None
        if left is not None:
            return left
        if self._if_calib:
            self._calibrate(inputs)
        if self._if_clip:
            inputs = self.clip(inputs)
        return self._quant_forward(inputs) if self._if_quant else inputs

    def _calibrate(self, inputs: Tensor) -> None:
        if self._calibrator is None:
            raise RuntimeError("this quantizer has no calibrator")
        ours = isinstance(self._calibrator, OWN_CALIBRATORS)
        # Half precision has no histogram on a CPU; our own take what comes.
        self._calibrator.collect(inputs if ours else inputs.detach().float())

    def _quant_forward(self, inputs: Tensor) -> Tensor:
        moved = self.moved(inputs)
        return self._rounded(inputs) if moved is inputs else self._rounded(moved).to(inputs.dtype)

    def _rounded(self, inputs: Tensor, amax: Tensor | None = None) -> Tensor:
        if self._learn_amax:
            inputs = self.clip(inputs)
            amax = torch.max(-self.clip.clip_value_min, self.clip.clip_value_max).detach()
        elif amax is None:
            amax = self._get_amax(inputs)
        if not self._fake_quant:
            outputs, self._scale = tensor_quant.tensor_quant(inputs, amax, self._num_bits, self._unsigned)
            return outputs  # type: ignore[no-any-return]
        grid = self.grid
        if exporting_to_onnx(inputs):
            # A weight's range is a constant of the graph even where it was not calibrated, an activation's is not.
            if self.amax is None and self.role != "weight":
                raise CalibrationError(
                    f"{self._name()} has no range: calibrate the model before exporting it, or disable this quantizer"
                )
            return onnx_fake_quant(inputs, amax, grid)
        if self._learns and amax.requires_grad and torch.is_grad_enabled() and not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            # An optimizer knows of no limit. (Through .data: a layer that runs twice has saved the range by then.)
            amax.data.clamp_(min=SMALLEST_LEARNED)
            return learned_fake_quant(inputs, amax, grid)
        if self.use_fb_fake_quant:
            return native_fake_quant(inputs, amax, grid)
        if grid.unsigned and not grid.zero_point and not torch.compiler.is_compiling():
            self._refuse_negative(inputs)
        return fake_quant(inputs, amax, grid)

    def _refuse_negative(self, inputs: Tensor) -> None:
        # A GPU would be waited for each time: there it is asked once for each range. What can be negative at all, and
        # is not the output of a softmax or a ReLU, is so in the first tensor.
        elsewhere = inputs.device.type != "cpu"
        if elsewhere and self._never_negative:
            return
        if bool(inputs.min() < 0):
            raise NegativeValueError(
                f"{self._name()} is given negative values in a tensor that is to be quantized to an unsigned grid; "
                "write unsigned: false in its spec, or a zero_point"
            )
        if elsewhere:
            self._never_negative = True

    def extra_repr(self) -> str:
        """pytorch-quantization's line, and whether values go to other integers than the nearest."""
        line: str = super().extra_repr()
        return line if self.rounding is None else f"{line} adapted rounding"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TensorQuantizer:
        # A range in bfloat16 would have 8 bits: keep it in float32 and let it only follow the device.
        amax = self.amax
        kept = torch.empty(0) if amax is None else amax.data
        # torch gives a parameter's gradient the parameter's dtype, also for a moment.
        kept_grad = None if amax is None or amax.grad is None else amax.grad.data
        super()._apply(fn, recurse)
        self._device = fn(torch.empty(0, device=self._device)).device
        if amax is not None and self._amax.dtype != torch.float32:
            if isinstance(self._amax, nn.Parameter):
                self._amax.grad = None
                self._amax.data = kept.to(self._amax.device)
                if kept_grad is not None:
                    self._amax.grad = kept_grad.to(self._amax.device)
            else:
                self._amax = kept.to(self._amax.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        loaded = state_dict.get(prefix + "_amax")
        if loaded is not None:
            steps = state_dict.get(prefix + "_rounding")
            self.set_rounding(None if steps is None else torch.zeros_like(steps, device=self._device))
            known = self.amax
            if known is None or known.shape != loaded.shape:
                learned, rounding = self.learns, self.rounding
                self.reset_amax()
                self.set_range(torch.ones(loaded.shape))  # a place for it; a scale per channel is never 0
                self.learn_amax(learned)
                self.set_rounding(rounding)
        # pytorch-quantization's own version logs, and sends the range to a GPU.
        super(quant_nn.TensorQuantizer, self)._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.amax is not None and self._amax.dtype != torch.float32:  # with assign=True it is the checkpoint's
            if isinstance(self._amax, nn.Parameter):
                self._amax = nn.Parameter(self._amax.data.float())
            else:
                self._amax = self._amax.float()
        self._learn_by_rule()
