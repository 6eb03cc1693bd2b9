"""``from_pretrained``: folders of the real QDQBERT (reference_run.py), of BERT, and our own."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hearing import Heard
from safetensors import safe_open
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.checkpoint.config import QDQConfig
from reference_cases import CHECKPOINTS

CALIBRATED = [checkpoint.name for checkpoint in CHECKPOINTS if checkpoint.calibrated]
UNCALIBRATED = "classification-uncalibrated"
AUTO = {
    "masked-lm-bin": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "question-answering-shards": "AutoModelForQuestionAnswering",
    UNCALIBRATED: "AutoModelForSequenceClassification",
}
OURS = {"quant_method": "qdq_surgery", "rules": "qdqbert"}
IDS = torch.tensor([[3, 4, 5, 6, 7]])


@pytest.fixture(scope="module")
def checkpoints(reference: Path) -> Path:
    return reference / "checkpoints"


def recorded(folder: Path, group: str) -> dict[str, Tensor]:
    """What the real model in a folder was called with, or what it computed."""
    with safe_open(f"{folder}.safetensors", "pt") as file:
        names = [key for key in file.keys() if key.startswith(f"{group}/")]  # noqa: SIM118 (no mapping)
        return {key.removeprefix(f"{group}/"): file.get_tensor(key) for key in names}


def class_of(name: str) -> Any:
    [head] = [checkpoint.head for checkpoint in CHECKPOINTS if checkpoint.name == name]
    return getattr(qs, head)


def assert_as_recorded(folder: Path, model: PreTrainedModel) -> None:
    model.eval()
    for parameter in model.parameters():
        # A loaded weight lies wherever the file has it, and kernels may round by that: lay it as the real one's lay.
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        found = model(**recorded(folder, "batch"))
    wanted = recorded(folder, "output")
    assert wanted
    for key, value in wanted.items():
        assert float((found[key] - value).abs().max()) == 0.0, key


def stored_ranges(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found.update({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118 (no mapping)
    for file in folder.glob("*.bin"):
        found.update(torch.load(file, weights_only=True))
    return {key.removesuffix("._amax"): value for key, value in found.items() if key.endswith("._amax")}


# ------------------------------------------------------------------------------------------- of the real QDQBERT


@pytest.mark.usefixtures("threads_of_the_reference")
@pytest.mark.parametrize("by", ["class", "auto"])
@pytest.mark.parametrize("name", [*CALIBRATED, UNCALIBRATED])
def test_an_old_checkpoint_computes_what_it_did(name: str, by: str, checkpoints: Path, heard: Heard) -> None:
    cls = class_of(name) if by == "class" else getattr(transformers, AUTO[name])
    model, info = cls.from_pretrained(checkpoints / name, output_loading_info=True)
    assert type(model) is class_of(name)
    assert not model.training
    assert_as_recorded(checkpoints / name, model)
    assert {what: [*keys] for what, keys in info.items() if keys} == {}
    assert [record.getMessage() for record in heard.records] == []


@pytest.mark.parametrize("name", CALIBRATED)
def test_an_old_checkpoint_s_ranges_are_there(name: str, checkpoints: Path) -> None:
    model = class_of(name).from_pretrained(checkpoints / name)
    ranges = stored_ranges(checkpoints / name)
    assert len(ranges) == 40
    found = qs.quantizers(model)
    assert found.keys() == ranges.keys()
    for key, quantizer in found.items():
        assert quantizer.amax is not None
        assert torch.equal(quantizer.amax, ranges[key])
        assert quantizer.enabled
    assert model.config.num_hidden_layers == 2


def test_an_uncalibrated_checkpoint_has_no_ranges(checkpoints: Path) -> None:
    assert stored_ranges(checkpoints / UNCALIBRATED) == {}
    model = class_of(UNCALIBRATED).from_pretrained(checkpoints / UNCALIBRATED)
    assert len(qs.quantizers(model)) == 40
    assert all(quantizer.amax is None for quantizer in qs.quantizers(model).values())
    qs.calibrate(model, [recorded(checkpoints / UNCALIBRATED, "batch")], method="max")
    assert all(quantizer.amax is not None for quantizer in qs.quantizers(model).values())


@pytest.mark.parametrize("name", ["masked-lm-bin", "causal-lm"])
def test_an_old_checkpoint_s_head_stays_tied(name: str, checkpoints: Path) -> None:
    model = class_of(name).from_pretrained(checkpoints / name)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


def test_an_old_checkpoint_for_another_head(checkpoints: Path, heard: Heard) -> None:
    body = qs.QDQBertModel.from_pretrained(checkpoints / "causal-lm")
    whole = qs.QDQBertLMHeadModel.from_pretrained(checkpoints / "causal-lm")
    for name, quantizer in qs.quantizers(body).items():
        assert quantizer.amax is not None
        assert torch.equal(quantizer.amax, qs.quantizers(whole)[f"bert.{name}"].amax), name
    assert "_amax" not in heard.text
    qs.QDQBertForTokenClassification.from_pretrained(checkpoints / "causal-lm", num_labels=4, is_decoder=False)
    assert "_amax" not in heard.text
    assert "classifier.weight" in heard.text  # what is not in the checkpoint is still said


@pytest.mark.usefixtures("threads_of_the_reference")
def test_an_old_checkpoint_trains_and_goes_round(checkpoints: Path, tmp_path: Path) -> None:
    model = class_of("masked-lm-bin").from_pretrained(checkpoints / "masked-lm-bin").train()
    batch = recorded(checkpoints / "masked-lm-bin", "batch")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert float(model.bert.encoder.layer[0].output.dense.weight.grad.abs().max()) > 0.0
    model.eval().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "qdqbert"
    assert saved["architectures"] == ["QDQBertForMaskedLM"]
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(again) is qs.QDQBertForMaskedLM
    assert_as_recorded(checkpoints / "masked-lm-bin", again)


class Payload:
    """What runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_pickle_with_code_in_it_is_not_run(checkpoints: Path, tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "it-ran"
    shutil.copytree(checkpoints / "masked-lm-bin", folder)
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, "extra": Payload(f"touch {mark}")}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        qs.QDQBertForMaskedLM.from_pretrained(folder)
    assert not mark.exists()
    # The same file, read without that care, does run: the test can fail.
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert mark.exists()


