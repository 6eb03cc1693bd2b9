"""The file: what is in it, what it says is missing, that nothing in it runs but its own, and how it is written."""

from __future__ import annotations

import builtins
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from architectures import batch_for, build
from report_pages import HOSTILE, FilePage, hostile_rules, reported

import qdq_surgery as qs
from qdq_surgery.errors import ExportError, ModelError, OptionError
from qdq_surgery.html_report.given import MAKERS
from qdq_surgery.prove.receipt import Gemm, Receipt

pytest.importorskip("bokeh")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    qmodel, results = reported()
    path = tmp_path_factory.mktemp("reports") / "all.html"
    qs.report(qmodel, path, **results, times={"calibrating": 1.25}, title="A title")
    return path


@pytest.fixture(scope="module")
def page(file: Path) -> FilePage:
    return FilePage(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> FilePage:
    """Of a model alone, which is not calibrated."""
    path = tmp_path_factory.mktemp("reports") / "plain.html"
    qs.report(qs.convert(build("bert", "BertModel", num_hidden_layers=1)), path)
    return FilePage(path.read_text(encoding="utf-8"))


def test_every_quantizer_is_there_with_its_rule_and_why(page: FilePage) -> None:
    qmodel, _ = reported()
    found = {card["name"]: dict(card["facts"]) for card in page.data["cards"]}
    assert list(found) == list(qs.quantizers(qmodel))
    for name, quantizer in qs.quantizers(qmodel).items():
        assert quantizer.provenance is not None
        assert found[name]["why"] == quantizer.provenance.why
        assert found[name]["declared at"] == quantizer.provenance.declared
        assert name in page.words
    assert sum("quantizer" in words for words in page.found) > len(found)  # in the table, and in the blocks


def test_numbers_are_those_of_the_results(page: FilePage) -> None:
    qmodel, results = reported()
    costs = {cost.name: cost for cost in results["sensitivity"].of("site")}
    for card in page.data["cards"]:
        amax = qs.quantizers(qmodel)[card["name"]].amax
        assert amax is not None
        assert card["figures"]["amax"] == float(amax.max())
        assert card["figures"]["alone"] == costs[card["name"]].alone
        seen = results["statistics"].seen.get(card["name"])
        assert seen is None or sum(card["bars"]["counts"]) == seen.histogram.total


@pytest.mark.parametrize("name", ["evaluation", "receipt", "rounding"])
def test_results_are_shown_as_their_own_text_does(name: str, page: FilePage) -> None:
    said = [row.split() for row in reported()[1][name].to_text(500).splitlines()]
    shown = page.words.split()
    assert said
    assert [word for row in said for word in row if word not in shown] == []


def test_sections_headlines_and_the_heading(page: FilePage) -> None:
    evaluation = reported()[1]["evaluation"]
    for words in ("A title", "What was converted", "Sensitivity", "Outlier channels", "Receipt", "Certificate"):
        assert words in page.words
    assert f"{evaluation.loss:.3g} mse against float" in page.words
    assert "100 % of the linears in INT8" in page.words
    assert "calibrating 1.25" in page.words
    assert "7 (" in page.words.partition("Outlier channels")[2]
    assert set(page.data["figures"]) == {"costs-alone", "costs-gain", "outliers", "values", "channels"}


def test_it_says_whether_the_accuracy_is_the_model_s_or_the_file_s(page: FilePage, tmp_path: Path) -> None:
    qmodel, results = reported()
    loss = f"{results['evaluation'].loss:.3g} mse against float, "
    remark = 'of the model in PyTorch; of the file: qs.evaluate(qs.load_onnx("model.onnx"), batches, qmodel) makes it'
    assert f"{loss}in PyTorch" in page.words
    assert remark in page.words
    of_file = replace(results["evaluation"], runtime="onnxruntime 1", file="model.onnx")
    for name, given in (("file", {"export": results["export"], "evaluation": of_file}), ("alone", {})):
        qs.report(qmodel, tmp_path / f"{name}.html", **{"evaluation": results["evaluation"], **given})
    words = {path.name: FilePage(path.read_text(encoding="utf-8")).words for path in tmp_path.iterdir()}
    assert f"{loss}as model.onnx on onnxruntime 1" in words["file.html"]
    assert not [name for name, text in words.items() if remark in text]


def test_the_heat_map_has_every_site_in_every_layer(page: FilePage) -> None:
    text = json.dumps(page.data["figures"]["costs-alone"])
    sensitivity = reported()[1]["sensitivity"]
    values = {cost.alone for cost in sensitivity.costs if cost.what in ("site", "layer")}
    assert len(values) > 30
    assert [value for value in values if json.dumps(value) not in text] == []


def test_what_was_not_given_is_said_with_what_makes_it(plain: FilePage, page: FilePage) -> None:
    for name in set(MAKERS) - {"statistics"}:
        assert f"not given: {MAKERS[name][1]} makes it, and {name}= takes it" in plain.words
    assert "histograms not given: qs.collect(qmodel, batches) makes it" in plain.words
    assert "not calibrated: qs.calibrate(qmodel, batches)" in plain.words
    assert page.words.count("not given") == 2  # scales per channel, tuning


def test_it_asks_for_nothing_and_only_its_own_scripts_run(page: FilePage) -> None:
    assert page.outside == []
    assert len(page.scripts) == 2
    assert page.allowed == [True, True]
    assert page.policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in page.policy
    assert "unsafe-inline" not in page.policy.partition("style-src")[0]
    assert not {"link", "iframe", "img", "object", "embed", "base"} & set(page.tags)


def test_what_strangers_wrote_is_text(tmp_path: Path) -> None:
    model = build("bert", "BertModel", num_hidden_layers=1)
    qmodel = qs.convert(model, str(hostile_rules(tmp_path)))
    path = tmp_path / "hostile.html"
    qs.report(qmodel, path, diff=qs.diff(model, qmodel), title=HOSTILE, times={HOSTILE: 1.0})
    text = path.read_text(encoding="utf-8")
    page = FilePage(text)
    assert len(page.scripts) == 2
    assert all(page.allowed)
    assert "img" not in page.tags
    assert page.text.count(HOSTILE) >= 4  # title, heading, rule's row, times
    assert any(dict(card["facts"])["why"] == HOSTILE for card in page.data["cards"])
    assert HOSTILE not in text


def test_the_result_says_what_it_lacks(tmp_path: Path) -> None:
    qmodel, results = reported()
    made = qs.report(qmodel, tmp_path / "some.html", evaluation=results["evaluation"], export=results["export"])
    assert made.path == tmp_path / "some.html"
    assert made.size == made.path.stat().st_size
    assert made.quantizers == len(qs.quantizers(qmodel))
    assert made.given == ("evaluation", "export")
    lacks = {each.name for each in made.missing}
    assert lacks == {"diff", "statistics", "sensitivity", "receipt", "rounding", "equalization", "tuning"}
    assert repr(made) == f"<Report: some.html: 40 quantizers, {made.size / 1e6:.2f} MB>"
    assert made.to_json()["missing"]["diff"] == "qs.diff(model, qmodel)"


def test_a_model_in_a_wrapper_is_the_model_inside(tmp_path: Path) -> None:
    from torch import nn

    qmodel, _ = reported()
    made = qs.report(nn.DataParallel(qmodel), tmp_path / "wrapped.html")
    assert made.quantizers == len(qs.quantizers(qmodel))


def test_a_file_is_replaced_only_if_that_is_asked_for(tmp_path: Path) -> None:
    qmodel, _ = reported()
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ExportError, match="exists; pass overwrite=True"):
        qs.report(qmodel, path)
    assert path.read_text() == "old"
    qs.report(qmodel, path, overwrite=True)
    assert path.read_text().startswith("<!DOCTYPE html>")
    (tmp_path / "link.html").symlink_to(path)
    with pytest.raises(ExportError, match="is a link"):
        qs.report(qmodel, tmp_path / "link.html", overwrite=True)


