"""Which values of an activation belong to padded tokens, so that no statistic counts them.

A quantizer sees a tensor such as (batch * heads, tokens, tokens), of this text or that one, and what each axis of each
of its calls stands for was measured (:mod:`~qdq_surgery.padding.axis_probe`), once for each kind of batch. Here that is
put together with the masks of the batch that runs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pytorch_quantization import nn as quant_nn
from torch import Tensor, nn

from qdq_surgery.errors import CalibrationError, QdqSurgeryError
from qdq_surgery.padding.axes import Axes, Axis, Size, masks_of
from qdq_surgery.padding.axis_probe import Call, Found, probe
from qdq_surgery.padding.position_tables import Slice, slices
from qdq_surgery.padding.token_masks import Text, is_label, padded, rows_of, texts_of

__all__ = ["Padding", "Place", "Turn"]


@dataclass(frozen=True)
class Place:
    """What counts of a tensor.

    Attributes:
        invalid: What does not: boolean, broadcasts to it; ``None`` if all counts.
        times: How often the rest counts: a table that is the same for all rows is in the batch once for each of them,
            as it would be if each row ran alone.
        slices: In place of both, of a table that grows with the text: the parts that the rows would have.
    """

    invalid: Tensor | None = None
    times: int = 1
    slices: tuple[Slice, ...] | None = None


_WHOLE = Place()


@dataclass
class Turn:
    """How far a quantizer has come in the batch that runs.

    Attributes:
        batch: Number of the batch.
        call: How many calls it has seen; the pieces of one activation are one call.
        piece: Where in the activation the next piece starts.
        seen: Shape and statistic of each call, in a batch of which it is not known yet how often they count.
    """

    batch: int = -1
    call: int = 0
    piece: int = 0
    seen: list[tuple[tuple[int, ...], Any]] = field(default_factory=list)


class Padding:
    """The padding of the batch that runs.

    Args:
        qmodel: The model that is calibrated.
        quantizers: Its quantizers that collect.

    Attributes:
        number: Of the batch.
        active: Whether there is padding in it.
        rows: Rows of the batch that have a token.
    """

    def __init__(self, qmodel: nn.Module, quantizers: Mapping[str, quant_nn.TensorQuantizer]) -> None:
        self._qmodel, self._quantizers = qmodel, quantizers
        self._known: dict[Any, Found] = {}
        self._batch: Mapping[str, Any] = {}
        self._texts: tuple[Text, ...] = ()
        self._padded: list[Tensor | None] = []
        self._size = Size(1, (), ())
        self._made: dict[Any, Tensor | None] = {}
        self._current: Found | None = None
        self._warned = False
        self.number, self.rows = -1, 1
        self.active = False

    def begin(self, batch: Mapping[str, Any]) -> None:
        """``batch`` is what the model is called with next.

        Raises:
            CalibrationError: A mask is not (batch, tokens), or (batch, choices, tokens), or what it masks, or what
                padding reaches, cannot be told.
        """
        self._batch, self._made, self._current = batch, {}, None
        self.number += 1
        self._texts = texts_of(batch)
        self._padded = [padded(batch, text) for text in self._texts]
        self.rows = rows_of(batch, self._texts)
        lengths = tuple(text.length for text in self._texts)
        self._size = Size(self.rows, lengths, tuple(text.choices for text in self._texts))
        self.active = any(part is not None for part in self._padded)
        if self.active:
            found = self._found()
            self._warn(found)
            self.rows = self._used_rows()

    def _used_rows(self) -> int:
        if any(part is None for part in self._padded):
            return self.rows
        used = [~part.all(1).reshape(self._size.batch, -1).all(1) for part in self._padded if part is not None]
        return int(torch.stack(used).any(0).sum())

    def _found(self) -> Found:
        if self._current is None:
            kind = _kind(self._batch, self._texts, self._size.batch)
            if kind not in self._known:
                self._known[kind] = probe(self._qmodel, self._quantizers, self._batch, self._texts, holes=kind[0])
            self._current = self._known[kind]
        return self._current

    def _warn(self, found: Found) -> None:
        if found.mixes is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self._qmodel).__name__} lets padding into real tokens, in float already (seen first at "
                f"{found.mixes}): its ranges depend on what stands in padding, as its outputs do; calibrate on batches "
                "without padding (group texts by length) if it is to run on such",
                UserWarning,
                stacklevel=2,
            )

    def place(self, quantizer: str, turn: Turn, shape: Iterable[int]) -> Place:
        """What counts in the input of ``quantizer``, whose next call this is.

        Raises:
            CalibrationError: It cannot be told.
        """
        if not self.active:
            return _WHOLE
        calls = self._found().calls[quantizer]
        if calls == ():
            calls = "it saw nothing when the batch was run in another size"
        elif turn.call >= len(calls) and not isinstance(calls, str):
            calls = f"it is called more than {len(calls)} times, which it was when the batch was run in another size"
        if isinstance(calls, str):
            raise CalibrationError(
                f"{quantizer}: padding cannot be told from text here, because {calls}; calibrate on batches without "
                "padding (group texts by length), or disable this quantizer"
            )
        call, shape = calls[turn.call], tuple(shape)
        if any(axis is not None and axis.kind == "table" for axis in call.axes):
            return self._table(quantizer, call, turn, shape)
        mask = self._piece(call, turn, shape)
        if mask is not None and (
            mask.ndim != len(shape) or any(m not in (1, s) for m, s in zip(mask.shape, shape, strict=True))
        ):
            raise CalibrationError(f"{quantizer} saw {shape}, where the batch's padding is {tuple(mask.shape)}")
        if not call.same_for_all:
            return Place(mask)
        return Place(times=self.rows) if self.rows else self._nothing(len(shape))

    def _table(self, quantizer: str, call: Call, turn: Turn, shape: tuple[int, ...]) -> Place:
        found = slices(call.axes, self._padded, self._size, shape) if call.along is None else None
        if found is None:
            raise CalibrationError(
                f"{quantizer} saw {shape}, a table of positions that grew with the text when the batch was run in "
                "another size, and now grows otherwise; calibrate on batches without padding (group texts by length)"
            )
        turn.call += 1
        return Place(slices=tuple(found)) if found else self._nothing(len(shape))

    def _nothing(self, ndim: int) -> Place:
        device = self._batch[self._texts[0].mask].device
        return Place(self._made.setdefault(ndim, torch.ones([1] * ndim, dtype=torch.bool, device=device)))

    def _piece(self, call: Call, turn: Turn, shape: tuple[int, ...]) -> Tensor | None:
        """The mask of the next piece of ``call``, or of all of it; ``turn`` goes on."""
        if call.along is None:
            turn.call += 1
            return self._mask(call.axes)
        start, length = turn.piece, shape[call.along]
        turn.piece += length
        if turn.piece >= _length(call.axes[call.along], self._size):
            turn.call, turn.piece = turn.call + 1, 0
        mask = self._mask(call.axes)
        if mask is None or mask.shape[call.along] == 1:
            return mask
        key = (call.axes, call.along, start, length)
        if key not in self._made:  # kept, so that its id stays its own
            self._made[key] = mask[(slice(None),) * call.along + (slice(start, start + length),)]
        return self._made[key]

    def _mask(self, axes: Axes) -> Tensor | None:
        if axes not in self._made:
            masks = masks_of(axes, self._padded, self._size)
            assert masks is not None  # it was not when the axes were found
            found: Tensor | None = None
            for mask in masks:
                found = mask if found is None else found | mask
            self._made[axes] = found
        return self._made[axes]

    def repeats(self, quantizer: str, shapes: Iterable[tuple[int, ...]]) -> list[int]:
        """How often what ``quantizer`` saw, of these shapes, counts, in a batch without padding.

        A table of positions counts once for each row, as in :class:`Place`. Only a quantizer that sees tensors of
        several shapes has to be asked about: what it always sees alone counts for the same range however often. Nothing
        is known (an empty list) of a quantizer whose axes cannot be told, in which padding would be refused.
        """
        try:
            calls = self._found().calls[quantizer]
        except QdqSurgeryError:  # not run in another size, or not traced there
            return []
        turn, found = Turn(), []
        for shape in shapes:
            if isinstance(calls, str) or turn.call >= len(calls):
                return []
            call = calls[turn.call]
            self._piece(call, turn, shape)
            found.append(self.rows if call.same_for_all else 1)
        return found

    # Calibrators refer to it, and a copy of one belongs to the same batch.
    def __deepcopy__(self, memo: dict[int, Any]) -> Padding:
        return self


def _length(axis: Axis | None, size: Size) -> float:
    if axis is None or axis.kind == "batch":
        return math.inf
    if axis.kind == "rows":
        return size.batch * size.choices[axis.text] * size.lengths[axis.text] * axis.repeat
    return sum(places if text < 0 else size.lengths[text] for text, places in axis.parts or ((axis.text, 0),))


def _kind(batch: Mapping[str, Any], texts: tuple[Text, ...], rows: int) -> tuple[Any, ...]:
    """What a batch brings, which decides what is run: whether padding is not only at the ends of rows comes first."""
    of = {name: text for text in texts for name in text.names}
    brought: list[tuple[Any, ...]] = []
    for name, value in batch.items():
        if is_label(name):
            continue
        if not isinstance(value, Tensor):
            brought.append((name, repr(value) if isinstance(value, (bool, int, float, str)) else type(value)))
            continue
        own = value.shape[len(of[name].shape) :] if name in of else value.shape[int(value.shape[:1] == (rows,)) :]
        brought.append((name, of[name].mask if name in of else "", tuple(own)))
    holes = any(bool((batch[text.mask][..., 1:] > batch[text.mask][..., :-1]).any()) for text in texts)
    return (holes, frozenset(brought))
