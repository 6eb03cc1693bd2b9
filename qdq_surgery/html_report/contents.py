"""What goes into the page: figures, sections, headlines and data. Whoever imports this needs the extra ``report``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from qdq_surgery.html_report.bars import CHANNELS, VALUES
from qdq_surgery.html_report.blocks import tree_of
from qdq_surgery.html_report.cards import Card
from qdq_surgery.html_report.figures import costs_figure, histogram_figure, outliers_figure, script
from qdq_surgery.html_report.given import Given
from qdq_surgery.html_report.page import render
from qdq_surgery.html_report.sections import outlier_channels, sections
from qdq_surgery.surgery.model_state import plan_of

__all__ = ["page_of"]


def page_of(model: PreTrainedModel, given: Given, cards: tuple[Card, ...], title: str) -> str:
    """The text of the page."""
    figures = _figures(given, cards)
    plan = plan_of(model)
    values = {
        "title": title,
        "plan": plan,
        "headlines": list(_headlines(given, cards)),
        "sections": sections(model, given, cards, figures),
        "blocks": [] if given.diff is None else tree_of(given.diff, cards),
        "cards": cards,
        "rules": list(dict.fromkeys(card.rule for card in cards)),
        "measured": any(card.figures.alone is not None for card in cards),
        "metric": "" if given.sensitivity is None else given.sensitivity.metric,
    }
    data = {
        "cards": [card.to_json() for card in cards],
        "figures": {**figures, **{what: histogram_figure(what) for what in (VALUES, CHANNELS)}},
    }
    return render(values, data, script())


def _figures(given: Given, cards: tuple[Card, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if given.sensitivity is not None:
        found["costs-alone"] = costs_figure("costs-alone", given.sensitivity, cards)
        found["costs-gain"] = costs_figure("costs-gain", given.sensitivity, cards, signed=True)
    outliers = outlier_channels(given, cards)
    widest = max((channel + 1 for each in outliers.values() for channel in each), default=1)
    found["outliers"] = outliers_figure(outliers, widest)
    return {name: figure for name, figure in found.items() if figure is not None}


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
