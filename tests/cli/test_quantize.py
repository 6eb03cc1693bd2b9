"""The whole job in one command, and the commands that judge and show what it made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tiny_checkpoint import TEXTS, save_tiny_bert, write_texts
from transformers import AutoModelForTokenClassification

import qdq_surgery as qs
from qdq_surgery.cli.commands import main
from qdq_surgery.cli.folder import load_model, save_model
from qdq_surgery.texts.batches import text_batches
from qdq_surgery.texts.samples import read_samples


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "many.txt"
    path.write_text("\n".join(f"{TEXTS[number % 4]} {number}" for number in range(20)) + "\n")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what sentence-transformers keeps beside a model."""
    folder = save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny", [*TEXTS, "0 1 2 3 4 5 6 7 8 9"])
    (folder / "modules.json").write_text(
        '[{"idx": 0, "name": "0", "path": ""}, {"idx": 1, "name": "1", "path": "1_Pooling"}]'
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def tokens(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with a head for tokens."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("tokens") / "tiny")
    AutoModelForTokenClassification.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(model: Path, texts: Path) -> Path:
    output = model.parent / "made"
    assert (
        main(
            [
                "quantize",
                str(model),
                str(texts),
                str(output),
                "--target",
                "openvino",
                "--metric",
                "cosine",
                "--triton",
                "tiny",
            ]
        )
        == 0
    )
    return output


@pytest.fixture(scope="module")
def calibrated(model: Path, texts: Path) -> Path:
    output = model.parent / "calibrated"
    assert main(["calibrate", str(model), str(texts), str(output), "--rules", "openvino"]) == 0
    return output


@pytest.mark.slow
def test_the_folder_has_what_other_tools_look_for(made: Path, model: Path) -> None:
    names = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    assert names >= {
        "onnx/model_quantized.onnx",
        "openvino/openvino_model_qint8_quantized.xml",
        "openvino/openvino_model_qint8_quantized.bin",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "modules.json",
        "1_Pooling/config.json",
        "README.md",
        "qdq_report.json",
        "triton/tiny/config.pbtxt",
        "triton/tiny/1/model_quantized.onnx",
    }
    assert json.loads((made / "tokenizer_config.json").read_text())["model_max_length"] == 128
    assert (made / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert not [path for path in made.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_its_figures_are_those_of_the_file(made: Path, model: Path, texts: Path) -> None:
    """Judged here, by hand, on the texts that were kept."""
    report = json.loads((made / "qdq_report.json").read_text())
    plain = load_model(model)
    data = text_batches(read_samples(texts, [])[::5], plain, model).batches
    served = qs.load_onnx(made / "onnx" / "model_quantized.onnx", "openvino")
    again = qs.evaluate(served, data, plain, "cosine")
    # (Its float model is the converted one with its quantizers off, whose attention rounds in another order.)
    assert report["evaluation"]["figures"] == pytest.approx(dict(again.figures), rel=1e-4)
    assert report["evaluation"]["file"] == "model_quantized.onnx"
    assert report["evaluation"]["runtime"] == served.runs_on
    assert report["rules"] == "openvino"
    assert report["calibration"]["rows"] == report["rounding"]["rows"] == 16
    assert all(each["adapted"] < each["nearest"] for each in report["rounding"]["weights"])
    assert report["receipt"]["shares"]["linear"] == 1.0
    assert report["export"]["parity"]["agrees"]
    assert 0 < again.loss < 0.01


@pytest.mark.slow
def test_the_card_says_what_is_lost_in_words_that_hubs_read(made: Path) -> None:
    card = (made / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model_relation"] == "quantized"
    assert yaml.safe_load(front)["base_model"] == "tiny"
    report = json.loads((made / "qdq_report.json").read_text())
    assert f"| cosine | {report['evaluation']['loss']:.4g} |" in body
    assert "on 4 held-out texts" in body
    assert "100.0 % of the linears' multiply-adds run in INT8" in body


@pytest.mark.slow
def test_too_much_loss_leaves_no_folder(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "quantize",
        str(model),
        str(texts),
        str(tmp_path / "new" / "out"),
        "--max-loss",
        "1e-9",
        "--held-out",
        str(texts),
    ]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "BertModel loses " in said
    assert "at most 1e-09 is asked for; see what costs it" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_is_for_tensorrt_is_judged_in_pytorch(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", str(model), str(texts), str(tmp_path / "out"), "--target", "tensorrt", "--json"]
    assert main([*words, "--no-round-weights"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "out" / "qdq_report.json").read_text())
    assert report["receipt"] is None
    assert report["rounding"] is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "fake quantization in PyTorch; TensorRT builds an engine" in card


@pytest.mark.slow
def test_a_model_in_half_precision_without_safetensors_and_a_tokenizer(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of token ids alone, one of which is left over in its batch: the file takes what they have."""
    half = load_model(model).bfloat16()
    (tmp_path / "half").mkdir()
    half.config.dtype = torch.bfloat16
    half.config.save_pretrained(tmp_path / "half")
    torch.save(half.state_dict(), tmp_path / "half" / "pytorch_model.bin")
    rows = [json.dumps({"input_ids": [2, 5, 6 + number, 7, 3]}) for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    words = ["quantize", str(tmp_path / "half"), str(tmp_path / "rows.jsonl"), str(tmp_path / "new" / "out")]
    assert main([*words, "--batch", "15", "--tei"]) == 0
    assert "its weights are in torch.bfloat16, and are calibrated and exported in float32" in capsys.readouterr().err
    report = json.loads((tmp_path / "new" / "out" / "qdq_report.json").read_text())
    assert report["calibration"]["rows"] == 16
    size = sum(each.numel() for each in half.parameters()) * 4 / 1e6
    assert f"| the float model's weights | {size:.1f} MB |" in (tmp_path / "new" / "out" / "README.md").read_text()
    files = tmp_path / "new" / "out" / "onnx"
    served = qs.load_onnx(files / "model_quantized.onnx")
    assert served.inputs == ("input_ids", "attention_mask")
    assert (files / "model.onnx").read_bytes() == (files / "model_quantized.onnx").read_bytes()


@pytest.mark.parametrize("loss", ["nan", "-1", "inf", "much"])
def test_a_loss_is_a_number_from_0_on(loss: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["quantize", "model", "texts", "out", f"--max-loss={loss}"])
    assert stop.value.code == 2
    assert f"'{loss}' is no loss; give a number from 0 on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["{model}", "{few}", "{out}"], "has 4 texts, too few to keep some to judge by; bring 100 to 500"),
        (["{calibrated}", "{texts}", "{out}"], "is converted already; give the float model, or export it"),
        (["{model}", "{texts}", "{out}", "--triton", "a/b"], "--triton 'a/b' is no name of a model"),
        (["{model}", "{texts}", "{out}", "--triton", "a", "--target", "tensorrt"], "Triton serves engines of TensorRT"),
        (
            ["{model}", "{texts}", "{out}", "--tei", "--target", "openvino"],
            "--tei: text-embeddings-inference runs ONNX",
        ),
        (["{tokens}", "{texts}", "{out}", "--tei"], "the file gives logits with 3 axes; leave it out"),
        (["{model}", "{texts}", "{model}"], "exists and is not empty; give a new folder"),
        (["{model}", "{texts}", "{out}", "--rules", "nothing"], "nothing"),
        (["nowhere", "{texts}", "{out}"], "nowhere is no folder"),
        (["{model}", "nowhere.txt", "{out}"], "nowhere.txt"),
        (["{model}", "{texts}", "{out}", "--metric", "kl"], "--metric 'kl' is not for the outputs of BertModel"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_said_and_leave_nothing(
    words: list[str],
    found: str,
    model: Path,
    calibrated: Path,
    tokens: Path,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "few").mkdir()
    named = {"model": model, "calibrated": calibrated, "texts": texts, "few": write_texts(tmp_path / "few")}
    named["tokens"] = tokens
    before = sorted(path.name for path in model.parent.iterdir())
    assert main(["quantize", *(word.format(out=tmp_path / "out", **named) for word in words)]) == 1
    assert found in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["few"]
    assert before == sorted(path.name for path in model.parent.iterdir())


@pytest.mark.slow
def test_calibrate_rounds_weights_if_it_is_told_to(
    calibrated: Path, model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["calibrate", str(model), str(texts), str(tmp_path / "out"), "--rules", "openvino", "--round-weights"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "6 weights rounded for their products, from" in said
    found, plain = (qs.quantizers(load_model(folder)) for folder in (tmp_path / "out", calibrated))
    assert sum(each.rounding is not None for each in found.values()) == 6
    assert all(each.rounding is None for each in plain.values())


@pytest.mark.slow
def test_evaluate_judges_a_model_and_its_file(
    calibrated: Path, made: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(calibrated), str(texts), "--metric", "cosine"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    qmodel = load_model(calibrated)
    data = text_batches(read_samples(texts, []), qmodel, calibrated).batches
    assert found == json.loads(json.dumps(qs.evaluate(qmodel, data, metric="cosine").to_json()))
    assert main([*words, "--onnx", str(made / "onnx" / "model_quantized.onnx")]) == 0
    assert "BertModel as model_quantized.onnx on openvino " in capsys.readouterr().out
    assert main([*words, "--max-loss", "0"]) == 1
    assert "and at most 0 is asked for" in capsys.readouterr().err
    assert main([*words, "--runtime", "openvino"]) == 1
    assert "--runtime goes with --onnx FILE only" in capsys.readouterr().err


def test_explain_plan_and_diff_take_converted_folders(
    calibrated: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (calibrated, model):
        rules = [] if folder is calibrated else ["--rules", "openvino"]
        assert main(["explain", str(folder), "encoder.layer.0.output", *rules]) == 0
        assert "because: " in capsys.readouterr().out
        assert main(["plan", str(folder), *rules, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["rules"] == "openvino"
        assert main(["diff", str(folder), *rules]) == 0
        assert "BertOutput  encoder.layer.0.output" in capsys.readouterr().out
    assert main(["explain", str(calibrated), "encoder.layer.7"]) == 1
    assert "encoder.layer.7" in capsys.readouterr().err
    for command in ("plan", "diff", "explain"):
        assert main([command, str(calibrated), "--rules", "qdqbert"]) == 1
        assert "is converted already, by its own rules; leave --rules out" in capsys.readouterr().err


@pytest.mark.slow
def test_lint_and_receipt_of_a_file(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(made / "onnx" / "model_quantized.onnx")
    assert main(["lint", file]) == 0
    assert "openvino" in capsys.readouterr().out
    assert main(["lint", file, "--target", "tensorrt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "tensorrt"
    assert main(["receipt", file, "--require", "1"]) == 0
    assert "linears of the encoder" in capsys.readouterr().out
    assert main(["receipt", file, "--require", "2"]) == 1
    assert "--require 2 is no share; give above 0, at most 1" in capsys.readouterr().err
    for command in ("lint", "receipt"):
        assert main([command, str(tmp_path / "none.onnx")]) == 1
        assert "none.onnx" in capsys.readouterr().err


def test_a_receipt_can_fail_a_build(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A linear left out of the quantization is missed."""
    torch.manual_seed(0)
    rules = tmp_path / "less.yaml"
    rules.write_text(
        "schema: 1\nname: less\nextends: openvino\nexclude:\n  - {within: '*.intermediate.dense', why: for the test}\n"
    )
    source = made.parent / "tiny"
    qmodel = qs.convert(load_model(source), rules)
    data = text_batches(read_samples(write_texts(tmp_path), []), qmodel, source).batches
    qs.calibrate(qmodel, data)
    save_model(qmodel, tmp_path / "less", source=source)
    assert main(["export", str(tmp_path / "less"), str(tmp_path / "less.onnx"), "--target", "openvino"]) == 0
    capsys.readouterr()
    assert main(["receipt", str(tmp_path / "less.onnx"), "--require", "1"]) == 1
    assert "encoder.layer.0.intermediate.dense" in capsys.readouterr().err
