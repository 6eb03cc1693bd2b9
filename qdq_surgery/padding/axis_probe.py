"""What each call of each quantizer sees: measured, by running the model three times on small batches.

Two runs differ only in what stands in padded places, and the third in size. The calls are compared one by one, so a
layer that projects tokens and then a table of positions, or that runs for one text and then for another, has axes of
its own in each call. A feed-forward network in chunks is called for pieces of the tokens: they are put together.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pytorch_quantization import nn as quant_nn
from torch import Tensor, nn

from qdq_surgery.errors import CalibrationError
from qdq_surgery.hf.config_facts import chunk_size, configs_of, max_tokens
from qdq_surgery.padding.axes import Axes, Fit, Size, fit
from qdq_surgery.padding.position_tables import grown
from qdq_surgery.padding.token_masks import Text, resized, with_padding
from qdq_surgery.safety.random_state import kept_random, seed_generators

__all__ = ["Call", "Found", "probe"]

#: Rows of the two sizes, and tokens of each text. No size of one kind can be taken for one of another, whatever it is
#: multiplied with.
_BATCHES = (5, 8)

#: What models raise on arguments that they do not take.
_CANNOT_RUN = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)
_LENGTHS = ((7, 11), (13, 16), (17, 26), (19, 36))

#: Of the padding that is tried, and of the dropout that rules may ask for.
_SEED = 0


@dataclass(frozen=True)
class Call:
    """What one call of a quantizer sees.

    Attributes:
        axes: Of the whole, where it comes in pieces.
        along: The axis along which it comes in pieces, one call each; ``None`` if it comes at once.
    """

    axes: Axes
    along: int | None = None

    @property
    def same_for_all(self) -> bool:
        """Whether it is the same for all rows, such as a table of positions."""
        return not _depends(self.axes)


@dataclass(frozen=True)
class Found:
    """What was measured.

    Attributes:
        calls: By quantizer, in the order in which it is called; in words why that cannot be told.
        mixes: The first quantizer that saw real tokens changed by what stands in padding; ``None`` if none did.
    """

    calls: Mapping[str, tuple[Call, ...] | str]
    mixes: str | None = None


class _Recorder:
    """Stands where a calibrator does and keeps what comes."""

    def __init__(self, clock: _Clock) -> None:
        self.seen: list[tuple[int, Tensor]] = []
        self._clock = clock

    def collect(self, values: Tensor) -> None:
        self.seen.append((self._clock.next(), values.detach().clone()))


class _Clock:
    """The order of the calls of all quantizers."""

    def __init__(self) -> None:
        self._count = itertools.count()

    def next(self) -> int:
        return next(self._count)

    # A recorder is copied when a block may have to start again.
    def __deepcopy__(self, memo: dict[int, Any]) -> _Clock:
        return self


@dataclass
class _Seen:
    """All calls of one quantizer in the three runs."""

    first: list[tuple[int, Tensor]]
    changed: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)


def probe(
    qmodel: nn.Module,
    quantizers: Mapping[str, quant_nn.TensorQuantizer],
    batch: Mapping[str, Any],
    texts: tuple[Text, ...],
    holes: bool,
) -> Found:
    """What the quantizers see in a forward of ``qmodel`` on ``batch``.

    Args:
        quantizers: Those that are calibrated; their calibrators are put back afterwards.
        holes: Whether padding may stand anywhere, or only at the ends of rows.

    Raises:
        CalibrationError: The model cannot be run on small batches like this one.
    """
    errors: list[Exception] = []
    for lengths in _lengths(qmodel, texts):
        sizes = tuple(
            Size(batch, tuple(pair[i] for pair in lengths), tuple(text.choices for text in texts))
            for i, batch in enumerate(_BATCHES)
        )
        rows = [sizes[0].batch * choices for choices in sizes[0].choices]
        padded = [_places(i, rows[i], length, holes) for i, length in enumerate(sizes[0].lengths)]
        try:
            seen = _compare(qmodel, quantizers, batch, texts, (sizes[0], sizes[1]), padded)
        except _CANNOT_RUN as error:
            errors.append(error)
            continue
        return _understood(seen, padded, (sizes[0], sizes[1]))
    try:
        _run(qmodel, quantizers, batch)
    except _CANNOT_RUN as error:  # it is not the size, but for example another model's ids
        raise CalibrationError(f"{type(qmodel).__name__} cannot run it: {error}") from error
    raise CalibrationError(
        f"{type(qmodel).__name__} cannot be run on the batch in another size ({errors[0]}), by which it is told what "
        "is padding inside of it; calibrate on batches without padding (group texts by length)"
    ) from errors[0]


def _lengths(qmodel: nn.Module, texts: tuple[Text, ...]) -> list[list[tuple[int, int]]]:
    """Two lengths of each text that the model takes: first short ones, then such as the batch's own.

    Raises:
        CalibrationError: There are too many texts.
    """
    if len(texts) > len(_LENGTHS):
        raise CalibrationError(f"it brings {len(texts)} masks; no more than {len(_LENGTHS)} can be told apart")
    configs = configs_of(qmodel)
    chunk = chunk_size(*configs)
    limits = [max_tokens(config) or sys.maxsize for config in configs]
    short, own = [], []
    for text, (small, large) in zip(texts, _LENGTHS, strict=False):
        longest = max(text.length, min(limits, default=sys.maxsize)) // chunk
        if longest < large:
            small, large = max(longest, 2) - 1, max(longest, 2)
        short.append((small * chunk, large * chunk))
        most = max(text.length // chunk, 2)
        own.append((most * chunk, (most - 1) * chunk))
    return [short, own] if texts else [short]


def _places(index: int, rows: int, length: int, holes: bool) -> Tensor:
    """(rows, tokens) of one text, true where the first two runs are padded; the first token of a row never is."""
    if holes:
        generator = torch.Generator().manual_seed(_SEED + index)
        made = torch.rand(rows, length, generator=generator) < 0.5
    else:
        used = 1 + (torch.arange(rows) * 3 + 2 * index + length - 1) % length
        made = torch.arange(length) >= used[:, None]
    made[:, 0] = False
    return made


def _compare(
    qmodel: nn.Module,
    quantizers: Mapping[str, quant_nn.TensorQuantizer],
    batch: Mapping[str, Any],
    texts: tuple[Text, ...],
    sizes: tuple[Size, Size],
    padded: Sequence[Tensor],
) -> dict[str, _Seen]:
    """The three runs."""
    plain, longer = (resized(batch, texts, size.batch, size.lengths) for size in sizes)
    first = _run(qmodel, quantizers, _filled(plain, batch, texts, padded, 0))
    seen = {name: _Seen(calls) for name, calls in first.items()}
    for name, calls in _run(qmodel, quantizers, _filled(plain, batch, texts, padded, 1)).items():
        if [tuple(a.shape) for _, a in calls] == [tuple(a.shape) for _, a in first[name]]:
            pairs = zip(first[name], calls, strict=True)
            seen[name].changed = [(a != b) & ~(a.isnan() & b.isnan()) for (_, a), (_, b) in pairs]
    for name, calls in _run(qmodel, quantizers, longer).items():
        seen[name].second = [each for _, each in calls]
    return seen


def _filled(
    plain: Mapping[str, Any], batch: Mapping[str, Any], texts: tuple[Text, ...], padded: Sequence[Tensor], content: int
) -> dict[str, Any]:
    made = dict(plain)
    for text, places in zip(texts, padded, strict=True):
        made = with_padding(made, batch, text, places.to(made[text.mask].device), content)
    return made


def _run(
    qmodel: nn.Module, quantizers: Mapping[str, quant_nn.TensorQuantizer], batch: Mapping[str, Any]
) -> dict[str, list[tuple[int, Tensor]]]:
    """What each quantizer sees, with the same random numbers in every run."""
    before = {name: quantizer._calibrator for name, quantizer in quantizers.items()}
    clock = _Clock()
    devices = sorted({p.device for p in qmodel.parameters() if p.device.type == "cuda"}, key=str)
    try:
        for quantizer in quantizers.values():
            quantizer._calibrator = _Recorder(clock)
        with kept_random(devices):
            seed_generators(_SEED, devices)
            qmodel(**batch)
        return {name: quantizer._calibrator.seen for name, quantizer in quantizers.items()}
    finally:
        for name, quantizer in quantizers.items():
            quantizer._calibrator = before[name]


# ------------------------------------------------------------------------------------------------ understanding


def _understood(seen: Mapping[str, _Seen], padded: Sequence[Tensor], sizes: tuple[Size, Size]) -> Found:
    fits: list[tuple[int, str, Fit, int | None]] = []
    calls: dict[str, tuple[Call, ...] | str] = {}
    for name, each in seen.items():
        whole = _whole(each, sizes)
        if isinstance(whole, str):
            calls[name] = whole
            continue
        for when, values, changed, second, along in whole:
            found = fit(values, changed, second.shape, [part.to(values.device) for part in padded], sizes)
            if found.axes is not None and not _depends(found.axes) and values.shape != second.shape:
                axes = grown(values.float(), second.float(), sizes)
                found = Fit(axes, found.spilled, "it is the same for all rows, and grows with the text in its own way")
            fits.append((when, name, found, along))
        calls[name] = ()
    mixes: str | None = None
    for _, name, found, along in sorted(fits, key=lambda item: item[0]):
        known = calls[name]
        if isinstance(known, str):
            continue
        if found.axes is None:
            calls[name] = found.why
        elif found.spilled and mixes is None and not _has_tokens(found.axes):
            calls[name] = "what stands in padding reaches it, and none of its axes is tokens"
        else:
            mixes = name if found.spilled and mixes is None else mixes
            calls[name] = (*known, Call(found.axes, along))
    return Found(calls, mixes)


def _has_tokens(axes: Axes) -> bool:
    return any(axis is not None and axis.kind not in ("batch", "table") for axis in axes)


def _depends(axes: Axes) -> bool:
    return any(axis is not None and axis.kind in ("batch", "rows") for axis in axes)


_Whole = tuple[int, Tensor, Tensor, Tensor, int | None]


def _whole(seen: _Seen, sizes: tuple[Size, Size]) -> list[_Whole] | str:
    """The calls, those for pieces of the tokens put together, each with its place in time."""
    if not seen.first and not seen.second:
        return []
    if len(seen.changed) != len(seen.first):
        return "the shapes of what it sees depend on what stands in padding"
    if len(seen.first) == len(seen.second):
        return [
            (when, values, changed, second, None)
            for (when, values), changed, second in zip(seen.first, seen.changed, seen.second, strict=True)
        ]
    first = [tuple(values.shape) for _, values in seen.first]
    runs = _runs(first, [tuple(values.shape) for values in seen.second], sizes)
    if runs is None:
        return (
            f"it is called {len(first)} times for {sizes[0].lengths[0] if sizes[0].lengths else sizes[0].batch} tokens "
            f"and {len(seen.second)} times for more, which are no chunks of them"
        )
    along, pieces, others = runs
    made: list[_Whole] = []
    for run, other in zip(pieces, others, strict=True):
        values = torch.cat([seen.first[i][1] for i in run], along)
        changed = torch.cat([seen.changed[i] for i in run], along)
        second = torch.cat([seen.second[i] for i in other], along)
        made.append((seen.first[run[0]][0], values, changed, second, along))
    return made


def _runs(
    first: Sequence[tuple[int, ...]], second: Sequence[tuple[int, ...]], sizes: tuple[Size, Size]
) -> tuple[int, list[list[int]], list[list[int]]] | None:
    """Calls that are the pieces of one activation: the axis, and the calls of the first run and of the second."""
    if not first or not second or len({len(shape) for shape in (*first, *second)}) != 1:
        return None
    one, other = sizes
    texts = range(len(one.lengths))
    subsets = [chosen for count in texts for chosen in itertools.combinations(texts, count + 1)]
    for along in range(len(first[0])):
        if any(len({s[:along] + s[along + 1 :] for s in shapes}) != 1 for shapes in (first, second)):
            continue
        totals = [sum(shape[along] for shape in shapes) for shapes in (first, second)]
        for chosen in subsets:
            growth = sum(other.lengths[i] - one.lengths[i] for i in chosen)
            count, over = divmod(totals[1] - totals[0], growth) if growth else (0, 1)
            if over or count < 1 or totals[0] % count or totals[1] % count:
                continue
            pieces = [
                _split([shape[along] for shape in shapes], total // count)
                for shapes, total in zip((first, second), totals, strict=True)
            ]
            if pieces[0] is not None and pieces[1] is not None:
                return along, pieces[0], pieces[1]
    return None


def _split(lengths: Sequence[int], whole: int) -> list[list[int]] | None:
    """The calls in runs whose lengths add up to ``whole``."""
    runs: list[list[int]] = [[]]
    filled = 0
    for index, length in enumerate(lengths):
        runs[-1].append(index)
        filled += length
        if filled > whole:
            return None
        if filled == whole:
            runs.append([])
            filled = 0
    return None if runs.pop() else runs
