"""What results show: one model of it for every result, and its drawings in text and HTML."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import rich
from architectures import batch_for, build
from rich.console import Console

import qdq_surgery as qs
from qdq_surgery.html_report.report import Report
from qdq_surgery.html_report.sections import Missing
from qdq_surgery.onnx_export import Export
from qdq_surgery.onnx_graph.findings import Finding, Findings
from qdq_surgery.prove.parity import Check, Parity, SiteCheck
from qdq_surgery.prove.receipt import Gemm, Leftover, Receipt
from qdq_surgery.text.view import Column, Line, Result, Table, View, line, number

HOSTILE = "<script>alert('&')</script>"


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


class Shown(Result):
    """A result of any view."""

    def __init__(self, *parts: str | Line | Table | View, title: Line | None = None) -> None:
        self.title, self.parts = title or line("title"), parts

    def to_json(self) -> dict[str, object]:
        return {"schema": 1}

    def _title(self) -> Line:
        return self.title

    def _parts(self) -> tuple[str | Line | Table | View, ...]:
        return self.parts


def results() -> dict[str, Result]:
    model = build("bert", "BertModel", num_hidden_layers=1)
    qmodel, scaled = qs.convert(model), qs.convert(model, "qdqbert-scaled")
    statistics = qs.collect(qmodel, [batch_for(qmodel, (2, 6))])
    calibrated = qs.convert(model)
    qs.calibrate(calibrated, statistics)
    finding = Finding("blocks", "Attention", "it reads [a, b]", "leave.0.out", ("m.0.q",), ("m.0/MatMul",))
    findings = Findings("BertModel", "onnxruntime", 2, (finding, Finding("note", "None", "of the model")))
    site = SiteCheck("m.q", 5, 1, 2, 3.5)
    checks = (Check("ort", "1", (site,), {"x": 0.5}, None, None, False), Check("ov", "2", (), {"x": 0.0}, 0.1, 1, True))
    parity = Parity("BertModel", checks, ("TensorRT",))
    gemms = (Gemm("a.0", "a", "linear", 8, "int", True, None), Gemm("b.1", "b", "head", 8, "float", False, "not asked"))
    file = Path("model.onnx")
    return {
        "Plan": qs.plan(model),
        "Diff": qs.diff(model, qmodel),
        "Statistics": statistics,
        "Calibration": qs.calibrate(qmodel, statistics),
        "Sensitivity": qs.sensitivity(calibrated, [batch_for(qmodel, (2, 6))], sites=False, layers=False),
        "Evaluation": qs.evaluate(calibrated, [batch_for(qmodel, (2, 6))]),
        "Tuning": qs.tune(model, [batch_for(model, (2, 6))], "linear-only"),
        "Rounding": qs.round_weights(calibrated, [batch_for(qmodel, (2, 6))]),
        "Equalization": qs.equalize(scaled, [batch_for(scaled, (2, 6))]),
        "Explanation": qs.explain(qmodel, "encoder.layer.0"),
        "Findings": findings,
        "Parity": parity,
        "Receipt": Receipt(file, "ort", "1", (1, 8), gemms, (Leftover("n", ("m.0.q",), "no kernel"),), ("s",), ("u",)),
        "Export": Export(file, "onnxruntime", 20, (), findings, parity),
        "Report": Report(Path("r.html"), 1_500_000, 40, ("diff",), (Missing("tuning", "qs.tune(model, batches)"),)),
    }


@pytest.fixture(scope="module")
def made() -> dict[str, Result]:
    return results()


def test_these_are_all_results(made: dict[str, Result]) -> None:
    ours = {each.__name__ for each in Result.__subclasses__() if each.__module__.startswith("qdq_surgery")}
    assert ours == made.keys()


NAMES = [
    *("Plan", "Diff", "Statistics", "Calibration", "Equalization", "Explanation", "Findings", "Parity", "Receipt"),
    *("Export", "Sensitivity", "Evaluation", "Tuning", "Rounding", "Report"),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_result_has_a_view(name: str, made: dict[str, Result]) -> None:
    result = made[name]
    assert type(result).__name__ == name
    view = result.view()
    assert view == result.view()
    assert view.parts
    assert result.to_text(500).splitlines()[0] == str(view.title)
    assert repr(result) == f"<{name}: {view.title}>"
    assert json.loads(json.dumps(result.to_json()))["schema"] == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [40, 80])
def test_every_text_fits(name: str, width: int, made: dict[str, Result]) -> None:
    text = made[name].to_text(width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text


@pytest.mark.parametrize("name", NAMES)
def test_every_page_says_what_the_text_says(name: str, made: dict[str, Result]) -> None:
    result = made[name]
    page = Page(result._repr_html_())  # type: ignore[operator]
    assert set(page.tags) <= {"div", "span", "br", "table", "tr", "th", "td"}
    assert page.attributes == {"style"}
    shown = "".join(page.text.split())
    said = [word for row in result.to_text(500).splitlines() for word in row.split() if set(word) != {"-"}]
    assert [word for word in said if word not in shown] == []


def test_the_verdict_is_in_the_json(made: dict[str, Result]) -> None:
    assert made["Parity"].to_json()["agrees"] is False
    assert made["Export"].to_json()["parity"]["schema"] == 1


@pytest.mark.parametrize(
    "part",
    [
        HOSTILE,
        line(HOSTILE),
        line((HOSTILE, "bold red")),
        Table((Column(HOSTILE),), ()),
        Table((Column("a"),), ((HOSTILE,),)),
        Table((Column("a"),), (((line("b"), line(HOSTILE, indent=4)),),)),
        View(line(HOSTILE)),
    ],
    ids=["note", "line", "style", "header", "cell", "lines", "title"],
)
def test_names_are_text_in_html(part: str | Line | Table | View) -> None:
    page = Page(Shown(part)._repr_html_())
    assert "script" not in page.tags
    assert HOSTILE in page.text
    assert HOSTILE in Shown(part).to_text()


@pytest.mark.parametrize("part", ["[bold]a[/bold] :smile:", "[of 1]", "[/]"])
def test_nothing_is_markup_in_text(part: str) -> None:
    table = Table((Column(part),), ((part,),))
    assert Shown(part, line(part), table).to_text().splitlines() == ["title", part, part, part, part]


def test_html_needs_nothing_else() -> None:
    html = Shown("", Table((number("n"),), (("1",),)))._repr_html_()
    assert html == (
        '<div style="white-space:pre-wrap;font-family:monospace"><div style="margin-left:0ch">title</div>'
        '<div style="margin-left:0ch"><br></div><table style="border-collapse:collapse;margin:0.5em 0">'
        '<tr><th style="text-align:right;vertical-align:top;padding:0 1.5em 0 0">n</th></tr>'
        '<tr><td style="text-align:right;vertical-align:top;padding:0 1.5em 0 0">1</td></tr></table></div>'
    )


def test_alignment_and_gaps() -> None:
    rows = (("a", "1", "x"), ("bb", "200", ""))
    table = Table((Column("name"), number("n"), Column("why")), rows)
    assert Shown(table).to_text().splitlines()[1:] == ["name    n  why", "a       1  x", "bb    200"]
    bare = Table(table.columns, rows, header=None, gap=1)
    assert Shown(bare).to_text().splitlines()[1:] == ["a    1 x", "bb 200"]


def test_words_wrap_and_numbers_do_not() -> None:
    table = Table((Column("what"), number("n")), (("one two three", "12345"),))
    assert Shown(table).to_text(12).splitlines()[1:] == ["what       n", "one    12345", "two", "three"]
    cut = Shown(table).to_text(4)  # what does not fit is not a smaller number
    assert any(row.endswith("…") for row in cut.splitlines())


def test_lines_in_a_cell_keep_their_indent() -> None:
    table = Table((Column("a"), Column("b")), (("x", (line("one"), line("two three", indent=2))),), header=None)
    assert Shown(table).to_text(10).splitlines()[1:] == ["x  one", "     two", "     three"]


@pytest.mark.parametrize(("width", "expected"), [(99, ["- one", "+ two"]), (100, ["one two"])])
def test_lines_stand_for_a_table_where_it_is_narrow(width: int, expected: list[str]) -> None:
    columns = (Column("before"), Column("after"))
    table = Table(columns, (("one", "two"),), header=None, gap=1, narrow=(line("- one"), line("+ two")))
    assert Shown(table).to_text(width).splitlines()[1:] == expected


def test_a_part_is_set_off_by_a_rule() -> None:
    inner = View(line(("A", "bold"), " b"), ("note",), ruled=True)
    assert Shown("", inner).to_text(12).splitlines() == ["title", "", "A b --------", "note"]


@pytest.mark.parametrize(("terminal", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colour_is_where_the_terminal_has_it(
    terminal: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **terminal}.items():
        monkeypatch.setenv(name, value)
    screen = Console(force_terminal=True, width=80)
    monkeypatch.setattr(rich, "get_console", lambda: screen)
    result = Shown(line(("red", "red")), title=line(("a" * 100, "bold")))
    assert ("\x1b[31mred" in str(result)) is coloured
    assert ("\x1b" in str(result)) is coloured
    assert "\x1b" not in result.to_text()
    assert len(str(result).splitlines()) == 3  # as wide as the screen


def test_a_title_is_one_line_in_repr() -> None:
    assert repr(Shown(title=line(("a\nb", "bold"), "  c"))) == "<Shown: a b c>"
