"""The receipt names every product, and its shares are those of a count by hand."""

from __future__ import annotations

import json

import pytest
import torch
from architectures import ARCHITECTURES, batch_for
from frozen_models import calibrated, frozen

import qdq_surgery as qs

#: Of the tiny BERT: width, width inside, heads.
WIDTH, INNER, HEADS = 32, 48, 4


def by_hand(batch: int, tokens: int) -> tuple[int, int, int]:
    """Multiply-adds of two layers' linears, of their attentions' products, and of the pooler."""
    linears = 4 * WIDTH * WIDTH + 2 * WIDTH * INNER
    return 2 * batch * tokens * linears, 2 * 2 * batch * tokens * tokens * WIDTH, batch * WIDTH * WIDTH


@pytest.mark.parametrize("rules", ["linear-only", "qdqbert"])
def test_shares_are_those_of_a_count_by_hand(rules: str) -> None:
    receipt = qs.frozen_receipt(frozen("bert", rules), shape=(2, 16))
    linears, attention, head = by_hand(2, 16)
    assert receipt.linear == 1.0
    assert receipt.attention == 0.0
    assert receipt.total == linears / (linears + attention + head)
    assert (receipt.runtime, receipt.version, receipt.shape) == ("pytorch", torch.__version__, (2, 16))
    receipt.require(linear=1.0, leftover=None)
    with pytest.raises(qs.ReceiptError, match=r"BertModel on pytorch .*\n.* all multiply-adds .*\n  encoder"):
        receipt.require(total=0.9, leftover=None)


def test_every_exception_has_a_name_and_a_reason() -> None:
    qmodel = calibrated("bert", "qdqbert")
    qmodel.get_submodule("encoder.layer.1.output.dense._input_quantizer").disable()  # type: ignore[operator]
    receipt = qs.frozen_receipt(qs.freeze(qmodel))
    reasons = {each.name: each.reason for each in receipt.exceptions}
    assert reasons["encoder.layer.1.output.dense"] == "quantized, but stays in float: its input quantizer is disabled"
    assert "in float on rounded values" in str(reasons["encoder.layer.0.attention.self/bmm#1"])
    assert "outside the encoder layers" in str(reasons["pooler.dense"])
    assert len(reasons) == 1 + 4 + 1
    assert receipt.linear is not None
    assert receipt.linear < 1.0
    assert {gemm.kind for gemm in receipt.gemms} == {"linear", "attention", "head"}


def test_quantizers_that_are_left_are_listed() -> None:
    receipt = qs.frozen_receipt(frozen("bert", "qdqbert"))
    assert len(receipt.leftover) == 2 * 8
    assert all(each.why for each in receipt.leftover)
    assert qs.frozen_receipt(frozen()).leftover == ()


def test_roundings_that_are_a_pass_of_their_own() -> None:
    """One for queries, keys and values, one for the attention's output, one for the feed-forward network."""
    receipt = qs.frozen_receipt(frozen())
    steps = receipt.steps
    assert len(steps) == 2 * 3
    assert "encoder.layer.0.output.dense._input_quantizer" not in steps
    executed = {gemm.module: gemm.executed for gemm in receipt.gemms}
    assert executed["encoder.layer.0.intermediate.dense"] == "oneDNN int8, uint8 -> uint8, gelu"
    assert "encoder.layer.0.attention.self.query._input_quantizer" in steps
    assert "encoder.layer.0.attention.self.key._input_quantizer" not in steps


@pytest.mark.parametrize("model_type", ["albert", "deberta-v2"])
def test_other_architectures(model_type: str) -> None:
    assert model_type in {each.model_type for each in ARCHITECTURES}
    receipt = qs.frozen_receipt(frozen(model_type, "linear-only"), shape=(1, 12))
    assert receipt.linear == 1.0
    assert all(each.reason for each in receipt.exceptions)
    # One layer of ALBERT runs twice.
    assert len({each.name for each in receipt.gemms}) == len(receipt.gemms)


def test_sdpa_is_counted() -> None:
    model = frozen()
    model.set_attn_implementation("sdpa")
    receipt = qs.frozen_receipt(model, shape=(2, 16))
    assert sum(gemm.macs for gemm in receipt.gemms if gemm.kind == "attention") == by_hand(2, 16)[1]
    assert all("scaled_dot_product" in gemm.name for gemm in receipt.gemms if gemm.kind == "attention")


def test_examples_and_shapes() -> None:
    model = frozen()
    assert qs.frozen_receipt(model).shape == (1, 40)
    assert qs.frozen_receipt(model, example_inputs=batch_for(model, (3, 7))).shape == (3, 7)
    with pytest.raises(qs.ModelError, match="give batch and tokens"):
        qs.frozen_receipt(model, shape=(0, 4))
    with pytest.raises(qs.ModelError, match="does not run on the inputs to count with"):
        qs.frozen_receipt(model, example_inputs={"input_ids": torch.tensor([[10**6]])})
    with pytest.raises(qs.ModelError, match="is not frozen"):
        qs.frozen_receipt(calibrated())


def test_it_is_data_and_text() -> None:
    receipt = qs.frozen_receipt(frozen(), shape=(2, 16))
    data = json.loads(json.dumps(receipt.to_json()))
    assert data["runtime"] == "pytorch"
    assert data["shares"]["linear"] == 1.0
    assert "linears of the encoder" in str(receipt)
    # The model is as it was: no hooks are left.
    model = frozen()
    qs.frozen_receipt(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
