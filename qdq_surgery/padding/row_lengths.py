"""Rows of batches by their length: which of them can run together, and the batch that they then make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdq_surgery.errors import CalibrationError
from qdq_surgery.padding.token_masks import Text, texts_of, token_names

__all__ = ["RowBatch", "joined", "row_batch"]

_MASK = "attention_mask"


@dataclass(frozen=True)
class RowBatch:
    """A batch in which everything has an entry for each row.

    Attributes:
        inputs: The model's arguments.
        text: The only text in it.
        names: Those of the arguments that have an entry for each token, too.
        lengths: Up to the last token of each row.
        form: Equal for batches whose rows may be joined.
    """

    inputs: Mapping[str, Any]
    text: Text
    names: frozenset[str]
    lengths: tuple[int, ...]
    form: tuple[Any, ...]

    @property
    def axis(self) -> int:
        """That of the tokens."""
        return len(self.text.shape) - 1

    @property
    def size(self) -> int:
        """Tokens, padding counted."""
        return int(torch.Size(self.text.shape).numel())


def row_batch(batch: Mapping[str, Any]) -> RowBatch | None:
    """What a batch's rows are; ``None`` if it has none that could be told apart.

    Args:
        batch: Keyword arguments of the forward of a model that is no encoder-decoder.
    """
    try:
        texts = texts_of(batch)
    except CalibrationError:
        return None
    if len(texts) != 1 or texts[0].mask != _MASK or not torch.Size(texts[0].shape).numel():
        return None
    text = texts[0]
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if any(not value.ndim or value.shape[0] != text.shape[0] for value in tensors.values()):
        return None
    names, axis = frozenset(token_names(batch, text)), len(text.shape) - 1
    places = torch.arange(1, text.length + 1, device=batch[text.mask].device)
    ends = ((batch[text.mask] != 0) * places).reshape(text.shape[0], -1).amax(1)
    form = tuple(
        (name, _form(value, axis if name in names else None) if isinstance(value, Tensor) else repr(value))
        for name, value in sorted(batch.items())
    )
    return RowBatch(batch, text, names, tuple(map(int, ends.tolist())), form)


def _form(value: Tensor, tokens: int | None) -> tuple[Any, ...]:
    free = {0, tokens}
    return value.dtype, value.device, tuple(-1 if axis in free else size for axis, size in enumerate(value.shape))


def joined(rows: Sequence[tuple[RowBatch, int]], width: int) -> dict[str, Any]:
    """One batch of rows of several.

    Args:
        rows: Batches of one form, and the number of a row in it.
        width: Tokens; at least as many as the longest row has. Where a batch is narrower, its last column is repeated,
            as padding.
    """
    parts = [(batch, [row for _, row in own]) for batch, own in _runs(rows)]
    first = rows[0][0]
    return {
        name: torch.cat([_part(batch, name, chosen, width) for batch, chosen in parts])
        if isinstance(value, Tensor)
        else value
        for name, value in first.inputs.items()
    }


def _runs(rows: Iterable[tuple[RowBatch, int]]) -> list[tuple[RowBatch, list[tuple[RowBatch, int]]]]:
    found: list[tuple[RowBatch, list[tuple[RowBatch, int]]]] = []
    for each in rows:
        if not found or found[-1][0] is not each[0]:
            found.append((each[0], []))
        found[-1][1].append(each)
    return found


def _part(batch: RowBatch, name: str, rows: list[int], width: int) -> Tensor:
    value: Tensor = batch.inputs[name]
    chosen = value.index_select(0, torch.tensor(rows, device=value.device))
    if name not in batch.names:
        return chosen
    chosen = chosen.narrow(batch.axis, 0, min(width, batch.text.length))
    more = width - batch.text.length
    if more <= 0:
        return chosen
    last = chosen.narrow(batch.axis, batch.text.length - 1, 1)
    filling = torch.zeros_like(last) if name == batch.text.mask else last
    return torch.cat([chosen, *[filling] * more], batch.axis)
