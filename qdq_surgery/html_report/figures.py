"""The figures, as Bokeh's documents. Whoever imports this needs Bokeh.

Colors of text and lines are the page's: it sets them when it draws, and again when dark becomes light.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, FactorRange, HoverTool, LinearColorMapper, LogColorMapper, Range1d
from bokeh.models.annotations.geometry import BoxAnnotation, Span
from bokeh.models.annotations.legends import ColorBar
from bokeh.palettes import Cividis256, RdBu11
from bokeh.plotting import figure
from bokeh.resources import Resources

from qdq_surgery.html_report.bars import VALUES
from qdq_surgery.html_report.cards import Card
from qdq_surgery.sensitivity.parts import LAYER
from qdq_surgery.sensitivity.result import Sensitivity
from qdq_surgery.text.layer_names import layer_in

__all__ = ["costs_figure", "histogram_figure", "outliers_figure", "script"]

#: Colors that can be told apart from white and from black.
_BARS, _RANGE, _DOTS = "#3b82c4", "#e5484d", "#d97706"

#: In the place of a layer, for what is in none.
_OUTSIDE = "none"

#: A whole layer, beside its sites.
_WHOLE = "a whole layer"

_ROW, _HEAD = 22, 110


def script() -> str:
    """Bokeh's own script, whole, as it is put into the page."""
    text: str = Resources(mode="inline", components=["bokeh"], minified=True).js_raw[0]
    return text


def histogram_figure(what: str) -> dict[str, Any]:
    """An empty histogram with a range: the page fills it with the quantizer that is looked at.

    Args:
        what: :data:`~qdq_surgery.html_report.bars.VALUES`, which are counted by their logarithm, because most are next
            to 0; or :data:`~qdq_surgery.html_report.bars.CHANNELS`.
    """
    kind, lowest = ("log", 0.5) if what == VALUES else ("linear", 0.0)
    ranges = {"x_range": Range1d(start=0, end=1), "y_range": Range1d(start=lowest, end=10)}
    plot = _figure(what, 260, "xbox_zoom,reset", y_axis_type=kind, **ranges)
    plot.xaxis.axis_label, plot.yaxis.axis_label = "magnitude", what
    source = ColumnDataSource({"left": [], "right": [], "top": []}, name="bars")
    bars = plot.quad(
        left="left",
        right="right",
        top="top",
        bottom=lowest,
        source=source,
        color=_BARS,
        line_color=_BARS,
        line_width=0.5,
    )
    tips = [("from", "@left{0.0000}"), ("to", "@right{0.0000}"), ("count", "@top{0,0}")]
    plot.add_tools(HoverTool(renderers=[bars], tooltips=tips))
    plot.add_layout(BoxAnnotation(name="beyond", left=1, fill_color=_RANGE, fill_alpha=0.12, line_color=None))
    plot.add_layout(Span(name="range", dimension="height", location=1, line_color=_RANGE, line_width=2))
    return _item(plot)


def costs_figure(
    name: str, found: Sensitivity, cards: Sequence[Card], signed: bool = False, most: int = 60
) -> dict[str, Any] | None:
    """What each site costs, by site and layer; ``None`` where no site and no layer was measured.

    Args:
        name: Of the figure.
        signed: The gain of leaving a site in float, which may be negative; else the error alone in INT8.
        most: Rows; of more the costliest.
    """
    cells = list(_cells(found, cards, signed))
    labels = _labels(site for _, site, _, _ in cells)
    cells = [(layer, labels[site], value, card) for layer, site, value, card in cells]
    if not cells:
        return None
    worst: dict[str, float] = {}
    for _, site, value, _ in cells:
        worst[site] = max(worst.get(site, -math.inf), value)
    kept = set(sorted(worst, key=lambda site: -worst[site])[:most])
    sites = [site for site in worst if site in kept]
    cells = [cell for cell in cells if cell[1] in kept]
    layers = sorted({cell[0] for cell in cells}, key=lambda layer: (layer == _OUTSIDE, layer.zfill(6)))
    height = _HEAD + _ROW * len(sites)
    plot = _figure(
        name,
        height,
        "tap,reset",
        x_range=FactorRange(factors=layers),
        y_range=FactorRange(factors=sites[::-1]),
        x_axis_location="above",
    )
    plot.xaxis.axis_label = "encoder layer"
    columns = dict(zip(("layer", "site", "value", "card"), map(list, zip(*cells, strict=True)), strict=True))
    source = ColumnDataSource(columns, name=f"{name}-cells")
    mapper = _mapper([cell[2] for cell in cells], signed)
    drawn = plot.rect(
        "layer", "site", 0.98, 0.92, source=source, line_color=None, fill_color={"field": "value", "transform": mapper}
    )
    drawn.nonselection_glyph = None
    tips = [("site", "@site"), ("layer", "@layer"), (found.metric, "@value{0.00e+0}")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips))
    plot.add_layout(ColorBar(color_mapper=mapper, width=10, background_fill_color=None), "right")
    return _item(plot)


