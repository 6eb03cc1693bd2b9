"""The figures, as Bokeh's documents. Whoever imports this needs Bokeh.

Colors of text and lines are the page's: it sets them when it draws, and again when dark becomes light.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, FactorRange, HoverTool, LinearColorMapper, LogColorMapper, Range1d
from bokeh.models.annotations.geometry import BoxAnnotation, Span
from bokeh.models.annotations.legends import ColorBar
from bokeh.palettes import Cividis256, RdBu11
from bokeh.plotting import figure
from bokeh.resources import Resources

from qdq_surgery.html_report.bars import VALUES
from qdq_surgery.html_report.heat_map import HeatMap, labels

__all__ = ["costs_figure", "histogram_figure", "outliers_figure", "script"]

#: Colors that can be told apart from white and from black.
_BARS, _RANGE, _DOTS = "#3b82c4", "#e5484d", "#d97706"

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


def costs_figure(name: str, found: HeatMap, metric: str, signed: bool = False) -> dict[str, Any]:
    """What each site costs, by site and layer.

    Args:
        name: Of the figure.
        metric: What the values are of.
        signed: Whether they may be negative.
    """
    plot = _figure(
        name,
        _HEAD + _ROW * len(found.sites),
        "tap,reset",
        x_range=FactorRange(factors=list(found.layers)),
        y_range=FactorRange(factors=list(found.sites[::-1])),
        x_axis_location="above",
    )
    plot.xaxis.axis_label = "encoder layer"
    columns = {key: [getattr(cell, key) for cell in found.cells] for key in ("layer", "site", "value", "card")}
    source = ColumnDataSource(columns, name=f"{name}-cells")
    mapper = _mapper(columns["value"], signed)
    drawn = plot.rect(
        "layer", "site", 0.98, 0.92, source=source, line_color=None, fill_color={"field": "value", "transform": mapper}
    )
    drawn.nonselection_glyph = None
    tips = [("site", "@site"), ("layer", "@layer"), (metric, "@value{0.00e+0}")]
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
    short = labels(site for _, site, _ in dots)
    dots = [(channel, short[site], ratio) for channel, site, ratio in dots]
    sites = list(dict.fromkeys(short.values()))
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
