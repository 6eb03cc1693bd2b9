"""The sections of a report, made of the views of results: their order, their words, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from qdq_surgery.checkpoint.quantizer_states import versions
from qdq_surgery.html_report.cards import Card, calibration_now
from qdq_surgery.html_report.given import MAKERS, Given
from qdq_surgery.html_report.sizes import sizes, times_table
from qdq_surgery.sensitivity.parts import SITE
from qdq_surgery.surgery.model_state import plan_of
from qdq_surgery.text.view import Column, Part, Result, Table, View, data_words

__all__ = ["Missing", "Section", "missing", "outlier_channels", "sections"]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        key: Its anchor.
        title: Its heading.
        parts: What stands in it, as views have it.
        absent: What makes it, where nothing was given for it.
        figures: Names of the figures that are drawn above the parts.
        folded: Whether the tables are closed at first, because they are long.
        note: What is still to be known of it.
    """

    key: str
    title: str
    parts: tuple[Part, ...] = ()
    absent: str = ""
    figures: tuple[str, ...] = ()
    folded: bool = False
    note: str = ""


@dataclass(frozen=True)
class Missing:
    """What was not given: the argument, and the call that makes it."""

    name: str
    call: str

    def __str__(self) -> str:
        return f"not given: {self.call} makes it, and {self.name}= takes it"


def missing(given: Given) -> tuple[Missing, ...]:
    """All that was not given, in the order of the page; a file's proofs may come with its export."""
    found = [name for name in MAKERS if getattr(given, name) is None]
    if given.export is not None:
        found = [name for name in found if name != "findings" and (name != "parity" or given.export.parity is None)]
    return tuple(Missing(name, MAKERS[name][1]) for name in found)


def sections(model: PreTrainedModel, given: Given, cards: tuple[Card, ...], drawn: Iterable[str]) -> list[Section]:
    """All of them, in order.

    Args:
        drawn: Names of the figures that there are.
    """
    figures, plan = tuple(drawn), plan_of(model)
    absent = {each.name: str(each) for each in missing(given)}
    return [
        Section("converted", "What was converted", plan.view().parts, absent.get("diff", "")),
        Section("quantizers", "Quantizers", tuple(_of_quantizers(model, given))),
        _of_result("sensitivity", "Sensitivity", _folded(given), absent, _named(figures, "costs")),
        Section(
            "outliers",
            "Outlier channels",
            tuple(_outlier_parts(given, cards)),
            "" if given.sensitivity or given.equalization else absent["sensitivity"],
            _named(figures, "outliers"),
        ),
        _of_result("evaluation", "Accuracy against float", given.evaluation, absent, note=_of_the_model_alone(given)),
        _of_result("export", "The exported file", given.export, absent, whole=False),
        _of_result("receipt", "Receipt: what runs in INT8", given.receipt, absent),
        _of_result("parity", "Certificate: the file is the model", given.parity or _part(given, "parity"), absent),
        _of_result("findings", "Fusions", given.findings or _part(given, "findings"), absent),
        _of_result("rounding", "Rounding of weights", given.rounding, absent, folded=True),
        _of_result("equalization", "Scales per channel", given.equalization, absent, folded=True),
        _of_result("tuning", "Tuning", given.tuning, absent),
        Section("sizes", "Sizes and times", tuple(_size_parts(model, given))),
    ]


def outlier_channels(given: Given, cards: Iterable[Card]) -> dict[str, dict[int, float]]:
    """By site, the largest ratio of each outlier channel over the layers; from scales where nothing was measured."""
    sites = {card.name: card.site for card in cards}
    sources: list[tuple[str, Mapping[int, float]]] = []
    if given.sensitivity is not None:
        sources = [(cost.name, cost.outliers) for cost in given.sensitivity.of(SITE)]
    elif given.equalization is not None:
        sources = [(scales.quantizer, scales.outliers) for scales in given.equalization.scales]
    found: dict[str, dict[int, float]] = {}
    for name, outliers in sources:
        for channel, ratio in outliers.items():
            site = found.setdefault(sites.get(name, name), {})
            site[channel] = max(site.get(channel, 0.0), ratio)
    return found


def _of_result(
    key: str,
    title: str,
    result: Result | None,
    absent: Mapping[str, str],
    figures: tuple[str, ...] = (),
    whole: bool = True,
    folded: bool = False,
    note: str = "",
) -> Section:
    if result is None:
        return Section(key, title, absent=absent[key])
    view = result.view()
    return Section(key, title, _titled(view) if whole else (view.title,), "", figures, folded, note)


def _of_the_model_alone(given: Given) -> str:
    """What gives the accuracy of the file, where there is a file and the accuracy is not of one."""
    file = next((each.path.name for each in (given.export, given.receipt) if each is not None), None)
    if file is None or given.evaluation is None or given.evaluation.runtime != "PyTorch":
        return ""
    call = f'qs.evaluate(qs.load_onnx("{file}"), batches, qmodel)'
    return f"of the model in PyTorch; of the file: {call} makes it, and evaluation= takes it"


def _part(given: Given, name: str) -> Result | None:
    return None if given.export is None else getattr(given.export, name)


def _folded(given: Given) -> Result | None:
    return None if given.sensitivity is None else given.sensitivity.folded()


def _titled(view: View) -> tuple[Part, ...]:
    return (view.title, *view.parts)


def _named(figures: Iterable[str], start: str) -> tuple[str, ...]:
    return tuple(each for each in figures if each.startswith(start))


def _of_quantizers(model: PreTrainedModel, given: Given) -> Iterator[Part]:
    calibration = calibration_now(model)
    yield "not calibrated: qs.calibrate(qmodel, batches)" if calibration is None else calibration.view().title
    if given.statistics is None:
        yield f"histograms {Missing('statistics', MAKERS['statistics'][1])}"
    else:
        seen = given.statistics
        yield f"histograms of {data_words(seen.batches, seen.rows, seen.tokens)}"


def _outlier_parts(given: Given, cards: Iterable[Card]) -> Iterator[Part]:
    if given.sensitivity is None and given.equalization is None:
        return
    what = "times the median channel" if given.sensitivity is not None else "scale"
    found = outlier_channels(given, cards)
    if not found:
        yield "none was found"
        return
    rows = tuple(
        (site, ", ".join(f"{channel} ({ratio:.3g} x)" for channel, ratio in sorted(each.items(), key=lambda p: -p[1])))
        for site, each in found.items()
    )
    yield Table((Column("site"), Column(f"channels, and how many {what}")), rows)


def _size_parts(model: PreTrainedModel, given: Given) -> Iterator[Part]:
    yield sizes(model, given.export)
    yield times_table(given.times) if given.times else "times not given: times={name of a step: seconds} takes them"
    yield f"made by {', '.join(f'{name} {number}' for name, number in versions().items())}"