@pytest.mark.parametrize("step", ["replace", "link"])
def test_it_appears_whole_or_not_at_all(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel, _ = reported()
    path = tmp_path / "report.html"
    if step == "replace":
        path.write_text("old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        qs.report(qmodel, path, overwrite=step == "replace")
    assert [each.name for each in tmp_path.iterdir()] == (["report.html"] if step == "replace" else [])
    assert step != "replace" or path.read_text() == "old"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("report.txt", "a report ends in .html"),
        ("none/report.html", "there is no folder"),
        ("", "is a folder"),
    ],
)
def test_where_it_cannot_go_is_said(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        qs.report(reported()[0], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def other() -> Any:
    qmodel = qs.convert(build("distilbert", "DistilBertModel"))
    return qs.collect(qmodel, [batch_for(qmodel, (2, 6))])


def of_a_distilbert() -> Receipt:
    gemm = Gemm("MatMul", "transformer.layer.0.ffn.lin1", "linear", 8, "MatMulIntegerToFloat", True, None)
    return Receipt(Path("other.onnx"), "onnxruntime", "1", (1, 8), (gemm,), (), (), ())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda: {"diff": reported()[1]["statistics"]}, OptionError, "diff= is a Statistics; give what qs.diff"),
        (lambda: {"evaluation": "good"}, OptionError, "evaluation= is a str; give what qs.evaluate"),
        (lambda: {"times": {"a": -1.0}}, OptionError, "times= has -1.0 for 'a'; give seconds"),
        (lambda: {"times": {"a": float("nan")}}, OptionError, "times= has nan for 'a'"),
        (lambda: {"statistics": other()}, ModelError, "statistics= is of another model: this BertModel has no"),
        (
            lambda: {"receipt": of_a_distilbert()},
            ModelError,
            "receipt= is of another model: this BertModel has",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        qs.report(reported()[0], tmp_path / "report.html", **given())
    assert list(tmp_path.iterdir()) == []


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not converted"):
        qs.report(build("bert", "BertModel"), tmp_path / "report.html")


@pytest.mark.parametrize("package", ["bokeh", "jinja2"])
def test_what_is_not_installed_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=rf"a report needs {package}.*pip install 'qdq-surgery\[report\]'"):
        qs.report(reported()[0], tmp_path / "report.html")


def test_twelve_layers_are_under_3_mb(tmp_path: Path) -> None:
    """As many quantizers and bars as of BERT-base; how long it takes is measured by scripts/benchmark_report.py."""
    model = build("bert", "BertModel", num_hidden_layers=12)
    qmodel = qs.convert(model)
    statistics = qs.collect(qmodel, [batch_for(qmodel, (2, 9))])
    qs.calibrate(qmodel, statistics)
    made = qs.report(qmodel, tmp_path / "base.html", diff=qs.diff(model, qmodel), statistics=statistics)
    assert made.quantizers == 240
    assert 1.3e6 < made.size < 3e6
