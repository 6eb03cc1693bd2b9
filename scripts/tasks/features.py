"""Features: what a tokenizer makes of an example, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["IGNORED", "Collator", "Feature", "calibration_batches", "rows"]

#: The label of a token that does not count in the loss.
IGNORED = -100


@dataclass(frozen=True)
class Feature:
    """One row of a batch.

    Attributes:
        inputs: What the model takes, by name; a list with an entry for each token.
        targets: What the loss takes, by name.
        example: Index of the example that this is made from.
        spans: For each token the part of the example that it stands for, first to after last: characters of a context,
            or words of a sentence. ``None`` where it stands for nothing that is predicted.
    """

    inputs: dict[str, list[int]]
    targets: dict[str, int | list[int]]
    example: int
    spans: tuple[tuple[int, int] | None, ...] = ()


def rows(features: Sequence[Feature]) -> list[dict[str, Any]]:
    """The features as a data set for the Trainer."""
    return [{**feature.inputs, **feature.targets} for feature in features]


class Collator:
    """Makes a batch: pads every list to the longest one in it."""

    def __init__(self, tokenizer: Any) -> None:
        self._padding = {
            "input_ids": tokenizer.pad_token_id or 0,
            "token_type_ids": tokenizer.pad_token_type_id,
            "labels": IGNORED,
        }

    def __call__(self, entries: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The entries as tensors, (entries,) or (entries, tokens)."""
        batch = {}
        for name, first in entries[0].items():
            values = [entry[name] for entry in entries]
            if isinstance(first, list):
                longest, padding = max(map(len, values)), self._padding.get(name, 0)
                values = [value + [padding] * (longest - len(value)) for value in values]
            batch[name] = torch.tensor(values)
        return batch


def calibration_batches(
    features: Sequence[Feature], collator: Collator, *, batches: int, size: int, seed: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Batches of inputs, without targets, of features drawn at random."""
    drawn = random.Random(seed).sample(list(features), min(batches * size, len(features)))
    for start in range(0, len(drawn), size):
        batch = collator([dict(feature.inputs) for feature in drawn[start : start + size]])
        yield {name: value.to(device) for name, value in batch.items()}
