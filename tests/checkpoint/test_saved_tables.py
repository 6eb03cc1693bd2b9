"""Models with quantized tables: calibrated, trained, saved, loaded, also as another class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import batch_for, build
from safetensors.torch import load_file, save_file
from tables import table_rules
from torch import Tensor
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.checkpoint.plugin import QDQQuantizer
from qdq_surgery.errors import ModelError

WORDS = "embeddings.word_embeddings._weight_quantizer"


@pytest.fixture
def qmodel(tmp_path: Path) -> PreTrainedModel:
    made = qs.convert(build("bert", "BertModel"), table_rules(tmp_path))
    qs.calibrate(made, [batch_for(made, (2, 9))])
    return made


def states(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch_for(model, (2, 9))).last_hidden_state
    return found


def test_each_row_has_the_range_of_its_weight(qmodel: PreTrainedModel) -> None:
    weight = qmodel.get_input_embeddings().weight
    assert torch.equal(qs.quantizers(qmodel)[WORDS].amax, weight.detach().abs().amax(1, keepdim=True))
    with torch.no_grad():
        weight.mul_(2)
    qs.recalibrate_weights(qmodel)
    assert torch.equal(qs.quantizers(qmodel)[WORDS].amax, weight.detach().abs().amax(1, keepdim=True))


def test_rounding_for_products_leaves_tables_alone(qmodel: PreTrainedModel) -> None:
    done = qs.round_weights(qmodel, [batch_for(qmodel, (4, 12))])
    assert qs.quantizers(qmodel)[WORDS].rounding is None
    assert WORDS not in {each.quantizer for each in done.weights} | set(done.left)


def test_dequantized_it_is_the_float_model(qmodel: PreTrainedModel) -> None:
    plain = build("bert", "BertModel")
    qmodel.dequantize()
    assert [type(module) for module in qmodel.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(states(qmodel), states(plain))


@pytest.mark.parametrize("learn", [False, True])
def test_training_moves_table_and_ranges(qmodel: PreTrainedModel, learn: bool) -> None:
    learned = qs.learn_ranges(qmodel, weights=learn)
    table = qs.quantizers(qmodel)[WORDS].amax
    assert any(each is table for each in learned) == learn
    qmodel.train()
    qmodel(**batch_for(qmodel, (2, 9))).last_hidden_state.square().mean().backward()
    assert qmodel.get_input_embeddings().weight.grad.any()
    assert learn == (table is not None and table.grad is not None)


@pytest.mark.parametrize("locked", [True, False])
def test_it_is_what_was_saved(
    qmodel: PreTrainedModel, locked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qmodel.save_pretrained(tmp_path / "saved")
    if not locked:  # the plan in the file is of another release: the rules are matched anew
        file = tmp_path / "saved" / "model.safetensors"
        save_file(load_file(file), file, {"format": "pt"})
    else:  # or by the plan, without a look at the model
        monkeypatch.setattr(QDQQuantizer, "_match", None)
    again = BertModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(states(again), states(qmodel))
    assert torch.equal(qs.quantizers(again)[WORDS].amax, qs.quantizers(qmodel)[WORDS].amax)


def test_a_table_without_ranges_is_refused(qmodel: PreTrainedModel, tmp_path: Path) -> None:
    qmodel.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    good = load_file(file)
    for changed, message in (
        ({**good, f"{WORDS}._amax": torch.ones(3, 1)}, r"range of embeddings.word_embeddings.*wanted \(60, 1\)"),
        ({**good, f"{WORDS}._amax": torch.zeros(60, 1)}, "zero in a channel whose weight is not"),
        ({name: each for name, each in good.items() if name != f"{WORDS}._amax"}, f"first: {WORDS}"),
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(ModelError, match=message):
            BertModel.from_pretrained(tmp_path / "saved")


def test_other_classes_take_what_they_can(qmodel: PreTrainedModel, tmp_path: Path) -> None:
    qmodel.save_pretrained(tmp_path / "base")
    head = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert f"bert.{WORDS}" in qs.quantizers(head)
    # Its decoder multiplies by the table in float, so that the table stays float.
    masked = BertForMaskedLM.from_pretrained(tmp_path / "base")
    assert f"bert.{WORDS}" not in qs.quantizers(masked)
    masked.save_pretrained(tmp_path / "masked")
    sites = json.loads((tmp_path / "masked" / "config.json").read_text())["quantization_config"]["sites"]
    assert not [name for name in sites if "word" in name]
    back = BertModel.from_pretrained(tmp_path / "masked")
    assert qs.quantizers(back)[WORDS].amax is None
    qs.recalibrate_weights(back)
    assert torch.equal(states(back), states(qmodel))


def test_a_longer_table_needs_new_ranges(qmodel: PreTrainedModel) -> None:
    qmodel.resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(qs.CalibrationError, match="recalibrate_weights"):
        states(qmodel)
    qs.recalibrate_weights(qmodel)
    assert qs.quantizers(qmodel)[WORDS].amax.shape == (70, 1)
    states(qmodel)
