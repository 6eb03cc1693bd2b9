"""What each site costs, by site and encoder layer: what the heat map draws, and the table beside it says."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qdq_surgery.html_report.cards import Card
from qdq_surgery.sensitivity.parts import LAYER
from qdq_surgery.sensitivity.result import Sensitivity
from qdq_surgery.text.layer_names import layer_in

__all__ = ["Cell", "HeatMap", "heat_map", "labels"]

#: In the place of a layer, for what is in none.
_OUTSIDE = "none"

#: A whole layer, beside its sites.
_WHOLE = "a whole layer"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        layer: Index of the encoder layer, or a word for what is in none.
        site: Short name of the site in every layer, or words for a whole layer.
        value: Of the metric.
        card: The place of the quantizer among all, -1 of a whole layer.
    """

    layer: str
    site: str
    value: float
    card: int


@dataclass(frozen=True)
class HeatMap:
    """Cells by site and layer.

    Attributes:
        words: What the values are.
        layers: Columns.
        sites: Rows, from above.
    """

    words: str
    layers: tuple[str, ...]
    sites: tuple[str, ...]
    cells: tuple[Cell, ...]

    def at(self, layer: str, site: str) -> list[Cell]:
        """The cells there: none, one, or those of layers of the same index in an encoder and a decoder."""
        return self._places.get((layer, site), [])

    @functools.cached_property
    def _places(self) -> Mapping[tuple[str, str], list[Cell]]:
        found: dict[tuple[str, str], list[Cell]] = {}
        for each in self.cells:
            found.setdefault((each.layer, each.site), []).append(each)
        return found


def heat_map(found: Sensitivity, cards: Sequence[Card], signed: bool = False, most: int = 60) -> HeatMap | None:
    """What each site costs, by site and layer; ``None`` where no site and no layer was measured.

    Args:
        signed: The gain of leaving a site in float, which may be negative; else the error alone in INT8.
        most: Rows; of more the costliest.
    """
    cells = list(_cells(found, cards, signed))
    if not cells:
        return None
    short = labels(cell.site for cell in cells)
    cells = [Cell(cell.layer, short[cell.site], cell.value, cell.card) for cell in cells]
    worst: dict[str, float] = {}
    for cell in cells:
        worst[cell.site] = max(worst.get(cell.site, -math.inf), cell.value)
    kept = set(sorted(worst, key=lambda site: -worst[site])[:most])
    cells = [cell for cell in cells if cell.site in kept]
    layers = sorted({cell.layer for cell in cells}, key=lambda layer: (layer == _OUTSIDE, layer.zfill(6)))
    words = "gain in float alone" if signed else "in INT8 alone"
    return HeatMap(words, tuple(layers), tuple(site for site in worst if site in kept), tuple(cells))


def labels(sites: Iterable[str]) -> dict[str, str]:
    """Names without what all of them begin with, and without the word that all end in."""
    names = list(dict.fromkeys(sites))
    paths = [name.split(".") for name in names if name != _WHOLE]
    shared = 0
    while len(paths) > 1 and all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    short = {name: ".".join(name.split(".")[shared:]).removesuffix("_quantizer") for name in names if name != _WHOLE}
    return {name: short.get(name, name) for name in names}


def _cells(found: Sensitivity, cards: Sequence[Card], signed: bool) -> Iterator[Cell]:
    for cost in found.of(LAYER):
        value = cost.gain if signed else cost.alone
        if math.isfinite(value):
            yield Cell(str(cost.layers or layer_in(cost.name) or 0), _WHOLE, value, -1)
    for at, card in enumerate(cards):
        one = card.figures.gain if signed else card.figures.alone  # finite, or None
        if one is not None:
            yield Cell(_OUTSIDE if card.layer is None else str(card.layer), card.site, one, at)
