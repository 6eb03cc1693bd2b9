"""What the axes of an activation stand for: which is the batch, which are the tokens of which text.

Two runs of different size say what an axis can be: one that went from 7 to 11 when a text's length did is that text's
tokens, one that went from 60 to 96 when the batch went from 5 to 8 is the batch with twelve heads in it, one that went
from 17 to 21 is the text with ten places beside it, one that stayed is neither. Where that leaves a choice, what
changes with the content of padding decides it; and it has the last word in any case: an activation where it changes
something outside the places that the axes name is not understood.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Axes", "Axis", "Fit", "Size", "fit", "masks_of", "options"]

#: Ways to read one activation's axes that are tried.
_MOST = 256


@dataclass(frozen=True)
class Size:
    """Of a run.

    Attributes:
        batch: Rows of the batch.
        lengths: Tokens in a row of each text.
        choices: Rows of each text for each row of the batch.
    """

    batch: int
    lengths: tuple[int, ...]
    choices: tuple[int, ...]


@dataclass(frozen=True)
class Axis:
    """What an axis of an activation stands for.

    Attributes:
        kind: ``batch``, ``tokens``, ``rows`` (the batch and its tokens in one axis), ``joined`` (tokens of a text
            beside those of others, or beside places that are no text's), or ``table``: positions that are the same for
            all rows, and more of them for a longer text.
        repeat: How many entries belong to one row of the batch, or to one token where the axis is ``rows``: heads.
        text: Which text's tokens.
        parts: Of a joined axis, in order: a text and 0, or -1 and the number of places that are no text's.
        outer: The entries of one row are not side by side: all rows for the first head, then for the second; or, of
            ``rows``, all rows for the first token.
        side: Of a table's axis, where the table of a shorter text stands in it: ``start``, ``middle`` or ``end``.
    """

    kind: str
    repeat: int = 1
    text: int = 0
    parts: tuple[tuple[int, int], ...] = ()
    outer: bool = False
    side: str = ""


#: One entry for each axis of an activation; ``None`` for an axis that is about neither the batch nor tokens.
Axes = tuple[Axis | None, ...]


@dataclass(frozen=True)
class Fit:
    """The axes of an activation.

    Attributes:
        axes: ``None`` if they cannot be told.
        spilled: Padding changed what is outside of the places that they name.
        why: In words, where they cannot be told.
    """

    axes: Axes | None
    spilled: bool = False
    why: str = ""


def options(first: Sequence[int], second: Sequence[int], one: Size, other: Size) -> list[list[Axis | None]] | str:
    """What each axis can be, the simplest first, or in words why that cannot be told.

    Args:
        first, second: Shapes of the same activation in runs of size ``one`` and ``other``.
    """
    if len(first) != len(second):
        return f"it has {len(first)} axes in one call and {len(second)} in another"
    found = [list(_axis(a, b, one, other)) for a, b in zip(first, second, strict=True)]
    if not any(axis is not None and axis.kind in ("batch", "rows") for each in found for axis in each):
        return [[None] for _ in found]  # a table of positions, the same for every row: no token of it is padding
    if not all(found):
        return f"its axes were {tuple(first)} and then {tuple(second)}, which follows neither the batch nor the length"
    return found


def _axis(a: int, b: int, one: Size, other: Size) -> Iterator[Axis | None]:
    if a == b:
        yield None
        return
    texts = range(len(one.lengths))
    plain = [Axis("tokens", text=i) for i in texts if (a, b) == (one.lengths[i], other.lengths[i])]
    if (repeat := _multiple(a, b, one.batch, other.batch)) is not None:
        plain.append(Axis("batch", repeat))
        if repeat > 1:
            plain.append(Axis("batch", repeat, outer=True))
    for i in texts:
        rows = [size.batch * size.choices[i] * size.lengths[i] for size in (one, other)]
        if (repeat := _multiple(a, b, *rows)) is not None:
            plain.append(Axis("rows", repeat, i))
            if repeat == 1:
                plain.append(Axis("rows", 1, i, outer=True))
    yield from plain or _joined(a, b, one, other)


def _multiple(a: int, b: int, first: int, second: int) -> int | None:
    repeat = a // first if first else 0
    return repeat if repeat and (a, b) == (repeat * first, repeat * second) else None


def _joined(a: int, b: int, one: Size, other: Size) -> Iterator[Axis]:
    """Texts beside one another, in any order, with places that are no text's before, between or after them."""
    texts = range(len(one.lengths))
    for count in range(1, len(one.lengths) + 1):
        for chosen in itertools.permutations(texts, count):
            beside = a - sum(one.lengths[i] for i in chosen)
            if beside < 0 or beside != b - sum(other.lengths[i] for i in chosen):
                continue
            parts = [(i, 0) for i in chosen]
            if not beside:
                yield Axis("joined", parts=tuple(parts))
            elif count == 1:
                for before in sorted(range(beside + 1), key=lambda n: (n not in (0, beside), n)):
                    around = [(-1, before), *parts, (-1, beside - before)]
                    yield Axis("joined", parts=tuple(part for part in around if part != (-1, 0)))
            else:
                for place in reversed(range(count + 1)):
                    yield Axis("joined", parts=(*parts[:place], (-1, beside), *parts[place:]))


def masks_of(axes: Axes, padded: Sequence[Tensor | None], size: Size) -> list[Tensor] | None:
    """What is padding by each axis: boolean, broadcast to the activation; ``None`` if the axes make no sense.

    Args:
        padded: (rows, tokens) of each text, true where padded; ``None`` if nothing of it is.
    """
    rows = [(place, axis) for place, axis in enumerate(axes) if axis is not None and axis.kind == "batch"]
    found: list[Tensor] = []
    lone = True
    for place, axis in enumerate(axes):
        if axis is None or axis.kind == "batch":
            continue
        lone = False
        if axis.kind == "rows":
            part = padded[axis.text]
            if part is not None:
                part = (part.T if axis.outer else part).reshape(-1).repeat_interleave(axis.repeat)
                found.append(_shaped(part, len(axes), place))
            continue
        if len(rows) != 1:
            return None  # which of them would be the tokens' own?
        at, owner = rows[0]
        line = _line(axis, padded, size, owner)
        if isinstance(line, str):
            return None
        if line is not None:
            found.append(_shaped(line, len(axes), at, place))
    if lone:  # no token axis speaks for the rows: those without any token do not count
        for place, axis in rows:
            empty = _empty(padded, size, axis)
            if empty is not None:
                found.append(_shaped(empty, len(axes), place))
    return found


def _shaped(part: Tensor, ndim: int, *places: int) -> Tensor:
    shape = [1] * ndim
    if len(places) == 2 and places[0] > places[1]:
        part, places = part.T, (places[1], places[0])
    for place, length in zip(places, part.shape, strict=True):
        shape[place] = length
    return part.reshape(shape)


def _line(axis: Axis, padded: Sequence[Tensor | None], size: Size, owner: Axis) -> Tensor | str | None:
    """(entries of the batch axis, entries of ``axis``), true where padded."""
    parts = axis.parts or ((axis.text, 0),)
    if all(text < 0 or padded[text] is None for text, _ in parts):
        return None
    device = next(each.device for each in padded if each is not None)
    made = []
    for text, places in parts:
        part = padded[text] if text >= 0 else None
        if part is None:
            length = places if text < 0 else size.lengths[text]
            made.append(torch.zeros(size.batch * owner.repeat, length, dtype=torch.bool, device=device))
            continue
        repeat, over = divmod(owner.repeat, size.choices[text])
        if over:
            return "the batch has not as many entries as the text has rows"
        made.append(_repeated_rows(part, repeat, owner.outer))
    return torch.cat(made, 1) if len(made) > 1 else made[0]


def _repeated_rows(part: Tensor, repeat: int, outer: bool) -> Tensor:
    if repeat == 1:
        return part
    return torch.cat([part] * repeat) if outer else part.repeat_interleave(repeat, 0)


def _empty(padded: Sequence[Tensor | None], size: Size, axis: Axis) -> Tensor | None:
    """(entries of the batch axis), true where no text has a token."""
    if not padded or any(part is None for part in padded):
        return None
    choices = math.lcm(*size.choices)
    if axis.repeat % choices:
        choices = 1
    found: Tensor | None = None
    for part in padded:
        assert part is not None
        rows = part.all(1).reshape(size.batch, -1)
        rows = rows.all(1, keepdim=True).expand(-1, choices) if rows.shape[1] != choices else rows
        found = rows if found is None else found & rows
    assert found is not None
    return _repeated_rows(found.reshape(-1), axis.repeat // choices, axis.outer)


def fit(
    values: Tensor, changed: Tensor, second: Sequence[int], padded: Sequence[Tensor], sizes: tuple[Size, Size]
) -> Fit:
    """The axes of an activation.

    Args:
        values: The activation in a run of the first size.
        changed: Where it was another one when something else stood in the padding.
        second: Its shape in a run of the second size.
        padded: The padding of the first run.
    """
    found = options(values.shape, second, *sizes)
    if isinstance(found, str):
        return Fit(None, why=found)
    spilling: list[Axes] = []
    silent: list[Axes] = []
    for axes in itertools.islice(itertools.product(*found), _MOST):
        masks = masks_of(axes, padded, sizes[0])
        if masks is None:
            continue
        spills = bool((changed & ~_any(masks, changed)).any())
        filled = _filled(values, changed, masks)
        if filled and not spills:
            return Fit(axes)
        if not spills:
            silent.append(axes)
        elif filled:
            spilling.append(axes)
    return _doubtful(silent, spilling)


def _doubtful(silent: list[Axes], spilling: list[Axes]) -> Fit:
    """What to take where padding is not seen in just the places that the axes name."""
    if silent and not _differ(silent):
        return Fit(silent[0])  # what does not depend on all tokens' content, such as their positions
    if spilling and not silent and not _differ(spilling):
        return Fit(spilling[0], spilled=True)
    if not spilling and not silent:
        return Fit(None, why="what stands in padding changes it at places that are not the padding of any text")
    return Fit(None, why="it holds several texts, or a text and something else, and their order cannot be told")


def _differ(found: list[Axes]) -> bool:
    """Whether they name different places: other than by the order of a batch and its heads."""
    return len({tuple(a and (a.kind, a.repeat, a.text, a.parts) for a in axes) for axes in found}) > 1


def _any(masks: Sequence[Tensor], like: Tensor) -> Tensor:
    found = torch.zeros((), dtype=torch.bool, device=like.device)
    for mask in masks:
        found = found | mask
    return found


def _filled(values: Tensor, changed: Tensor, masks: Sequence[Tensor]) -> bool:
    """Whether each padded place changes somewhere, or holds what a masked one does: the same number everywhere."""
    for index, mask in enumerate(masks):
        alive = (mask & ~_any([*masks[:index], *masks[index + 1 :]], changed)).expand_as(changed)
        free = [axis for axis in range(mask.ndim) if mask.shape[axis] == 1]
        seen = (changed & alive).amax(free, keepdim=True) if free else changed & alive
        rest = values[alive & ~seen]
        if rest.numel() and bool((rest != rest[0]).any()):
            return False
    return True
