"""Calibrators behind pytorch-quantization's interface: ``collect``, ``compute_amax``, ``reset``.

They are subclasses of its calibrators, so that loops that ask for ``isinstance(..., calib.MaxCalibrator)`` work. What
they collect does not depend on the order or the grouping of the data; see :mod:`~qdq_surgery.numerics.histogram`.
"""

from __future__ import annotations

import copy
import functools
import operator
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NoReturn

import torch
from pytorch_quantization import calib
from pytorch_quantization.calib.calibrator import _Calibrator
from torch import Tensor

from qdq_surgery.errors import CalibrationError, ModelError
from qdq_surgery.numerics.grid import Grid
from qdq_surgery.numerics.histogram import BINS, Histogram, largest
from qdq_surgery.numerics.range_choice import RANGE_METHODS, choose
from qdq_surgery.numerics.range_methods import DEFAULT_PERCENTILE, START_BIN
from qdq_surgery.padding.call_padding import Padding, Turn
from qdq_surgery.quantize.descriptors import kept_axes

__all__ = [
    "OWN_CALIBRATORS",
    "ChannelCalibrator",
    "HistogramCalibrator",
    "MaxCalibrator",
    "MomentCalibrator",
    "Watch",
]


@dataclass
class Watch:
    """What the calibrators of one model know of the batch that runs.

    Attributes:
        padding: Its padding.
        seen: Tensors that were counted already: queries, keys and values start from one.
        called: Names of the quantizers, in the order in which they first saw something.
        thread: The one whose calls are counted.
    """

    padding: Padding
    called: dict[str, None] = field(default_factory=dict)
    thread: int = field(default_factory=threading.get_ident)
    seen: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], int, Any]] = field(default_factory=dict)

    def settle(self, calibrators: Iterable[Any]) -> None:
        """The batch is over: whatever could not be decided while it ran is decided now."""
        alike = not self.padding.active and self.padding.rows > 1
        for each in calibrators:
            if isinstance(each, _Watching):
                each.end_batch(alike)

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        return self

    def __reduce__(self) -> NoReturn:
        raise ModelError(
            "a model that is being calibrated cannot be pickled: its quantizers are off and watched; pickle it before "
            "that, or when it is over"
        )


class _Watching:
    """A calibrator that may know of padding.

    Attributes:
        watch: Set while :func:`qdq_surgery.calibration.collect` runs.
        quantizer: Name of the quantizer that it belongs to.
        turn: How far it has come in the batch that runs; it is copied with the calibrator, when a block may have to
            start again.
        counts: Whether it matters how often a tensor is in a batch.
        lowest: Beside it, where the grid has a zero point: how large a range reaches down to the lowest value.
    """

    counts: ClassVar[bool] = True
    lowest: _LowestCalibrator | None = None
    watch: Watch | None = None
    quantizer: str = ""
    turn: Turn | None = None

    def _summary(self, values: Tensor) -> tuple[Any, int]:
        """The summary of ``values``, made once for all calibrators that watch the same batch; how often it counts."""
        if self.watch is None:
            return self._summarize(values.detach(), None), 1
        if self.watch.thread != threading.get_ident():
            raise CalibrationError(
                "the model is being calibrated in another thread, which would count this call's data; wait for it, or "
                "give each thread a copy of the model"
            )
        self.watch.called[self.quantizer] = None
        padding = self.watch.padding
        if self.turn is None or self.turn.batch != padding.number:
            self.turn = Turn(padding.number)
        place = padding.place(self.quantizer, self.turn, values.shape)
        if place.slices is not None:
            return self._sum([(self._summarize(each.of(values), None), each.times) for each in place.slices]), 1
        made = self._shared(self.watch, values, place.invalid)
        if self.counts and not padding.active and padding.rows > 1:
            self.turn.seen.append((tuple(values.shape), made))
        return made, place.times

    def _collect_lowest(self, values: Tensor) -> None:
        if self.lowest is not None:
            self.lowest.watch, self.lowest.quantizer = self.watch, self.quantizer
            self.lowest.collect(values)

    def end_batch(self, alike: bool) -> None:
        """A batch is over.

        Args:
            alike: Whether it was of several rows without padding: what is the same for all rows counts once for each.
        """
        turn = self.turn
        if turn is None or self.watch is None:
            return
        if alike and len({shape for shape, _ in turn.seen}) > 1:
            repeats = self.watch.padding.repeats(self.quantizer, [shape for shape, _ in turn.seen])
            for (_, made), times in zip(turn.seen, repeats, strict=False):
                if times > 1:
                    self._add(made, times - 1)
        turn.seen.clear()

    def _shared(self, watch: Watch, values: Tensor, invalid: Tensor | None) -> Any:
        if values.is_inference():  # such a tensor does not tell whether it has been written to since
            return self._summarize(values, invalid)
        key = (id(values), id(invalid), self._kind())
        known = watch.seen.get(key)
        if known is not None and known[0]() is values and known[1] == values._version:
            return known[2]
        made = self._summarize(values.detach(), invalid)
        watch.seen[key] = (weakref.ref(values), values._version, made)
        return made

    def _kind(self) -> Any:
        raise NotImplementedError

    def _sum(self, found: list[tuple[Any, int]]) -> Any:
        raise NotImplementedError

    def _add(self, made: Any, times: int) -> None:
        raise NotImplementedError

    def _summarize(self, values: Tensor, invalid: Tensor | None) -> Any:
        raise NotImplementedError


