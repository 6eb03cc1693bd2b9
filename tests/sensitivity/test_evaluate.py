"""What a model loses against float, by the definitions."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from architectures import batch_for, build
from exported import calibrated, exported, inputs_for
from torch.nn import functional

import qdq_surgery as qs
from qdq_surgery.errors import CalibrationError, ModelError, OptionError
from qdq_surgery.sensitivity.evaluate import Evaluation, nearest_texts


def batches(model: Any) -> list[dict[str, Any]]:
    return [batch_for(model, shape) for shape in ((3, 8), (2, 12))]


def test_figures_of_hidden_states_are_what_they_say() -> None:
    """Against sums of our own over the tokens of the texts."""
    qmodel = calibrated("bert", "BertModel")
    data = batches(qmodel)
    found = qs.evaluate(qmodel, data, metric="cosine")
    wanted, other, texts = [], [], []
    with torch.no_grad():
        for batch in data:
            with qs.quantization_disabled(qmodel):
                plain = qmodel(**batch).last_hidden_state
            rounded = qmodel(**batch).last_hidden_state
            for row, mask in enumerate(batch["attention_mask"].bool()):
                wanted.append(plain[row, mask])
                other.append(rounded[row, mask])
                texts.append([functional.normalize(each[row, mask].mean(0), dim=0) for each in (plain, rounded)])
    one, two = torch.cat(wanted).double(), torch.cat(other).double()
    cosines = functional.cosine_similarity(one, two)
    # The means are over float32 values in another order.
    assert found.figures["mse"] == pytest.approx(float((one - two).square().sum() / one.square().sum()), rel=1e-6)
    assert found.figures["cosine"] == found.loss == pytest.approx(float(1 - cosines.mean()), rel=1e-4)
    assert found.figures["worst_cosine"] == pytest.approx(float(cosines.min()), abs=1e-6)
    ours, theirs = (torch.stack(each) for each in zip(*texts, strict=True))
    assert found.figures["text_cosine"] == pytest.approx(float((ours * theirs).sum(-1).mean()), abs=1e-6)
    assert found.figures["worst_text_cosine"] == pytest.approx(float((ours * theirs).sum(-1).min()), abs=1e-6)
    nearest = [(each @ each.T - 3 * torch.eye(len(each))).argmax(1) for each in (ours, theirs)]
    assert found.figures["same_nearest_text"] == float((nearest[0] == nearest[1]).float().mean())
    assert (found.batches, found.rows) == (2, 5)
    assert found.tokens == sum(int(batch["attention_mask"].sum()) for batch in data)
    assert found.loss > 0


def test_scores_are_judged_by_their_classes_too() -> None:
    qmodel = calibrated("bert", "BertForSequenceClassification")
    data = batches(qmodel)
    found = qs.evaluate(qmodel, data, metric="kl")
    with torch.no_grad(), qs.quantization_disabled(qmodel):
        wanted = torch.cat([qmodel(**batch).logits for batch in data])
    with torch.no_grad():
        other = torch.cat([qmodel(**batch).logits for batch in data])
    wanted, other = wanted.double(), other.double()
    kl = functional.kl_div(other.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
    assert found.loss == pytest.approx(float(kl), rel=1e-3)
    assert found.figures["same_answer"] == float((wanted.argmax(1) == other.argmax(1)).float().mean())
    assert "text_cosine" not in found.figures


def test_a_single_score_has_no_classes() -> None:
    """Of one number softmax makes 1, whatever it is: a divergence of 0 would say nothing."""
    qmodel = qs.convert(build("bert", "BertForSequenceClassification", num_labels=1))
    data = batches(qmodel)
    found = qs.evaluate(qmodel, data)
    assert [*found.figures] == ["mse"]
    with pytest.raises(OptionError, match=r"metric='kl' is not for the outputs of .*; take one of 'mse'"):
        qs.evaluate(qmodel, data, metric="kl")


def test_a_wrong_answer_is_seen() -> None:
    model = build("bert", "BertForSequenceClassification")
    data = batches(model)

    def turned(**inputs: Any) -> Any:
        outputs = model(**inputs)
        outputs.logits = -outputs.logits
        return outputs

    found = qs.evaluate(turned, data, model)
    assert found.figures["same_answer"] == 0.0
    assert found.figures["cosine"] == pytest.approx(2.0, abs=1e-6)
    assert found.figures["mse"] == pytest.approx(4.0, rel=1e-6)


@pytest.mark.parametrize("head", ["BertModel", "BertForQuestionAnswering", "BertForTokenClassification"])
def test_a_model_loses_nothing_against_itself(head: str) -> None:
    model = build("bert", head)
    found = qs.evaluate(qs.convert(model), batches(model), model)  # without ranges nothing is left to chance
    assert found.loss > 0
    with qs.quantization_disabled(qmodel := qs.convert(model)):
        found = qs.evaluate(qmodel, batches(model), model)
    assert found.loss == 0.0
    assert all(value == pytest.approx(1.0, abs=1e-6) for name, value in found.figures.items() if "same" in name)


def test_padding_does_not_count() -> None:
    """Neither more of it, nor what a model makes of it."""
    qmodel = calibrated("bert", "BertModel")
    batch = batch_for(qmodel, (3, 8))
    batch["attention_mask"] = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 3 + [0] * 5])
    other = dict(batch)
    other["input_ids"] = torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])
    one, two = qs.evaluate(qmodel, [batch]), qs.evaluate(qmodel, [other])
    # (Padded keys have a probability of 0, with which the rounding of other values is multiplied.)
    assert one.figures == pytest.approx(two.figures, rel=1e-5)
    assert one.tokens == two.tokens == 16


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_file_is_judged_against_the_float_model(runtime: str) -> None:
    pytest.importorskip(runtime)
    qmodel, made = exported("bert", "BertModel", "onnxruntime")
    served = qs.load_onnx(made.path, runtime, precision="float32" if runtime == "openvino" else None)
    data = [inputs_for(qmodel, (2, 9))]
    with qs.quantization_disabled(qmodel):
        file = qs.evaluate(served, data, qmodel)
    model = qs.evaluate(qmodel, data)
    assert file.loss > 0
    # What ties and roundings of the runtime make of the same figures.
    assert file.loss == pytest.approx(model.loss, rel=0.3)


def test_a_frozen_model_is_judged_too() -> None:
    qmodel = calibrated("bert", "BertModel", "linear-only")
    data = batches(qmodel)
    found, wanted = qs.evaluate(qs.freeze(qmodel), data, qmodel), qs.evaluate(qmodel, data)
    assert found.loss == pytest.approx(wanted.loss, rel=0.3)  # what ties make of the same figure
    with pytest.raises(ModelError, match="is frozen"):
        qs.evaluate(qs.freeze(qmodel), data)


def test_models_are_left_as_they_were() -> None:
    qmodel = calibrated("bert", "BertModel")
    model = build("bert", "BertModel").train()
    modes = [module.training for module in qmodel.modules()]
    qmodel.encoder.layer[0].train()
    state = {name: value.clone() for name, value in qmodel.state_dict().items()}
    random = torch.get_rng_state()
    try:
        qs.evaluate(qmodel, batches(qmodel), model)
        assert model.training
        assert qmodel.encoder.layer[0].training
        assert not qmodel.encoder.layer[1].training
        assert all(torch.equal(value, state[name]) for name, value in qmodel.state_dict().items())
        assert torch.equal(random, torch.get_rng_state())
        assert all(each.quantizes for each in qs.quantizers(qmodel).values())
    finally:
        qmodel.eval()
    assert modes == [module.training for module in qmodel.modules()]


def test_a_text_of_padding_alone_is_none() -> None:
    qmodel = calibrated("bert", "BertModel")
    batch = batch_for(qmodel, (4, 8))
    batch["attention_mask"][3] = 0
    found = qs.evaluate(qmodel, [batch])
    assert found.figures["worst_text_cosine"] > 0.9


def test_labels_are_not_for_files() -> None:
    head = build("bert", "BertForTokenClassification")
    seen: list[set[str]] = []

    def candidate(**inputs: Any) -> Any:
        seen.append(set(inputs))
        return head(**inputs)

    qs.evaluate(candidate, [batch_for(head, (2, 9), labels=True)], head)
    assert seen == [{"input_ids", "attention_mask"}]


def test_nearest_texts_are_those_of_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = functional.normalize(torch.randn(11, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    wanted = (embeddings @ embeddings.T - 3 * torch.eye(11)).argmax(1)
    for size in (1024, 4, 1):
        monkeypatch.setitem(nearest_texts.__globals__, "_SLICE", size)
        assert torch.equal(nearest_texts(embeddings), wanted)


@pytest.mark.parametrize("loss", [float("nan"), -1.0, float("inf")])
def test_a_loss_that_cannot_be_asked_for(loss: float) -> None:
    found = Evaluation("BertModel", "mse", {"mse": 0.0}, 1, 1, 1)
    assert found.to_text(100).startswith("BertModel against float, on ")  # nobody says where
    found.require(0.0)
    found.require(np.float32(0.0))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="cannot be asked for; give a number from 0 on"):
        found.require(loss)


def test_a_result_can_be_shown_and_kept() -> None:
    qmodel = calibrated("bert", "BertModel")
    found = qs.evaluate(qmodel, batches(qmodel))
    assert f"BertModel in PyTorch against float, on {found.tokens} tokens in 5 rows (2 batches): mse" in found.to_text()
    assert "share of texts whose nearest other text is the same" in found.to_text()
    assert json.loads(json.dumps(found.to_json()))["loss"] == found.loss


def test_what_cannot_be_compared_is_refused() -> None:
    qmodel, model = calibrated("bert", "BertModel"), build("bert", "BertModel")
    data = batches(qmodel)
    with pytest.raises(OptionError, match="the metric 'f1' is none; give 'mse', 'cosine', 'kl'"):
        qs.evaluate(qmodel, data, metric="f1")
    with pytest.raises(OptionError, match="metric='kl' is not for the outputs of BertModel; take one of 'mse', 'cos"):
        qs.evaluate(qmodel, data, metric="kl")
    with pytest.raises(CalibrationError, match="there are no batches"):
        qs.evaluate(qmodel, [])
    with pytest.raises(CalibrationError, match=r"batch 0: .*last_hidden_state .*logits .*the same head"):
        qs.evaluate(qs.convert(build("bert", "BertForTokenClassification")), data, model)
    questions = build("bert", "BertForQuestionAnswering")
    with pytest.raises(CalibrationError, match=r"batch 0: .*start_logits .*the same head"):
        qs.evaluate(model, data, questions)
    with pytest.raises(CalibrationError, match="batch 0: the model returns a NoneType, wanted an output"):
        qs.evaluate(lambda **_: None, data, model)
    broken = build("bert", "BertModel")
    with torch.no_grad():
        broken.embeddings.LayerNorm.bias[0] = torch.nan
    with pytest.raises(CalibrationError, match="last_hidden_state of the float model has a NaN"):
        qs.evaluate(model, data, broken)
    with pytest.raises(CalibrationError, match="last_hidden_state of what is compared with it has a NaN"):
        qs.evaluate(broken, data, model)
    with pytest.raises(ModelError, match="no float model to compare a function with; pass reference="):
        qs.evaluate(lambda **inputs: model(**inputs), data)
    with pytest.raises(ModelError, match="is not converted"):
        qs.evaluate(model, data)
