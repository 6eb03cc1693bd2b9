"""What of a model's output is compared, and what is padding in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import batch_for, build
from transformers import PreTrainedModel

from qdq_surgery.errors import CalibrationError
from qdq_surgery.sensitivity.outlier_channels import ChannelTops, Tokens, outliers
from qdq_surgery.sensitivity.output_error import METRICS, judge_of


def noisy(outputs: Any, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + torch.randn(value.shape, generator=generator)
        if isinstance(value, torch.Tensor) and value.ndim
        else value
        for name, value in outputs.items()
    }


def error(model: PreTrainedModel, batch: dict[str, Any], outputs: Any, other: Any, metric: str = "mse") -> float:
    judge = judge_of(metric)
    judge.begin(model, batch, outputs)
    total, weight = judge.figure(other)
    return total / weight


@pytest.mark.parametrize(
    ("model_type", "head"),
    [
        ("bert", "BertModel"),
        ("bert", "BertForMaskedLM"),
        ("bert", "BertForPreTraining"),
        ("bert", "BertForQuestionAnswering"),
        ("bert", "BertForTokenClassification"),
        ("electra", "ElectraForPreTraining"),
    ],
)
def test_what_changes_in_padding_alone_is_no_error(model_type: str, head: str) -> None:
    model = build(model_type, head)
    batch: dict[str, Any] = batch_for(model, (3, 8))
    with torch.no_grad():
        outputs = model(**batch)
    padded, other = batch["attention_mask"] == 0, noisy(outputs)
    in_padding = {
        name: torch.where(padded.reshape(*padded.shape, *[1] * (value.ndim - 2)), other[name], value)
        for name, value in outputs.items()
        if isinstance(value, torch.Tensor) and value.shape[:2] == padded.shape
    }
    assert in_padding
    for metric in METRICS if head != "BertModel" and head != "ElectraForPreTraining" else ("mse",):
        # (1 - cosine of equal vectors is not 0 to the last bit.)
        assert error(model, batch, outputs, {**outputs, **in_padding}, metric) == pytest.approx(0.0, abs=1e-12)
        assert error(model, batch, outputs, other, metric) > 1e-3


@pytest.mark.parametrize("head", ["BertForMultipleChoice", "BertForSequenceClassification"])
def test_one_row_for_each_text_is_none_of_padding(head: str) -> None:
    model = build("bert", head)
    batch: dict[str, Any] = batch_for(model, (2, 6))
    with torch.no_grad():
        outputs = model(**batch)
    other = noisy(outputs)
    wanted = (other["logits"] - outputs.logits).double().square().sum() / outputs.logits.double().square().sum()
    assert error(model, batch, outputs, other) == pytest.approx(float(wanted), rel=1e-6)
    assert error(model, batch, outputs.to_tuple(), tuple(other.values())) == pytest.approx(float(wanted), rel=1e-6)


def test_outputs_that_cannot_be_compared() -> None:
    model = build("bert", "BertModel")
    batch: dict[str, Any] = batch_for(model, (2, 6))
    longer = {"last_hidden_state": torch.ones(2, 8, 32)}
    with pytest.raises(CalibrationError, match=r"the shape \(2, 8, 32\), in which padding cannot be told from text"):
        judge_of("mse").begin(model, batch, longer)
    del batch["attention_mask"]
    assert judge_of("mse").begin(model, batch, longer) == (0.0, 2 * 8 * 32)
    with pytest.raises(CalibrationError, match="returns no tensor of numbers"):
        judge_of("mse").begin(model, batch, {"loss": torch.ones(())})


def test_vectors_of_zeros() -> None:
    zeros, ones = torch.zeros(2, 3).double(), torch.ones(2, 3).double()
    assert METRICS["cosine"](zeros, zeros) == (0.0, 2.0)
    assert METRICS["cosine"](zeros, ones) == (2.0, 2.0)
    assert METRICS["mse"](zeros, zeros) == (0.0, 0.0)


def test_outlier_channels_are_those_of_real_tokens() -> None:
    tokens = Tokens()
    tops = ChannelTops(tokens)
    values = torch.ones(2, 3, 8)
    values[0, 0, 5], values[1, 2, 6] = -9.0, 99.0
    tokens.mask = torch.tensor([[True, True, True], [True, True, False]])
    tops.collect(values)
    tops.collect(values.reshape(6, 8))
    assert outliers([tops.tops]) == {5: 9.0}
    assert outliers([tops.tops, torch.ones(4)]) == {}
    assert outliers([None, torch.zeros(8)]) == {}
    tops.collect(torch.ones(1, 3, 8))  # of which text this is cannot be told
    assert tops.tops is None
    tops.collect(values)
    assert tops.tops is None