class MaxCalibrator(_Watching, calib.MaxCalibrator):  # type: ignore[misc]
    """The largest magnitude, for the whole tensor or for each channel.

    Args:
        num_bits, axis, unsigned, track_amax: As pytorch-quantization has it.
        zero_point: That of the grid.
    """

    counts = False
    _calib_amax: Tensor | None

    def __init__(
        self,
        num_bits: int,
        axis: int | tuple[int, ...] | None,
        unsigned: bool,
        track_amax: bool = False,
        *,
        zero_point: int = 0,
    ) -> None:
        super().__init__(num_bits, axis, unsigned, track_amax)
        self.lowest = _lowest(Grid(num_bits, unsigned, zero_point=zero_point), axis)

    @property
    def top(self) -> Tensor | None:
        """The largest magnitude: (), or with 1 in every axis that is not kept; ``None`` before the first tensor."""
        return self._calib_amax

    def collect(self, x: Tensor) -> None:
        """Take note of a tensor."""
        self._collect_lowest(x)
        amax, _ = self._summary(x)
        if self._calib_amax is None:
            self._calib_amax = amax
        elif self._calib_amax.shape != amax.shape:
            raise RuntimeError(f"the range had the shape {tuple(self._calib_amax.shape)}, now {tuple(amax.shape)}")
        else:
            self._calib_amax = torch.maximum(self._calib_amax, amax)
        if self._track_amax:
            self._amaxs.append(amax.cpu().numpy())

    def compute_amax(self) -> Tensor | None:
        """The range, which reaches down to the lowest value, too: as :attr:`top`."""
        needed = None if self.lowest is None else self.lowest.compute_amax()
        return self.top if needed is None or self.top is None else torch.maximum(self.top, needed)

    def reset(self) -> None:
        """Forget what was seen."""
        super().reset()
        if self.lowest is not None:
            self.lowest.reset()

    def _kind(self) -> Any:
        return ("max", kept_axes(self._axis))

    def _sum(self, found: list[tuple[Tensor, int]]) -> Tensor:
        return torch.stack([amax for amax, _ in found]).amax(0)

    def _summarize(self, values: Tensor, invalid: Tensor | None) -> Tensor:
        axes = kept_axes(self._axis)
        if axes is None:
            return largest(values, invalid)
        kept = {axis % values.ndim for axis in axes}
        values = values.abs().float()
        if invalid is not None:
            values = values.masked_fill(invalid, 0.0)
        return values.amax([axis for axis in range(values.ndim) if axis not in kept], keepdim=True)