def outliers_figure(outliers: Mapping[str, Mapping[int, float]], channels: int) -> dict[str, Any] | None:
    """Which channels are outliers where; ``None`` where there are none.

    Args:
        outliers: By site, the ratio to the median channel (or the scale) by channel.
        channels: How many the widest has.
    """
    dots = [(channel, site, ratio) for site, found in outliers.items() for channel, ratio in found.items()]
    if not dots:
        return None
    labels = _labels(site for _, site, _ in dots)
    dots = [(channel, labels[site], ratio) for channel, site, ratio in dots]
    sites = list(dict.fromkeys(labels.values()))
    plot = _figure(
        "outliers",
        _HEAD + _ROW * len(sites),
        "xbox_zoom,reset",
        x_range=Range1d(start=-0.01 * channels, end=1.01 * channels),
        y_range=FactorRange(factors=sites[::-1]),
    )
    plot.xaxis.axis_label = "channel"
    columns = dict(zip(("channel", "site", "ratio"), map(list, zip(*dots, strict=True)), strict=True))
    columns["size"] = [6.0 + 3.0 * math.log2(max(1.0, ratio)) for _, _, ratio in dots]
    drawn = plot.scatter("channel", "site", size="size", source=ColumnDataSource(columns), color=_DOTS, alpha=0.6)
    tips = [("site", "@site"), ("channel", "@channel"), ("times", "@ratio{0.0}")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips))
    return _item(plot)


def _labels(sites: Iterable[str]) -> dict[str, str]:
    """Names without what all of them begin with, and without the word that all end in."""
    names = list(dict.fromkeys(sites))
    paths = [name.split(".") for name in names if name != _WHOLE]
    shared = 0
    while len(paths) > 1 and all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    short = {name: ".".join(name.split(".")[shared:]).removesuffix("_quantizer") for name in names if name != _WHOLE}
    return {name: short.get(name, name) for name in names}


def _cells(found: Sensitivity, cards: Sequence[Card], signed: bool) -> Iterable[tuple[str, str, float, int]]:
    """Layer, site, value and the place of the quantizer among all, -1 of a whole layer."""
    for cost in found.of(LAYER):
        if not math.isfinite(cost.gain if signed else cost.alone):
            continue
        yield str(cost.layers or layer_in(cost.name) or 0), _WHOLE, cost.gain if signed else cost.alone, -1
    for at, card in enumerate(cards):
        value = card.figures.gain if signed else card.figures.alone  # finite, or None
        if value is not None:
            yield _OUTSIDE if card.layer is None else str(card.layer), card.site, value, at


def _mapper(values: Sequence[float], signed: bool) -> LinearColorMapper | LogColorMapper:
    if signed:
        top = max(map(abs, values)) or 1.0
        return LinearColorMapper(palette=RdBu11, low=-top, high=top)
    positive = [value for value in values if value > 0] or [1e-12, 1.0]
    high = max(positive)
    return LogColorMapper(palette=Cividis256, low=max(min(positive), high * 1e-6), high=high, low_color=Cividis256[0])


def _figure(name: str, height: int, tools: str, **options: Any) -> Any:
    plot = figure(name=name, height=height, sizing_mode="stretch_width", tools=tools, **options)
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = None
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.grid.grid_line_alpha = 0.3
    return plot


def _item(plot: Any) -> dict[str, Any]:
    made: dict[str, Any] = dict(json_item(plot))
    return made
