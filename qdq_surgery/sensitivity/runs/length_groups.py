"""The user's batches, their rows put together anew by length: what runs hundreds of times is to hold little padding."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdq_surgery.calibration.batches import prepared
from qdq_surgery.errors import QdqSurgeryError
from qdq_surgery.hf.config_facts import chunk_size, configs_of
from qdq_surgery.padding.row_lengths import RowBatch, joined, row_batch
from qdq_surgery.sensitivity.output_error import compared_rows, main_outputs

__all__ = ["Group", "length_groups"]

#: A row of a batch.
_Row: TypeAlias = tuple[RowBatch, int]

#: Batches that are looked at together, and the bytes after which no more of them are read ahead.
_WINDOW, _BYTES = 64, 1 << 28

#: Tokens of a group, where the user's own batches are smaller.
_TOKENS = 2048

#: A group of fewer tokens costs more than it saves, so shorter rows join it.
_FEW = 512

#: A row this much shorter than the group's longest begins another group.
_SHORTER = 0.75

#: What has to be saved: tokens, and their share.
_LEAST, _LEAST_SHARE = 256, 0.1

#: Outputs of rows with more and with less padding differ by rounding, in shares of the largest value ...
_ROUNDING = 1e-3
#: ... or in steps of a number of half precision.
_STEPS = 8


@dataclass(frozen=True)
class Group:
    """What is run at once.

    Attributes:
        inputs: Keyword arguments of the model's forward.
        name: Which of the user's batches it is of, for messages.
        batches: How many of these it stands for.
    """

    inputs: dict[str, Any]
    name: str
    batches: float = 1.0


def length_groups(
    model: PreTrainedModel, batches: Iterable[Any], run: Callable[[Mapping[str, Any]], Any] | None
) -> Iterator[Group]:
    """The batches, or their rows sorted by length where that saves padding and changes nothing.

    Args:
        model: Whose arguments they are.
        batches: As the user gave them.
        run: The float model. Whether its outputs depend on how much padding stands beside a row is not guessed: two
            runs are compared. ``None``: the batches stay as they are.

    Raises:
        CalibrationError: The model cannot be called with a batch; names it.
    """
    numbered = ((index, prepared(model, batch, index)) for index, batch in enumerate(batches))
    free = run is not None and not getattr(model.config, "is_encoder_decoder", False)
    while window := _read_ahead(numbered) if free else list(itertools.islice(numbered, 1)):
        groups = _by_length(model, [inputs for _, inputs in window], run) if free and run is not None else None
        if groups is None:
            yield from (Group(inputs, f"batch {index}") for index, inputs in window)
            continue
        first, last = window[0][0], window[-1][0]
        name = f"batch {first}" if first == last else f"batches {first} to {last}"
        yield from (Group(inputs, f"{name}, rows sorted by length", len(window) / len(groups)) for inputs in groups)


def _read_ahead(numbered: Iterator[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    found: list[tuple[int, dict[str, Any]]] = []
    held = 0
    while len(found) < _WINDOW and held < _BYTES:
        each = next(numbered, None)
        if each is None:
            break
        found.append(each)
        held += sum(value.nbytes for value in each[1].values() if isinstance(value, Tensor))
    return found


def _by_length(
    model: PreTrainedModel, window: list[dict[str, Any]], run: Callable[[Mapping[str, Any]], Any]
) -> list[dict[str, Any]] | None:
    """The groups; ``None`` if the batches are to stay as they are."""
    found = [row_batch(each) for each in window]
    batches = [each for each in found if each is not None]
    if len(batches) < len(found) or len({each.form for each in batches}) > 1:
        return None
    chunk = chunk_size(*configs_of(model))
    rows = [(batch, row) for batch in batches for row in range(len(batch.lengths))]
    groups = list(_groups(rows, chunk, max(_TOKENS, *(batch.size for batch in batches))))
    before, after = sum(batch.size for batch in batches), sum(_size(own, chunk) for own in groups)
    if before - after < max(_LEAST, _LEAST_SHARE * before):
        return None
    if _reads_padding(model, max(batches, key=lambda batch: batch.size - sum(batch.lengths)), chunk, run):
        return None
    return [joined(own, _width(own, chunk)) for own in groups]


def _groups(rows: list[_Row], chunk: int, most: int) -> Iterator[list[_Row]]:
    """The longest first, so that what is too large for the memory is so at once."""
    own: list[_Row] = []
    for row in sorted(rows, key=lambda row: -_length(row)):
        shorter = own and _length(row) < _SHORTER * _length(own[0]) and _size(own, chunk) >= _FEW
        if own and (shorter or _size([*own, row], chunk) > most):
            yield own
            own = []
        own.append(row)
    yield own


def _length(row: _Row) -> int:
    batch, number = row
    return batch.lengths[number]


def _width(rows: list[_Row], chunk: int) -> int:
    """Tokens of the longest, in whole chunks."""
    return max(1, -(-max(map(_length, rows)) // chunk)) * chunk


def _size(rows: list[_Row], chunk: int) -> int:
    return len(rows) * rows[0][0].text.choices * _width(rows, chunk)


def _reads_padding(
    model: PreTrainedModel, batch: RowBatch, chunk: int, run: Callable[[Mapping[str, Any]], Any]
) -> bool:
    """Whether the shorter half of the rows has other outputs alone and cut to their length; also if that is unknown."""
    order = sorted(((batch, row) for row in range(len(batch.lengths))), key=_length)
    half = order[: max(1, len(order) // 2)]
    whole, cut = joined(order, batch.text.length), joined(half, _width(half, chunk))
    try:
        pairs = zip(_compared(model, whole, run), _compared(model, cut, run), strict=True)
        return not all(_near(more[: less.shape[0], : less.shape[1]], less) for more, less in pairs)
    except (QdqSurgeryError, RuntimeError, ValueError, IndexError, TypeError):
        return True  # whatever is wrong is said when the batch itself runs


def _compared(
    model: PreTrainedModel, inputs: Mapping[str, Any], run: Callable[[Mapping[str, Any]], Any]
) -> list[Tensor]:
    outputs = run(inputs)
    return [compared_rows(model, inputs, *part, "mse") for part in main_outputs(outputs)]


def _near(more: Tensor, less: Tensor) -> bool:
    if more.shape != less.shape:
        return False
    allowed = max(_ROUNDING, _STEPS * torch.finfo(less.dtype).eps if less.is_floating_point() else 0.0)
    return bool((more.float() - less.float()).abs().max() <= allowed * less.float().abs().max())
