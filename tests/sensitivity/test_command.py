"""The command that measures what INT8 costs where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_checkpoint import TEXTS, save_tiny_bert, write_texts

import qdq_surgery as qs
from qdq_surgery.cli.commands import main
from qdq_surgery.cli.folder import load_model, save_model
from qdq_surgery.texts.batches import text_batches
from qdq_surgery.texts.samples import read_samples


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def floating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny", TEXTS)


@pytest.fixture(scope="module")
def model(floating: Path, texts: Path) -> Path:
    qmodel = qs.convert(load_model(floating))
    qs.calibrate(qmodel, text_batches(read_samples(texts, []), qmodel, floating, 2).batches)
    save_model(qmodel, floating.parent / "calibrated", source=floating)
    return floating.parent / "calibrated"


def test_the_command_prints_the_table(model: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sensitivity", str(model), str(texts), "--batch", "2", "--width", "120"]) == 0
    captured = capsys.readouterr()
    assert "mse at the output against the float model" in captured.out
    assert "encoder.layer.0.output.add_residual_input_quantizer" in captured.out
    assert "residual-add(local)" in captured.out
    assert "qdq-surgery: note: only 4 texts" in captured.err


def test_it_gives_json_and_goes_on_from_a_file(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--batch", "2", "--metric", "cosine", "--json", "--resume", str(tmp_path / "figures.json")]
    assert main(["sensitivity", str(model), str(texts), "--kinds", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    qmodel = load_model(model)
    data = text_batches(read_samples(texts, []), qmodel, model, 2).batches
    wanted = qs.sensitivity(qmodel, data, "cosine", sites=False, layers=False)
    assert found == json.loads(json.dumps(wanted.to_json()))
    assert main(["sensitivity", str(model), str(texts), "--layers", *options]) == 0
    assert {each["what"] for each in json.loads(capsys.readouterr().out)["costs"]} == {"layer"}
    assert main(["sensitivity", str(model), str(texts), "--sites", "--fold", *options]) == 0
    names = [each["name"] for each in json.loads(capsys.readouterr().out)["costs"]]
    assert "encoder.layer.*.output.dense._input_quantizer" in names


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--metric", "kl"], "has no logits but 'last_hidden_state'"),
        (["--column", "text"], "has no columns"),
        (["--tokenizer", "nowhere"], "nowhere is no folder, so it has no tokenizer"),
        (["--batch", "0"], "batches of 0 texts hold nothing: give at least 1"),
        (["--resume", "{tmp}"], "resume: "),
    ],
)
def test_mistakes_end_in_one_line(
    model: Path, texts: Path, tmp_path: Path, options: list[str], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [option.format(tmp=tmp_path) for option in options]
    assert main(["sensitivity", str(model), str(texts), *options]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if ": note: " not in line]
    assert len(lines) == 1
    assert found in lines[0]


def test_models_that_are_not_ready_get_advice(
    floating: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sensitivity", str(floating), str(texts)]) == 1
    assert "is not converted; convert it first: qdq-surgery convert" in capsys.readouterr().err
    save_model(qs.convert(load_model(floating)), tmp_path / "bare", source=floating)
    assert main(["sensitivity", str(tmp_path / "bare"), str(texts)]) == 1
    assert "calibrate the model: qdq-surgery calibrate MODEL_DIR TEXTS OUTPUT_DIR" in capsys.readouterr().err
