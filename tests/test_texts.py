"""Texts from a file as batches, and the command that calibrates with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import save_tiny_bert

import qdq_surgery as qs
from qdq_surgery.cli import main
from qdq_surgery.folder import load_model
from qdq_surgery.texts import read_texts, text_batches

TEXTS = ["a short one", "a text with some more words in it", "words", "the longest of all of these texts, by some way"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny", TEXTS)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n" + "\n\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def test_empty_lines_are_no_texts(texts: Path) -> None:
    assert read_texts(texts) == TEXTS


def test_batches_are_sorted_by_length(model: Path) -> None:
    batches = text_batches(model, TEXTS, 2, 8)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 5), (2, 8)]
    assert [int(batch["attention_mask"].sum()) for batch in batches] == [3 + 5, 8 + 8]


@pytest.mark.parametrize(
    ("content", "found"),
    [(None, "cannot be read"), (b"\xff\n", "not UTF-8 at byte 0"), (b"\n \n", "has no text")],
    ids=["missing", "latin-1", "empty"],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: bytes | None, found: str) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(qs.CalibrationError, match=found):
        read_texts(path)


@pytest.mark.parametrize(("rows", "length"), [(0, 16), (2, 2)])
def test_sizes_that_cannot_be(model: Path, rows: int, length: int) -> None:
    with pytest.raises(qs.CalibrationError, match="give at least 1 and 3"):
        text_batches(model, TEXTS, rows, length)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(qs.ModelError, match="has no tokenizer"):
        text_batches(tmp_path, TEXTS, 2, 8)


def test_the_command_writes_a_calibrated_model(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "calibrated"
    options = ["--method", "percentile", "--percentile", "99.9", "--batch", "2"]
    assert main(["calibrate", str(model), str(texts), str(output), *options]) == 0
    printed = capsys.readouterr().out
    assert "20 ranges by percentile(99.9%)" in printed
    assert f"written to {output}" in printed
    wanted = qs.convert(load_model(model))
    qs.calibrate(wanted, text_batches(model, TEXTS, 2, 128), "percentile", percentile=99.9)
    found = load_model(output)
    ranges = {name: each.amax for name, each in qs.quantizers(found).items()}
    assert all(torch.equal(each.amax, ranges[name]) for name, each in qs.quantizers(wanted).items())
    report = json.loads((output / "qdq_report.json").read_text())
    assert report["calibration"]["method"] == "percentile(99.9%)"
    assert len(report["calibration"]["ranges"]) == 20
    # The tokenizer travels along, so the result can be calibrated again, by another method.
    assert main(["calibrate", str(output), str(texts), str(tmp_path / "again"), "--method", "max"]) == 0
    assert "20 ranges by max" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--percentile", "99"], "goes with method='percentile' only"),
        (["--method", "percentile", "--percentile", "101"], "outside (0, 100]"),
        (["--batch", "0"], "give at least 1 and 3"),
    ],
    ids=["percentile-alone", "percentile-101", "batch-0"],
)
def test_mistakes_end_in_one_line_and_write_nothing(
    model: Path, texts: Path, tmp_path: Path, options: list[str], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    assert main(["calibrate", str(model), str(texts), str(output), *options]) == 1
    error = capsys.readouterr().err
    assert found in error
    assert error.count("\n") == 1
    assert not output.exists()
