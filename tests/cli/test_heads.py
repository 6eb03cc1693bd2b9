"""The class that a folder is loaded as: no head in the weights is lost silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import build
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertForPreTraining, BertModel

from qdq_surgery.cli.folder import load_model
from qdq_surgery.errors import ModelError


def saved(folder: Path, kind: str, model_type: str = "bert", *, without: tuple[str, ...] = ("architectures",)) -> Path:
    """A model's folder whose config lacks some keys, as older ones do."""
    build(model_type, kind).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: v for key, v in config.items() if key not in without}))
    return folder


@pytest.mark.parametrize(("model_type", "kind"), [("bert", "BertModel"), ("distilbert", "DistilBertModel")])
def test_weights_without_a_head_are_the_base_model_of_their_type(tmp_path: Path, model_type: str, kind: str) -> None:
    model = load_model(saved(tmp_path, kind, model_type))
    assert type(model).__name__ == kind
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_older_names_of_what_is_no_weight_are_no_head(tmp_path: Path) -> None:
    saved(tmp_path, "BertModel")
    weights = load_file(tmp_path / "model.safetensors")
    weights["embeddings.position_ids"] = torch.arange(64)[None]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert type(load_model(tmp_path)) is BertModel


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("BertForMaskedLM", "would lose . weights .*such as BertForMaskedLM"),
        (
            "BertForTokenClassification",
            r"would lose 2 weights \(classifier.bias, classifier.weight\).*BertForTokenClass.* \(--class CLASS\)",
        ),
    ],
)
def test_weights_with_a_head_ask_for_their_class(tmp_path: Path, kind: str, found: str) -> None:
    with pytest.raises(ModelError, match=found):
        load_model(saved(tmp_path, kind))
    assert type(load_model(tmp_path, kind)).__name__ == kind


def test_a_class_that_is_asked_for_may_leave_a_head_out_with_a_word(tmp_path: Path) -> None:
    notes: list[str] = []
    saved(tmp_path, "BertForPreTraining")
    assert type(load_model(tmp_path, "BertForPreTraining", notes.append)) is BertForPreTraining
    assert notes == []
    assert type(load_model(tmp_path, "BertForMaskedLM", notes.append)) is BertForMaskedLM
    assert "lacks (bert.pooler.dense.bias, " in notes[0]
    assert "cls.seq_relationship.weight)" in notes[0]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    load_model(tmp_path, note=notes.append)
    assert notes[1] == notes[0]


def test_a_config_that_names_nothing_asks_for_the_class(tmp_path: Path) -> None:
    saved(tmp_path, "BertModel", without=("architectures", "model_type"))
    with pytest.raises(ModelError, match=r"no class under 'architectures' and no 'model_type'; .*--class CLASS"):
        load_model(tmp_path)
    assert type(load_model(tmp_path, "BertModel")) is BertModel


@pytest.mark.parametrize(
    ("config", "kind", "found"),
    [
        ("{", None, "config.json is no JSON"),
        ("[]", None, "config.json is list, wanted a mapping"),
        ('{"model_type": ["bert"]}', None, "no 'model_type'"),
        ('{"model_type": "bart_nova"}', None, "cannot be loaded"),
        (
            '{"model_type": "bert"}',
            "BertForPoetry",
            "the class 'BertForPoetry' is asked for, which transformers .* lacks",
        ),
        ('{"model_type": "bert"}', "BertConfig", "the class 'BertConfig' is asked for"),
    ],
)
def test_what_cannot_be_a_class(tmp_path: Path, config: str, kind: str | None, found: str) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=found):
        load_model(tmp_path, kind)