class _LowestCalibrator(MaxCalibrator):
    """How large a range has to be for a grid with a zero point to reach down to the lowest value.

    Magnitudes do not tell: such a grid reaches less far down than up.

    Args:
        grid, axis: Those of the quantizer.
    """

    def __init__(self, grid: Grid, axis: int | tuple[int, ...] | None) -> None:
        super().__init__(grid.bits, axis, grid.unsigned)
        self._below = grid.below

    def _kind(self) -> Any:
        return ("lowest", self._below, kept_axes(self._axis))

    def _summarize(self, values: Tensor, invalid: Tensor | None) -> Tensor:
        return super()._summarize(values.clamp(max=0), invalid) * self._below


def _lowest(grid: Grid, axis: int | tuple[int, ...] | None) -> _LowestCalibrator | None:
    return _LowestCalibrator(grid, axis) if grid.zero_point else None


class HistogramCalibrator(_Watching, calib.HistogramCalibrator):  # type: ignore[misc]
    """Every magnitude in a histogram, from which each method takes its range.

    Args:
        num_bits, axis, unsigned: As pytorch-quantization has it; ``axis`` is ``None``.
        num_bins: How many bins at least lie between 0 and the largest magnitude.
        zero_point: That of the grid.

    Attributes:
        histogram: ``None`` before the first tensor.
    """

    _zero_point = 0

    def __init__(
        self, num_bits: int, axis: None, unsigned: bool, num_bins: int = BINS // 2, *, zero_point: int = 0
    ) -> None:
        if axis is not None:
            raise NotImplementedError(f"a histogram is of the whole tensor, but axis is {axis}")
        _Calibrator.__init__(self, num_bits, axis, unsigned)
        self._zero_point = zero_point
        self.lowest = _lowest(self._grid, None)
        self._bins = 2 << (num_bins - 1).bit_length()
        self.histogram: Histogram | None = None

    @property
    def _grid(self) -> Grid:
        return Grid(self._num_bits, self._unsigned, zero_point=self._zero_point)

    def collect(self, x: Tensor) -> None:
        """Count a tensor."""
        self._collect_lowest(x)
        self._add(*self._summary(x))

    def _add(self, made: Histogram, times: int) -> None:
        made = made.repeated(times)
        self.histogram = made if self.histogram is None else self.histogram + made

    def reset(self) -> None:
        """Forget what was counted."""
        self.histogram = None
        if self.lowest is not None:
            self.lowest.reset()

    def compute_amax(
        self, method: str, *, stride: int = 1, start_bin: int = START_BIN, percentile: float = DEFAULT_PERCENTILE
    ) -> Tensor | None:
        """The range, float32, shape (); ``None`` before the first tensor.

        Args:
            method: One of :func:`~qdq_surgery.numerics.range_choice.method_names`.
            stride, start_bin: Candidates of entropy and mse, in bins.

        Raises:
            CalibrationError: There was a NaN or an infinite value.
        """
        if self.histogram is None:
            return None
        options = {"start_bin": start_bin, "stride": stride}
        amax, _ = choose(self.histogram, method, self._grid, percentile=percentile, **options)
        needed = None if self.lowest is None else self.lowest.compute_amax()
        return torch.tensor(amax if needed is None else max(amax, float(needed)))

    @property
    def _calib_hist(self) -> Tensor | None:
        return None if self.histogram is None else self.histogram.table()[0]

    @property
    def _calib_bin_edges(self) -> Tensor | None:
        return None if self.histogram is None else self.histogram.table()[1]

    def _kind(self) -> Any:
        return ("histogram", self._bins)

    def _sum(self, found: list[tuple[Histogram, int]]) -> Histogram:
        return functools.reduce(operator.add, [each.repeated(times) for each, times in found])

    def _summarize(self, values: Tensor, invalid: Tensor | None) -> Histogram:
        return Histogram.of(values, invalid, self._bins)

    def __str__(self) -> str:
        if self.histogram is None:
            return "HistogramCalibrator(empty)"
        return f"HistogramCalibrator({self._bins} bins, amax {float(self.histogram.amax):.4g})"

    def __repr__(self) -> str:
        return str(self)


