"""The command that writes a report: of the model alone, with texts, with its file; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from architectures import build
from report_pages import FilePage
from tiny_checkpoint import TEXTS, save_tiny_bert, write_texts

import qdq_surgery as qs
from qdq_surgery.cli.commands import main
from qdq_surgery.cli.folder import load_model
from qdq_surgery.texts.batches import text_batches
from qdq_surgery.texts.samples import read_samples

pytest.importorskip("bokeh")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    folder = tmp_path_factory.mktemp("models")
    plain = save_tiny_bert(folder / "plain", TEXTS)
    assert main(["calibrate", str(plain), str(texts), str(folder / "calibrated"), "--rules", "onnxruntime"]) == 0
    return folder / "calibrated"


def test_of_a_model_alone(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "alone.html"
    assert main(["report", str(model), str(output), "--title", "Mine"]) == 0
    printed = capsys.readouterr().out
    assert "alone.html: 16 quantizers, " in printed
    assert "with diff\n" in printed
    assert f"written to {output}" in printed
    page = FilePage(output.read_text(encoding="utf-8"))
    assert page.words.startswith("Mine: INT8 report")
    assert "BertSelfOutput" in page.words
    assert "ranges by the rules' methods, from 31 tokens" in page.words


def test_with_texts_and_a_sensitivity(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, figures = tmp_path / "report.html", tmp_path / "figures.json"
    words = ["report", str(model), str(output), str(texts), "--sensitivity", "--resume", str(figures), "--json"]
    assert main([*words, "--metric", "cosine"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["given"] == ["diff", "statistics", "sensitivity", "evaluation", "times"]
    page = FilePage(output.read_text(encoding="utf-8"))
    assert "cosine against float" in page.words
    assert "collecting histograms" in page.words
    assert "costs-alone" in page.data["figures"]
    assert any(card["bars"]["what"] == "values" for card in page.data["cards"] if card["bars"])
    assert figures.is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_with_its_file(model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss on the page is that of the file on its runtime, and the page says so."""
    pytest.importorskip("onnxruntime")
    file, output = tmp_path / "model.onnx", tmp_path / "report.html"
    assert main(["export", str(model), str(file)]) == 0
    capsys.readouterr()
    assert main(["report", str(model), str(output), str(texts), "--onnx", str(file), "--json"]) == 0
    given = json.loads(capsys.readouterr().out)["given"]
    assert given == ["diff", "statistics", "evaluation", "receipt", "parity", "findings", "times"]
    page = FilePage(output.read_text(encoding="utf-8"))
    assert "of the linears in INT8" in page.words
    assert "agrees the file, with PyTorch" in page.words
    assert all("on the runtime" in dict(card["facts"]) for card in page.data["cards"])
    qmodel, served = load_model(model), qs.load_onnx(file)
    found = qs.evaluate(served, text_batches(read_samples(texts, []), qmodel, model).batches, qmodel)
    assert f"{found.loss:.3g} mse against float, as model.onnx on {served.runs_on}" in page.words
    assert " ".join(str(found.view().title).split()) in page.words
    assert "of the model in PyTorch" not in page.words


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_beside_a_deployed_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    plain = model.parent / "plain"
    many = tmp_path / "many.txt"
    many.write_text("\n".join(f"{TEXTS[number % 4]}" for number in range(12)), encoding="utf-8")
    words = ["quantize", str(plain), str(many), str(tmp_path / "deployed"), "--no-round-weights"]
    assert main([*words, "--report", str(tmp_path / "page.html")]) == 0
    assert f"the page: {tmp_path / 'page.html'}" in capsys.readouterr().out
    page = FilePage((tmp_path / "page.html").read_text(encoding="utf-8"))
    loss = json.loads((tmp_path / "deployed" / "qdq_report.json").read_text())["evaluation"]["loss"]
    assert f"{loss:.3g} mse against float, as model_quantized.onnx on onnxruntime " in page.words
    assert "model_quantized.onnx for onnxruntime" in page.words
    assert "0.0 MB" not in page.words.partition("The exported file")[2].partition("Receipt")[0]
    assert any(card["bars"] for card in page.data["cards"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "{tmp}/x.txt"], "a report ends in .html"),
        (["{model}", "{tmp}/old.html"], "exists; add --overwrite, or give another path"),
        (["{model}", "{tmp}/x.html", "--sensitivity"], "--sensitivity is measured on TEXTS"),
        (["{model}", "{tmp}/x.html", "{texts}", "--resume", "f.json"], "--resume goes with --sensitivity only"),
        (["{model}", "{tmp}/x.html", "--runtime", "openvino"], "--runtime goes with --onnx FILE only"),
        (["{model}", "{tmp}/x.html", "--onnx", "{tmp}/none.onnx"], "none.onnx"),
        (["{model}", "{tmp}/x.html", "{tmp}/none.txt"], "none.txt"),
        (["{tmp}/plain", "{tmp}/x.html"], "convert it first: qdq-surgery convert MODEL_DIR"),
    ],
)
def test_mistakes_are_said_and_leave_nothing(
    words: list[str], message: str, model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("bert", "BertModel", num_hidden_layers=1).save_pretrained(tmp_path / "plain")
    (tmp_path / "old.html").write_text("old")
    assert main(["report", *(word.format(model=model, texts=texts, tmp=tmp_path) for word in words)]) == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "old.html").read_text() == "old"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["old.html", "plain"]


def test_a_file_of_one_size_is_not_given_texts(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    file, output = tmp_path / "static.onnx", tmp_path / "report.html"
    assert main(["export", str(model), str(file), "--static", "--no-parity"]) == 0
    assert main(["report", str(model), str(output), str(texts), "--onnx", str(file)]) == 0
    assert "takes batches of one size only, so the loss is the model's, in PyTorch" in capsys.readouterr().err
    assert "in PyTorch" in FilePage(output.read_text(encoding="utf-8")).words
