"""Saved and loaded again, a converted model is the same to the bit: every architecture, every kind of head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import BY_TYPE, EVERY_HEAD, batch_for, build, kind_of, layers, tensors_of
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.surgery.model_state import plan_of

_AUTO = {
    "base": "AutoModel",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "span": "AutoModelForQuestionAnswering",
    "choice": "AutoModelForMultipleChoice",
    "next-sentence": "AutoModelForNextSentencePrediction",
    "pretraining": "AutoModelForPreTraining",
}


def loader(head: str) -> Any:
    """The auto class that gives ``head``, or the class itself where an auto class gives another one."""
    model_type = next(kind for kind, name in EVERY_HEAD if name == head)
    auto = getattr(transformers, _AUTO[kind_of(head)])
    known = auto._model_mapping.get(type(BY_TYPE[model_type].config()), None)
    return auto if getattr(known, "__name__", None) == head else getattr(transformers, head)


def in_fresh_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Weights that were loaded lie in the mapped file, anywhere. A linear with one output rounds by where its operand
    lies (see :func:`test_float_models_round_by_where_they_lie`), so what is compared lies where torch puts it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def assert_same(found: PreTrainedModel, wanted: PreTrainedModel) -> None:
    """Class, keys, every tensor and its dtype, ranges, plan, outputs, loss and gradients; no tolerance anywhere."""
    assert type(found) is type(wanted)
    assert list(qs.quantizers(found)) == list(qs.quantizers(wanted))
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name
    before, after = plan_of(wanted), plan_of(found)
    assert (after.sites, after.refusals, after.coverage) == (before.sites, before.refusals, before.coverage)
    for name, quantizer in qs.quantizers(wanted).items():
        assert qs.quantizers(found)[name].provenance == quantizer.provenance
    results: list[dict[str, torch.Tensor]] = []
    for model in (in_fresh_memory(wanted), in_fresh_memory(found)):
        made: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            outputs = tensors_of(model(**batch_for(model, (2, 6), mask=False), output_hidden_states=True))
            made.update({f"{name} (eval)": value for name, value in outputs.items()})
        model.train()
        torch.manual_seed(5)
        outputs = tensors_of(model(**batch_for(model, (3, 5), labels=True)))
        made.update({f"{name} (training)": value for name, value in outputs.items()})
        sum(value.float().sum() for value in outputs.values() if value.requires_grad).backward()  # type: ignore[union-attr]
        made.update({f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
        model.eval()
        results.append(made)
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


def heads_of(model_type: str) -> list[str]:
    """All of BERT's heads; of the others those that have tied weights, or weights that no other one's heads have.

    What is a linear on the encoder is alike in every architecture. Heads of sequences are in test_other_rules.
    """
    heads = BY_TYPE[model_type].heads()
    return [head for head in heads if model_type == "bert" or kind_of(head) in ("masked-lm", "pretraining")]


HEADS = [(model_type, head) for model_type in BY_TYPE for head in heads_of(model_type)]

#: With their ranges and in float32, but for one of each architecture: in bfloat16, or without ranges.
_ONE_EACH = list({model_type: (model_type, head) for model_type, head in HEADS}.values())
CASES = [
    (*each, torch.bfloat16 if each in _ONE_EACH[1::2] else torch.float32, each not in _ONE_EACH[::2]) for each in HEADS
]


@pytest.mark.parametrize(("model_type", "head", "dtype", "calibrated"), CASES, ids=str)
def test_every_head(model_type: str, head: str, dtype: torch.dtype, calibrated: bool, tmp_path: Path) -> None:
    # Several layers are saved, of every architecture, in the tests below.
    build(model_type, head, **layers(model_type, 1)).save_pretrained(tmp_path / "float")
    # (Not .to(dtype), which casts tables that transformers keeps in float32.)
    qmodel = qs.convert(loader(head).from_pretrained(tmp_path / "float", dtype=dtype), inplace=True)
    if calibrated:
        qs.calibrate(qmodel, [batch_for(qmodel, (2, 8))], "max")
    qmodel.save_pretrained(tmp_path / "saved")
    found = loader(head).from_pretrained(tmp_path / "saved")
    assert not found.training
    assert_same(found, qmodel)


@pytest.mark.parametrize(
    ("model_type", "rules"),
    [
        ("bert", "onnxruntime"),
        ("albert", "linear-only"),
        ("mobilebert", "tensorrt"),
        ("distilbert", "onnxruntime"),
        ("deberta-v2", "tensorrt"),
        ("modernbert", "onnxruntime"),
    ],
)
def test_other_rules(model_type: str, rules: str, tmp_path: Path) -> None:
    head = next(name for name in BY_TYPE[model_type].heads() if kind_of(name) == "sequence")
    qmodel = qs.convert(build(model_type, head), rules)
    qs.calibrate(qmodel, [batch_for(qmodel, (2, 8))], "max")
    qmodel.save_pretrained(tmp_path)
    attention = "eager" if rules == "linear-only" else None  # what the model that was saved has
    assert_same(loader(head).from_pretrained(tmp_path, attn_implementation=attention), qmodel)


@pytest.mark.parametrize("model_type", ["albert", "mobilebert", "deberta-v2", "modernbert"])
def test_converted_while_it_is_loaded(model_type: str, tmp_path: Path) -> None:
    head = next(name for name in BY_TYPE[model_type].heads() if kind_of(name) == "masked-lm")
    model = build(model_type, head, **layers(model_type, 1))
    model.save_pretrained(tmp_path)
    found = loader(head).from_pretrained(tmp_path, quantization_config=qs.QDQConfig("tensorrt"))
    assert_same(found, qs.convert(model, "tensorrt"))


def test_float_models_round_by_where_they_lie(tmp_path: Path) -> None:
    """Why outputs are compared in fresh memory: without any quantizer it is the same."""
    model = build("bert", "BertForMultipleChoice")
    model.save_pretrained(tmp_path)
    found = loader("BertForMultipleChoice").from_pretrained(tmp_path, attn_implementation="eager")
    batch = batch_for(model, (2, 6))
    with torch.no_grad():
        wanted, mapped = model(**batch).logits, found(**batch).logits
        torch.testing.assert_close(mapped, wanted, rtol=0, atol=1e-6)  # an ulp or two, or none
        assert torch.equal(in_fresh_memory(found)(**batch).logits, in_fresh_memory(model)(**batch).logits)