class MomentCalibrator(_Watching):
    """Beside another one, on the input of a linear: the sum of x x^T over all that comes, for rounding its weight.

    Args:
        beside: The calibrator of the range, which sees everything, too.

    Attributes:
        moments: (channels, channels), float32; ``None`` before the first tensor. It is replaced and never changed.
    """

    def __init__(self, beside: MaxCalibrator | HistogramCalibrator) -> None:
        self.beside, self.moments = beside, None
        self.watch, self.quantizer = beside.watch, beside.quantizer

    moments: Tensor | None

    def collect(self, x: Tensor) -> None:
        """Add a tensor, whose last axis are the channels."""
        self.beside.collect(x)
        self._add(*self._summary(x))

    def end_batch(self, alike: bool) -> None:
        """See the base."""
        self.beside.end_batch(alike)
        super().end_batch(alike)

    def _add(self, made: Tensor, times: int) -> None:
        made = made * times if times != 1 else made
        self.moments = made if self.moments is None else self.moments + made

    def _kind(self) -> Any:
        return "moments"

    def _sum(self, found: list[tuple[Tensor, int]]) -> Tensor:
        return torch.stack([made * times for made, times in found]).sum(0)

    def _summarize(self, values: Tensor, invalid: Tensor | None) -> Tensor:
        values = values.float()
        if invalid is not None:
            values = values.masked_fill(invalid, 0.0)
        rows = values.reshape(-1, values.shape[-1])
        with torch.autocast(rows.device.type, enabled=False):
            return rows.T @ rows

    def __deepcopy__(self, memo: dict[int, Any]) -> MomentCalibrator:
        made = copy.copy(self)  # the moments of a large model are not written to, so need no copy
        made.beside = copy.deepcopy(self.beside, memo)
        made.turn = None if self.turn is None else replace(self.turn, seen=list(self.turn.seen))
        return made


class ChannelCalibrator(_Calibrator):  # type: ignore[misc]
    """A range for each channel of a weight, by a method that finds it on the weight itself.

    Args:
        num_bits, axis, unsigned, narrow_range: As pytorch-quantization has it; ``axis`` is one.
        method: Name of the method.
    """

    def __init__(self, num_bits: int, axis: int, unsigned: bool, narrow_range: bool, method: str = "mse") -> None:
        super().__init__(num_bits, axis, unsigned)
        self._narrow_range, self._method = narrow_range, method
        self._weight: Tensor | None = None

    def collect(self, x: Tensor) -> None:
        """Take the weight, the same each time.

        Raises:
            CalibrationError: It is another tensor than before, so no weight.
        """
        if self._weight is not None and self._weight.data_ptr() != x.data_ptr():
            raise CalibrationError(
                f"{self._method} with one range per channel is for weights, and this quantizer saw two different "
                "tensors; write axis: null, or calibrator: max"
            )
        self._weight = x.detach()

    def reset(self) -> None:
        """Forget the weight."""
        self._weight = None

    def compute_amax(self, *_: Any, **__: Any) -> Tensor | None:
        """The ranges, with 1 in every axis but the channels'; ``None`` before the first tensor.

        Whatever method a loop for all calibrators asks for, this one has its own.
        """
        by_channel = RANGE_METHODS[self._method].by_channel
        if self._weight is None or by_channel is None:
            return None
        return by_channel(self._weight, self._axis, Grid(self._num_bits, self._unsigned, self._narrow_range))


#: Those that take tensors as they come.
OWN_CALIBRATORS = (MaxCalibrator, HistogramCalibrator, MomentCalibrator, ChannelCalibrator)
