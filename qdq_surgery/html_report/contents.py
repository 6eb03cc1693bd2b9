"""What goes into the page: figures, sections, headlines and data. Whoever imports this needs the extra ``report``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

from qdq_surgery.html_report.bars import CHANNELS, VALUES
from qdq_surgery.html_report.blocks import tree_of
from qdq_surgery.html_report.cards import Card
from qdq_surgery.html_report.figures import costs_figure, histogram_figure, outliers_figure, script
from qdq_surgery.html_report.given import Given
from qdq_surgery.html_report.heat_map import HeatMap, heat_map
from qdq_surgery.html_report.page import render
from qdq_surgery.html_report.sections import outlier_channels, sections
from qdq_surgery.surgery.model_state import plan_of

__all__ = ["page_of"]

#: Of the heat maps.
_ALONE, _GAIN = "costs-alone", "costs-gain"


def page_of(model: PreTrainedModel, given: Given, cards: tuple[Card, ...], title: str) -> str:
    """The text of the page."""
    maps = _maps(given, cards)
    figures = _figures(given, cards, maps)
    plan = plan_of(model)
    values = {
        "title": title,
        "plan": plan,
        "headlines": list(_headlines(given, cards)),
        "sections": sections(model, given, cards, figures),
        "blocks": [] if given.diff is None else tree_of(given.diff, cards),
        "cards": cards,
        "maps": maps,
        "rules": list(dict.fromkeys(card.rule for card in cards)),
        "measured": any(card.figures.alone is not None for card in cards),
        "metric": "" if given.sensitivity is None else given.sensitivity.metric,
    }
    data = {
        "cards": [card.to_json() for card in cards],
        "figures": {**figures, **{what: histogram_figure(what) for what in (VALUES, CHANNELS)}},
    }
    return render(values, data, script())


def _maps(given: Given, cards: tuple[Card, ...]) -> dict[str, HeatMap]:
    """By the name of the figure."""
    costs = given.sensitivity
    if costs is None:
        return {}
    found = {_ALONE: heat_map(costs, cards), _GAIN: heat_map(costs, cards, signed=True)}
    return {name: each for name, each in found.items() if each is not None}


def _figures(given: Given, cards: tuple[Card, ...], maps: Mapping[str, HeatMap]) -> dict[str, Any]:
    metric = "" if given.sensitivity is None else given.sensitivity.metric
    found: dict[str, Any] = {name: costs_figure(name, each, metric, name == _GAIN) for name, each in maps.items()}
    outliers = outlier_channels(given, cards)
    widest = max((channel + 1 for each in outliers.values() for channel in each), default=1)
    dots = outliers_figure(outliers, widest)
    return found if dots is None else {**found, "outliers": dots}


def _headlines(given: Given, cards: tuple[Card, ...]) -> Iterator[tuple[str, str, str]]:
    """Anchor, figure and words of what is looked at first."""
    yield "quantizers", str(len(cards)), "quantizers"
    if given.evaluation is not None:
        words = f"{given.evaluation.metric} against float"
        yield "evaluation", f"{given.evaluation.loss:.3g}", ", ".join(filter(None, (words, given.evaluation.where)))
    linear = None if given.receipt is None else given.receipt.linear
    if linear is not None:
        yield "receipt", f"{100 * linear:.4g} %", "of the linears in INT8"
    parity = given.parity or (None if given.export is None else given.export.parity)
    if parity is not None:
        yield "parity", "agrees" if parity.agrees else "differs", "the file, with PyTorch"
    if given.export is not None and given.export.path.exists():
        yield "export", f"{given.export.path.stat().st_size / 1e6:.3g} MB", given.export.path.name
