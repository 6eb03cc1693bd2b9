"""Which values of an activation belong to padded tokens, so that no statistic counts them.

A quantizer sees a tensor such as (batch * heads, tokens, tokens) and has to know which axes are tokens. That is found
by running the model on two small batches of different size and comparing the shapes that each quantizer saw: an axis
that went from 7 to 11 when the length did is tokens, one that went from 60 to 96 when the batch went from 5 to 8 is the
batch with twelve heads in it, one that stayed is neither.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pytorch_quantization import nn as quant_nn
from torch import Tensor, nn

from qdq_surgery.errors import CalibrationError
from qdq_surgery.positions import longest_text

__all__ = ["Axis", "Padding", "chunk_size", "find_axes", "trimmed"]

_MASK, _MEMORY_MASK, _MEMORY = "attention_mask", "encoder_attention_mask", "encoder_hidden_states"


class _Size(NamedTuple):
    """Rows, tokens, and tokens of the encoder that a decoder attends to."""

    batch: int
    tokens: int
    memory: int


#: The two sizes that are compared. No size of one kind can be taken for one of another, whatever it is multiplied with;
#: nor if the lengths are other ones, next to each other, because the model takes no eleven tokens.
_PROBES = (_Size(5, 7, 13), _Size(8, 11, 16))


@dataclass(frozen=True)
class Axis:
    """What an axis of an activation stands for.

    Attributes:
        kind: ``batch``, ``tokens``, ``memory`` (the encoder's tokens in cross-attention), or ``rows`` and ``memory
            rows``: the batch and its tokens in one axis.
        repeat: How many entries, side by side, belong to one: the heads of a row, for one.
    """

    kind: str
    repeat: int = 1


#: One entry for each axis of an activation; ``None`` for an axis that is about neither the batch nor tokens.
Axes = tuple[Axis | None, ...]


class _Shapes:
    """Stands where a calibrator does and keeps the shapes."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def collect(self, values: Tensor) -> None:
        self.seen.append(tuple(values.shape))


def find_axes(
    qmodel: nn.Module, quantizers: Mapping[str, quant_nn.TensorQuantizer], batch: Mapping[str, Any]
) -> dict[str, Axes | str]:
    """What the axes of each quantizer's input stand for, or in words why that cannot be told.

    Args:
        qmodel: Ready to be run.
        quantizers: Those that are calibrated; their calibrators are put back afterwards.
        batch: What the model is called with, mask included.
    """
    before = {name: quantizer._calibrator for name, quantizer in quantizers.items()}
    sizes = _sizes(qmodel, batch)
    runs: list[dict[str, list[tuple[int, ...]]]] = []
    try:
        for size in sizes:
            shapes = {name: _Shapes() for name in quantizers}
            for name, quantizer in quantizers.items():
                quantizer._calibrator = shapes[name]
            qmodel(**_resized(batch, size))
            runs.append({name: each.seen for name, each in shapes.items()})
    finally:
        for name, quantizer in quantizers.items():
            quantizer._calibrator = before[name]
    choices = batch[_MASK].shape[1:-1].numel() if _MASK in batch else 1
    sizes = [size._replace(batch=size.batch * choices) for size in sizes]
    return {name: _axes(runs[0][name], runs[1][name], sizes) for name in quantizers}


def _sizes(qmodel: nn.Module, batch: Mapping[str, Any]) -> list[_Size]:
    """Two sizes that the model takes, in whole chunks of the feed-forward network."""
    chunk, length = chunk_size(qmodel), batch[_MASK].shape[-1] if _MASK in batch else 1
    length = max(length, longest_text(getattr(qmodel, "config", None)) or sys.maxsize)
    if length // chunk >= _PROBES[1].tokens:
        return [size._replace(tokens=size.tokens * chunk) for size in _PROBES]
    longest = max(length // chunk, 2)
    return [size._replace(tokens=tokens * chunk) for size, tokens in zip(_PROBES, (longest - 1, longest), strict=True)]


def chunk_size(qmodel: nn.Module) -> int:
    """Tokens in a chunk of the feed-forward network, which takes only lengths that chunks divide; 1 if it has none."""
    return getattr(getattr(qmodel, "config", None), "chunk_size_feed_forward", 0) or 1


def _resized(batch: Mapping[str, Any], size: _Size) -> dict[str, Any]:
    """The batch in another size, its entries repeated or left out, nothing masked, without labels."""
    mask = batch[_MASK] if _MASK in batch else batch[_MEMORY_MASK]
    made: dict[str, Any] = {}
    for name, value in batch.items():
        if "label" in name or name in ("start_positions", "end_positions"):
            continue
        if isinstance(value, Tensor) and value.ndim and value.shape[0] in (1, mask.shape[0]):
            # One row, such as positions, is for all rows.
            value = value if value.shape[0] < mask.shape[0] else _repeated(value, 0, size.batch)
            if name.startswith("encoder_"):
                value = _repeated(value, 1, size.memory) if value.ndim > 1 else value
            elif value.shape[1 : mask.ndim] == mask.shape[1:]:
                value = _repeated(value, mask.ndim - 1, size.tokens)
            if name in (_MASK, _MEMORY_MASK):
                value = torch.ones_like(value)
        made[name] = value
    return made


def _repeated(value: Tensor, axis: int, size: int) -> Tensor:
    return value.index_select(axis, torch.arange(size, device=value.device) % value.shape[axis])


def _axes(first: list[tuple[int, ...]], second: list[tuple[int, ...]], sizes: list[_Size]) -> Axes | str:
    if not first and not second:
        return ()
    if len(first) != len(second):
        return f"it is called {len(first)} times for {sizes[0].tokens} tokens and {len(second)} times for more (chunks)"
    found = {_compared(one, other, sizes) for one, other in zip(first, second, strict=True)}
    return found.pop() if len(found) == 1 else "its calls differ in what their axes stand for"


def _compared(first: tuple[int, ...], second: tuple[int, ...], sizes: list[_Size]) -> Axes | str:
    one, other = sizes
    kinds = {
        "tokens": (one.tokens, other.tokens),
        "memory": (one.memory, other.memory),
        "batch": (one.batch, other.batch),
        "rows": (one.batch * one.tokens, other.batch * other.tokens),
        "memory rows": (one.batch * one.memory, other.batch * other.memory),
    }
    if len(first) != len(second):
        return f"it has {len(first)} axes in one call and {len(second)} in another"
    made: list[Axis | None] = []
    for a, b in zip(first, second, strict=True):
        if a == b:
            made.append(None)
            continue
        for kind, (x, y) in kinds.items():
            repeat = a // x
            single = kind in ("tokens", "memory")  # several tokens side by side are no axis that is known
            if a == repeat * x and b == repeat * y and (repeat == 1 or not single):
                made.append(Axis(kind, repeat))
                break
        else:
            made.append(Axis("unknown"))
    if not any(axis is not None and axis.kind in ("batch", "rows", "memory rows") for axis in made):
        return (None,) * len(made)  # a table of positions, the same for every row: no token of it is padding
    if Axis("unknown") in made:
        return f"its axes were {first} and then {second}, which follows neither the batch nor the length"
    return tuple(made)


def trimmed(batch: Mapping[str, Any], chunk: int = 1) -> dict[str, Any]:
    """The batch without the columns at its end that are padding in every row; the length is a multiple of ``chunk``."""
    mask = batch.get(_MASK)
    if not isinstance(mask, Tensor) or mask.ndim < 2 or not mask.numel():
        return dict(batch)
    used = (mask != 0).reshape(-1, mask.shape[-1]).any(0).nonzero()
    length = int(used.max()) + 1 if used.numel() else mask.shape[-1]
    length = min(-(-length // chunk) * chunk, mask.shape[-1])
    if length == mask.shape[-1]:
        return dict(batch)
    axis = mask.ndim - 1
    return {
        name: value.narrow(axis, 0, length)
        if isinstance(value, Tensor) and not name.startswith("encoder_") and _like(value, mask)
        else value
        for name, value in batch.items()
    }


def _like(value: Tensor, mask: Tensor) -> bool:
    """Whether ``value`` has rows (or one for all of them) and tokens as ``mask`` does."""
    shape = value.shape[: mask.ndim]
    return len(shape) == mask.ndim and shape[0] in (1, mask.shape[0]) and shape[1:] == mask.shape[1:]


class Padding:
    """The padding of the batch that runs.

    Args:
        qmodel: The model that is calibrated.
        quantizers: Its quantizers that collect.
    """

    def __init__(self, qmodel: nn.Module, quantizers: Mapping[str, quant_nn.TensorQuantizer]) -> None:
        self._qmodel, self._quantizers = qmodel, quantizers
        self._axes: dict[str, Axes | str] = {}
        self._known: dict[frozenset[tuple[str, int]], dict[str, Axes | str]] = {}
        self._tokens: Tensor | None = None
        self._memory: Tensor | None = None
        self._made: dict[Axes, Tensor | None] = {}

    def begin(self, batch: Mapping[str, Any]) -> None:
        """``batch`` is what the model is called with next.

        Raises:
            CalibrationError: Its mask is not (batch, tokens), or (batch, choices, tokens).
        """
        self._made = {}
        self._tokens, self._memory = _padded(batch, _MASK), _padded(batch, _MEMORY_MASK)
        if self._tokens is None and self._memory is None:
            return
        # What a batch brings decides what is run: a decoder without encoder states has no cross-attention.
        kind = frozenset((name, value.ndim) for name, value in batch.items() if isinstance(value, Tensor))
        if kind not in self._known:
            self._known[kind] = find_axes(self._qmodel, self._quantizers, batch)
        self._axes = self._known[kind]

    def invalid(self, quantizer: str, shape: Iterable[int]) -> Tensor | None:
        """What does not count in the input of ``quantizer``: boolean, broadcasts to ``shape``; ``None`` if all counts.

        Raises:
            CalibrationError: It cannot be told.
        """
        if self._tokens is None and self._memory is None:
            return None
        axes = self._axes[quantizer]
        if axes == ():
            axes = "it saw nothing when the batch was run in another size"
        if isinstance(axes, str):
            raise CalibrationError(
                f"{quantizer}: padding cannot be told from text here, because {axes}; calibrate on batches without "
                "padding (group texts by length), or disable this quantizer"
            )
        if axes not in self._made:
            self._made[axes] = self._mask(axes)
        mask = self._made[axes]
        if mask is not None and any(m not in (1, s) for m, s in zip(mask.shape, shape, strict=True)):
            raise CalibrationError(f"{quantizer} saw {tuple(shape)}, where the batch's padding is {tuple(mask.shape)}")
        return mask

    def _mask(self, axes: Axes) -> Tensor | None:
        found = None
        kinds = {axis.kind for axis in axes if axis is not None}
        for padded, own, rows in ((self._tokens, "tokens", "rows"), (self._memory, "memory", "memory rows")):
            if padded is None:
                continue
            for place, axis in enumerate(axes):
                if axis is None or axis.kind not in (own, rows, "batch"):
                    continue
                if axis.kind == "batch" and (own != "tokens" or kinds & {"tokens", "memory"}):
                    continue  # the token axes speak for the row
                shape = [1] * len(axes)
                if axis.kind == rows:
                    part = padded.reshape(-1).repeat_interleave(axis.repeat)
                elif axis.kind == "batch":
                    part = padded.all(1).repeat_interleave(axis.repeat)  # rows without a token
                else:
                    at, repeat = next((i, a.repeat) for i, a in enumerate(axes) if a is not None and a.kind == "batch")
                    part = padded.repeat_interleave(repeat, 0)
                    shape[at] = part.shape[0]
                    part = part if at < place else part.T
                shape[place] = padded.shape[1] if axis.kind == own else part.numel()
                part = part.reshape(shape)
                found = part if found is None else found | part
        return found

    # Calibrators refer to it, and a copy of one belongs to the same batch.
    def __deepcopy__(self, memo: dict[int, Any]) -> Padding:
        return self


def _padded(batch: Mapping[str, Any], name: str) -> Tensor | None:
    """(rows, tokens), true where padded; ``None`` if nothing is."""
    mask = batch.get(name)
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise CalibrationError(f"{name} is a {type(mask).__name__}, wanted a tensor: 1 for a token, 0 for padding")
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if name == _MEMORY_MASK:
        tokens = batch.get(_MEMORY)
    wanted = tuple(mask.shape) if tokens is None else tuple(tokens.shape[: -1 if tokens.is_floating_point() else None])
    if tuple(mask.shape) != wanted:
        raise CalibrationError(
            f"{name} has the shape {tuple(mask.shape)}, wanted {wanted}: 1 for a token, 0 for padding"
        )
    padded = (mask == 0).reshape(-1, mask.shape[-1])
    return padded if bool(padded.any()) else None
