"""Outputs of a runtime that rewrites the graph: as near to the float model's as PyTorch's quantized ones are.

Values inside are fused away there, and a value half-way between two steps may become the other one, as may what follows
from it. Ties alone can move the outputs by a third of what quantization itself changes (all-MiniLM-L6-v2, ONNX Runtime
without optimizations), and the few logits of two texts by more than all of it. So a file is not refused for a distance
that chance explains: whoever has few numbers is given more texts, and what decides is whether the runtime's errors are
the larger ones text by text. What is many times as far as PyTorch's is no chance, in how few texts it may be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Distances", "Texts", "distances", "joined", "other_texts", "rows_of", "together"]

#: Norm of the difference over norm of what quantization changes, up to which nobody asks further.
_SHARE = 0.5
#: Distance to the float model's outputs over that of PyTorch's quantized ones, up to which two are equally near.
_ERROR = 1.1
#: The same, from which on it is no chance.
_FAR = 3.0
#: So many standard errors above _ERROR, the distances of single texts are no chance either.
_SURE = 3.0
#: How many texts that takes: fewer are hardly ever so many standard errors apart.
_FEWEST = 16
#: How many texts are looked at in the end; where they are long, so many tokens, but _FEWEST texts at least.
_MOST, _TOKENS = 64, 1 << 15
#: Tokens that run at once, where the batch itself has not more.
_AT_ONCE = 1 << 12

#: What a text is given as, and what it is masked by.
_MASKS = {
    "input_ids": "attention_mask",
    "inputs_embeds": "attention_mask",
    "decoder_input_ids": "decoder_attention_mask",
    "decoder_inputs_embeds": "decoder_attention_mask",
}

_Arrays: TypeAlias = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Distances:
    """Squared distances of an output, each (texts,); (1,) for one that has no entry for each text.

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
        if not self.error.sum() <= _FAR**2 * self.change.sum():  # so is NaN
            return False
        if len(self.error) < _FEWEST:
            return True
        excess = self.error - _ERROR**2 * self.change
        return bool(excess.sum() <= _SURE * np.sqrt((excess**2).sum()))


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64], without: float) -> float:
    return float(np.sqrt(part.sum() / whole.sum())) if whole.sum() else without


def distances(found: _Arrays, wanted: _Arrays, floating: _Arrays, new: NDArray[np.bool_]) -> dict[str, Distances]:
    """Of each output, by its name.

    Args:
        new: Which texts count, (texts,).
    """

    def squares(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
        apart = (one.astype(np.float64) - other.astype(np.float64)) ** 2
        has_rows = apart.ndim > 0 and apart.shape[0] == len(new)
        made: NDArray[np.float64] = apart.reshape(len(new), -1).sum(1)[new] if has_rows else apart.sum(keepdims=True)
        return made.reshape(-1)

    return {
        name: Distances(
            squares(found[name], value), squares(floating[name], value), squares(found[name], floating[name])
        )
        for name, value in wanted.items()
    }


def joined(parts: Sequence[Distances]) -> Distances:
    """Those of all texts."""
    return Distances(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))


@dataclass(frozen=True)
class Texts:
    """A batch.

    Attributes:
        inputs: Keyword arguments of the model's forward.
        new: Which of its texts were in no batch before, (rows,).
    """

    inputs: Mapping[str, Any]
    new: NDArray[np.bool_]


def rows_of(inputs: Mapping[str, Any]) -> int:
    """How many texts a batch has: the longest first axis, beside which positions for all of them have one entry."""
    return max((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim), default=1)


def other_texts(inputs: Mapping[str, Any]) -> Iterator[Texts]:
    """First the batch itself; then others of the same shapes until there are enough: its tokens in other orders.

    Padding stays where it is. There are no others where no input is a text.
    """
    rows = rows_of(inputs)
    names = [name for name in _MASKS if isinstance(inputs.get(name), Tensor)]
    seen: set[bytes] = set()
    yield Texts(inputs, _new(inputs, names, rows, seen))
    longest = max((inputs[name].shape[1] for name in names if inputs[name].ndim > 1), default=1)
    texts = min(_MOST, max(_FEWEST, _TOKENS // max(1, longest)))
    generator = torch.Generator().manual_seed(0)
    for _ in range(-(-texts // rows) - 1 if names else 0):
        made = {**inputs, **{name: _reordered(inputs[name], inputs.get(_MASKS[name]), generator) for name in names}}
        yield Texts(made, _new(made, names, rows, seen))


def _new(inputs: Mapping[str, Any], names: Sequence[str], rows: int, seen: set[bytes]) -> NDArray[np.bool_]:
    if not names or any(len(inputs[name]) != rows for name in names):
        return np.ones(rows, dtype=bool)
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim and len(value) == rows]
    flat = [value.detach().cpu().reshape(rows, -1).contiguous().view(torch.uint8) for value in tensors]
    found = []
    for row in range(rows):
        key = b"".join(each[row].numpy().tobytes() for each in flat)
        found.append(key not in seen)
        seen.add(key)
    return np.array(found)


def _reordered(tokens: Tensor, mask: Any, generator: torch.Generator) -> Tensor:
    axes = tokens.ndim - (1 if tokens.is_floating_point() else 0)
    flat = tokens.detach().reshape(-1, *tokens.shape[axes - 1 :]).clone()
    known = isinstance(mask, Tensor) and mask.shape == tokens.shape[:axes]
    real = (mask.reshape(flat.shape[:2]) != 0).cpu() if known else torch.ones(flat.shape[:2], dtype=torch.bool)
    for row, own in zip(flat, real, strict=True):
        places = own.nonzero().flatten()
        row[places] = row[places[torch.randperm(len(places), generator=generator)]]
    return flat.reshape(tokens.shape)


def together(texts: Sequence[Texts]) -> Iterator[Texts]:
    """Several batches at once, as many as are not too large; what has no entry for each text is that of the first."""
    if not texts:
        return
    rows = rows_of(texts[0].inputs)
    tokens = max((value.numel() for value in texts[0].inputs.values() if isinstance(value, Tensor)), default=1)
    count = max(1, _AT_ONCE // max(1, tokens))
    for start in range(0, len(texts), count):
        own = texts[start : start + count]
        made = dict(own[0].inputs)
        for name, value in made.items():
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows:
                made[name] = torch.cat([each.inputs[name] for each in own])
        yield Texts(made, np.concatenate([each.new for each in own]))