# ---------------------------------------------------------------------------------------------------------- of BERT

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    transformers.BertForMaskedLM(BertConfig(**SIZES, layer_norm_eps=1e-5)).save_pretrained(folder)
    return folder


def test_a_bert_checkpoint_gives_what_convert_gives(bert: Path, heard: Heard) -> None:
    model = qs.QDQBertForMaskedLM.from_pretrained(bert)
    wanted = qs.convert(transformers.BertForMaskedLM.from_pretrained(bert))
    assert type(model) is qs.QDQBertForMaskedLM
    assert qs.quantizers(model).keys() == qs.quantizers(wanted).keys()
    assert torch.equal(model(IDS).logits, wanted(IDS).logits)
    assert type(model.config) is qs.QDQBertConfig
    assert model.config.layer_norm_eps == 1e-5
    assert model.config.pad_token_id == 0
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert [record.getMessage() for record in heard.records] == []


def test_a_config_object_keeps_its_values(bert: Path) -> None:
    given = BertConfig.from_pretrained(bert, num_labels=5)
    given.is_decoder = True
    model = qs.QDQBertForTokenClassification.from_pretrained(bert, config=given)
    assert (model.config.num_labels, model.config.is_decoder) == (5, True)
    assert model.classifier.out_features == 5
    assert not hasattr(given, "quantization_config")
    config = qs.QDQBertConfig.from_pretrained(bert)
    config.is_decoder = True
    model = qs.QDQBertLMHeadModel.from_pretrained(bert, config=config)
    assert model.bert.encoder.layer[0].attention.self.is_causal
    assert len(qs.quantizers(model)) == 40


def test_keywords_reach_the_config_and_the_class(bert: Path) -> None:
    model = qs.QDQBertModel.from_pretrained(bert, add_pooling_layer=False, hidden_dropout_prob=0.25)
    assert model.pooler is None
    assert model.config.hidden_dropout_prob == 0.25
    assert model.eval()(IDS).pooler_output is None


@pytest.mark.parametrize("config", ["none", "QDQBertConfig", "BertConfig"])
def test_an_explicit_quantization_config_wins(bert: Path, config: str) -> None:
    explicit = QDQConfig("linear-only")
    given = {} if config == "none" else {"config": (qs if config.startswith("QDQ") else transformers).__dict__[config]}
    given = {name: cls.from_pretrained(bert) for name, cls in given.items()}
    model = qs.QDQBertForMaskedLM.from_pretrained(bert, quantization_config=explicit, **given)
    assert len(qs.quantizers(model)) == 24
    assert model.config.quantization_config.rules.name == "linear-only"
    assert len(qs.quantizers(qs.QDQBertForMaskedLM.from_pretrained(bert))) == 40
    if config == "QDQBertConfig":
        assert given["config"].quantization_config == OURS


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        qs.QDQBertModel.from_pretrained(tmp_path / "nowhere", local_files_only=True)
    assert len(qs.quantizers(qs.QDQBertModel(qs.QDQBertConfig(**SIZES)))) == 40


def test_attentions_by_the_config(bert: Path) -> None:
    model = qs.QDQBertForMaskedLM.from_pretrained(bert, output_attentions=True)
    assert len(model(IDS).attentions) == 2


def test_a_calibrated_model_comes_back(bert: Path, tmp_path: Path) -> None:
    model = qs.QDQBertForMaskedLM.from_pretrained(bert)
    qs.calibrate(model, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}], method="max")
    model.save_pretrained(tmp_path)
    for cls in (qs.QDQBertForMaskedLM, transformers.AutoModelForMaskedLM):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is qs.QDQBertForMaskedLM
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert all(quantizer.amax is not None for quantizer in qs.quantizers(again).values())


def test_a_model_made_from_a_config_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = qs.QDQBertForTokenClassification(qs.QDQBertConfig(**SIZES)).eval()
    qs.calibrate(model, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}], method="max")
    model.save_pretrained(tmp_path)
    again = qs.QDQBertForTokenClassification.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
