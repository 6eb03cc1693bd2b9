"""``qdq_report.json``: written with the model, uploaded with it, read again for the calibration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch_for, build
from ecosystem import CLASSIFIER, calibrated
from transformers import BertForSequenceClassification, BertModel
from transformers.utils import hub

import qdq_surgery as qs
from qdq_surgery.checkpoint.report import REPORT_NAME, calibration_of, report_of
from qdq_surgery.text.layer_names import expand


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / REPORT_NAME).read_text())  # type: ignore[no-any-return]


def test_it_is_the_plan_and_the_calibration(tmp_path: Path) -> None:
    qmodel = calibrated()
    first = next(iter(qs.quantizers(qmodel)))
    qs.quantizers(qmodel)[first].disable()
    qmodel.save_pretrained(tmp_path)
    report = read(tmp_path)
    assert report == json.loads(json.dumps(report_of(qmodel)))
    folded = {site["quantizer"]: site["layers"] for site in report["sites"]}
    assert len(folded) == len(report["sites"])  # the layers of one kind are one entry, so the report stays short
    assert sorted(expand(folded)) == sorted(qs.quantizers(qmodel))
    assert report["disabled"] == [first]
    assert report["calibration"]["batches"] == 1
    assert len(report["calibration"]["ranges"]) == len(qs.quantizers(qmodel))


def test_a_model_without_ranges_has_no_calibration(tmp_path: Path) -> None:
    qs.convert(build("bert", CLASSIFIER)).save_pretrained(tmp_path)
    assert "calibration" not in read(tmp_path)
    assert calibration_of(BertForSequenceClassification.from_pretrained(tmp_path)) is None


def test_the_calibration_is_known_again(tmp_path: Path) -> None:
    qmodel = calibrated()
    qmodel.save_pretrained(tmp_path)
    found = BertForSequenceClassification.from_pretrained(tmp_path)
    assert calibration_of(found) == calibration_of(qmodel)
    found.save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again") == read(tmp_path)
    # Another head's names are others.
    assert calibration_of(BertModel.from_pretrained(tmp_path)) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"calibration": 7}', '{"calibration": {"ranges": 1}}', "null"])
def test_a_damaged_report_costs_nothing_but_itself(text: str, tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path)
    (tmp_path / REPORT_NAME).write_text(text)
    found = BertForSequenceClassification.from_pretrained(tmp_path)
    assert calibration_of(found) is None
    found.save_pretrained(tmp_path)
    assert "calibration" not in read(tmp_path)


def test_without_a_report(tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path)
    (tmp_path / REPORT_NAME).unlink()
    assert calibration_of(BertForSequenceClassification.from_pretrained(tmp_path)) is None


def test_a_float_model_again_knows_no_calibration(tmp_path: Path) -> None:
    qmodel = calibrated()
    qmodel.dequantize()
    again = qs.convert(qmodel)
    assert calibration_of(again) is None
    again.save_pretrained(tmp_path)
    assert "calibration" not in read(tmp_path)


def test_only_the_main_process_writes_it(tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_saved_by_the_class_there_is_none(tmp_path: Path) -> None:
    """``Class.save_pretrained(model, folder)`` is transformers' own, which tells no folder; the rest is whole."""
    qmodel = calibrated()
    BertForSequenceClassification.save_pretrained(qmodel, tmp_path)
    assert not (tmp_path / REPORT_NAME).exists()
    found, batch = BertForSequenceClassification.from_pretrained(tmp_path), batch_for(qmodel, (2, 5))
    assert torch.equal(found(**batch).logits, qmodel(**batch).logits)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[" * 200_000, b'{"calibration": {"schema": 1, "method": []}}', None]
)
def test_loading_needs_no_report(content: bytes | None, tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path)
    path = tmp_path / REPORT_NAME
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    found = BertForSequenceClassification.from_pretrained(tmp_path)
    assert calibration_of(found) is None


class Hub:
    """What of the hub's interface an upload uses."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        self.repo_id = ""

    def create_repo(self, repo_id: str, **_: Any) -> Hub:
        self.repo_id = repo_id
        return self

    def create_commit(self, operations: Any, **_: Any) -> None:
        self.files.update({each.path_in_repo: Path(each.path_or_fileobj).stat().st_size for each in operations})


class Card:
    def save(self, path: str) -> None:
        Path(path).write_text("a model")


@pytest.mark.parametrize("way", ["save_pretrained", "push_to_hub"])
def test_it_is_uploaded_with_the_model(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Hub()
    for module in (hub, __import__("transformers.modeling_utils").modeling_utils):
        monkeypatch.setattr(module, "hf_api", lambda: fake)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *_, **__: Card())
    if way == "push_to_hub":
        calibrated().push_to_hub("me/mine")
    else:
        calibrated().save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert fake.repo_id == ("me/mine" if way == "push_to_hub" else "mine")
    assert {"config.json", "model.safetensors", REPORT_NAME} <= set(fake.files)
    assert fake.files[REPORT_NAME] > 1000
