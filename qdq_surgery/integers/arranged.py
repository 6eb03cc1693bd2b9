"""Two linears in a row whose integers in between have steps of their own for each channel.

The epilogue of a product rounds with one step. So the rows of the first weight are sorted by the steps that their
results are rounded with, and each part is a product of its own; the results stand in this order, and the columns of the
second weight are sorted alike. Every product is what it was but for the order of its terms, which are integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdq_surgery.integers.onednn import OneDNNProduct

__all__ = ["ArrangedProduct", "Arrangement", "arranged", "by_step"]


@dataclass(frozen=True, eq=False)
class Arrangement:
    """How the integers of a weight are sorted.

    Attributes:
        rows: For each part the numbers of its rows, int64, (rows,); empty if they stay as they are, in one part.
        factors: For each part how many steps of the next grid are 1, float32, ().
        columns: The numbers of the columns in their order, int64, (in_features,); ``None`` if they stay.
    """

    rows: tuple[Tensor, ...] = ()
    factors: tuple[Tensor, ...] = ()
    columns: Tensor | None = None

    def __deepcopy__(self, _: dict[int, Any]) -> Arrangement:
        return self  # nobody writes to it


def by_step(factor: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Numbers of the channels for each different factor of (channels,), the most frequent first; and these factors."""
    values, counts = torch.unique(factor.cpu(), return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    rows = tuple((factor.cpu() == value).nonzero().reshape(-1) for value in values[order])
    return rows, tuple(values[order].unbind())


class _Part(OneDNNProduct):
    """Some rows of a weight. They are chosen when they are packed, and the whole is held as it is until then."""

    def __init__(self, whole: OneDNNProduct, integers: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
        scale = whole.scale if rows is None else whole.scale[rows]
        super().__init__(integers, scale, whole.step, whole.zero_point)
        self.shape = (int(scale.shape[0]), int(integers.shape[1]))
        self.zeros = self.zeros[: self.shape[0]]
        self.rows, self.columns = rows, columns

    def chosen(self, plain: Tensor) -> Tensor:
        plain = plain if self.rows is None else plain[self.rows]
        return super().chosen(plain if self.columns is None else plain[:, self.columns])


class ArrangedProduct(OneDNNProduct):
    """A product whose weight is sorted, from outside as it was: results, scales and integers stand in their old order.

    But for what comes rounded, and for inputs: both are in the order of the arrangement.
    """

    def __init__(
        self, integers: Tensor, scale: Tensor, step: Tensor, zero_point: int, arrangement: Arrangement
    ) -> None:
        super().__init__(integers, scale, step, zero_point)
        self._plain = None  # the parts have it
        self.arrangement = arrangement
        self.parts = tuple(_Part(self, integers, rows, arrangement.columns) for rows in arrangement.rows or (None,))
        order = torch.cat(arrangement.rows) if arrangement.rows else None
        self.back = None if order is None else order.argsort()

    def integers(self) -> Tensor:
        """As they were given, a new tensor."""
        for part in self.parts:
            plain = part._plain
            if plain is not None:
                return plain.clone(memory_format=torch.contiguous_format)
        found = torch.cat([part.integers() for part in self.parts])
        found = found if self.back is None else found[self.back]
        columns = self.arrangement.columns
        return found if columns is None else found[:, columns.argsort()].contiguous()

    def buffers(self) -> dict[str, Tensor]:
        """As there."""
        own = {f"{name}_{at}": each for at, part in enumerate(self.parts) for name, each in part.buffers().items()}
        return {"scale": self.scale, **own}

    def __call__(self, stored: Tensor, bias: Tensor | None, dtype: torch.dtype, activation: str) -> Tensor:
        """As there: results in their old order, which takes a pass."""
        found = [part(stored, self._of(bias, part), dtype, activation) for part in self.parts]
        return found[0] if self.back is None else torch.cat(found, -1).index_select(-1, self.back)

    def rounded(self, stored: Tensor, bias: Tensor | None, activation: str, factor: Tensor, zero_point: int) -> Tensor:
        """As there, each part by its own factor, which ``factor`` holds."""
        factors = self.arrangement.factors or (factor,)
        found = [
            part.rounded(stored, self._of(bias, part), activation, own, zero_point)
            for part, own in zip(self.parts, factors, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def _of(self, bias: Tensor | None, part: _Part) -> Tensor | None:
        return bias if bias is None or part.rows is None else bias.index_select(0, part.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.integers(), self.scale, self.step, self.zero_point, self.arrangement)


def arranged(product: OneDNNProduct, arrangement: Arrangement) -> ArrangedProduct:
    """The same product with its weight sorted; itself if it is."""
    if isinstance(product, ArrangedProduct) and product.arrangement is arrangement:
        return product
    integers = product._plain  # not read before it is needed
    if integers is None:
        integers = product.integers()
    return ArrangedProduct(integers, product.scale, product.step, product.zero_point, arrangement)
