"""Outputs of a runtime that rewrites the graph: as near to the float model's as PyTorch's quantized ones are.

Values inside are fused away there, and a value half-way between two steps may become the other one, as may what follows
from it. Ties alone can move the outputs by a third of what quantization itself changes (all-MiniLM-L6-v2, ONNX Runtime
without optimizations), and the few logits of two texts by more than all of it. So a file is not refused for a distance
that chance explains: whoever has few numbers is given more texts, and what decides is whether the runtime's errors are
the larger ones text by text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Distances", "distances", "joined", "other_texts", "together"]

#: Norm of the difference over norm of what quantization changes, up to which nobody asks further.
_SHARE = 0.5
#: Distance to the float model's outputs over that of PyTorch's quantized ones, up to which two are equally near.
_ERROR = 1.1
#: So many standard errors above that, the distances of single texts are no chance.
_SURE = 3.0
#: How many texts that takes: fewer never are so many standard errors apart.
_FEWEST = 16
#: The same as ``_ERROR``, where there are no more texts.
_ERROR_OF_FEW = 3.0
#: How many texts are looked at in the end.
_TEXTS = 64

#: What a text is given as, and what it is masked by.
_MASKS = {
    "input_ids": "attention_mask",
    "inputs_embeds": "attention_mask",
    "decoder_input_ids": "decoder_attention_mask",
    "decoder_inputs_embeds": "decoder_attention_mask",
}

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Distances:
    """Squared distances of outputs, each (rows,): one number for each text.

    Attributes:
        apart: The runtime's from PyTorch's.
        change: PyTorch's from the float model's: what quantization changes.
        error: The runtime's from the float model's.
    """

    apart: NDArray[np.float64]
    change: NDArray[np.float64]
    error: NDArray[np.float64]

    @property
    def share(self) -> float:
        """Norm of the difference over norm of what quantization changes; 0 where it changes nothing."""
        return _ratio(self.apart, self.change, 0.0)

    @property
    def nearness(self) -> float:
        """Distance to the float model over that of PyTorch's quantized one; 1 where quantization changes nothing."""
        return _ratio(self.error, self.change, 1.0)

    @property
    def near(self) -> bool:
        """Whether all texts together are so near that there is no question."""
        change = self.change.sum()
        return bool(self.apart.sum() <= _SHARE**2 * change or self.error.sum() <= _ERROR**2 * change)

    @property
    def explained(self) -> bool:
        """Whether it may be chance that the runtime's outputs are farther from the float model's than PyTorch's."""
        if len(self.error) < _FEWEST:
            return bool(self.error.sum() <= _ERROR_OF_FEW**2 * self.change.sum())
        if not np.isfinite(self.error).all():
            return False
        excess = self.error - _ERROR**2 * self.change
        return bool(excess.sum() <= _SURE * np.sqrt((excess**2).sum()))


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64], without: float) -> float:
    return float(np.sqrt(part.sum() / whole.sum())) if whole.sum() else without


def distances(found: Arrays, wanted: Arrays, floating: Arrays, rows: int) -> Distances:
    """Of outputs by name; what has no entry for each of ``rows`` counts with the first."""

    def squares(one: Arrays, other: Arrays) -> NDArray[np.float64]:
        total = np.zeros(rows)
        for name, value in wanted.items():
            apart = (one[name].astype(np.float64) - other[name].astype(np.float64)) ** 2
            if value.ndim and value.shape[0] == rows:
                total += apart.reshape(rows, -1).sum(1)
            else:
                total[0] += apart.sum()
        return total

    return Distances(squares(found, wanted), squares(floating, wanted), squares(found, floating))


def joined(parts: Sequence[Distances]) -> Distances:
    """Those of all texts."""
    return Distances(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))


def other_texts(inputs: Mapping[str, Any], rows: int) -> Iterator[dict[str, Any]]:
    """Batches of the same shapes, so many that there are enough texts: the same tokens in other orders.

    Padding stays where it is. There are none where no input is a text.

    Args:
        rows: Texts in each batch.
    """
    names = [name for name in _MASKS if isinstance(inputs.get(name), Tensor)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(-(-_TEXTS // rows) - 1 if names else 0):
        yield {**inputs, **{name: _reordered(inputs[name], inputs.get(_MASKS[name]), generator) for name in names}}


def _reordered(tokens: Tensor, mask: Any, generator: torch.Generator) -> Tensor:
    axes = tokens.ndim - (1 if tokens.is_floating_point() else 0)
    flat = tokens.reshape(-1, *tokens.shape[axes - 1 :]).clone()
    known = isinstance(mask, Tensor) and mask.shape == tokens.shape[:axes]
    real = (mask.reshape(flat.shape[:2]) != 0).cpu() if known else torch.ones(flat.shape[:2], dtype=torch.bool)
    for row, own in zip(flat, real, strict=True):
        places = own.nonzero().flatten()
        row[places] = row[places[torch.randperm(len(places), generator=generator)]]
    return flat.reshape(tokens.shape)


def together(batches: Sequence[Mapping[str, Any]], rows: int) -> dict[str, Any]:
    """One batch of several with the same arguments; what has no entry for each text is that of the first."""
    made = dict(batches[0])
    for name, value in made.items():
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows:
            made[name] = torch.cat([batch[name] for batch in batches])
    return made
