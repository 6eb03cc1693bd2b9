"""What each architecture has and what of it is quantized; an independent count says the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import BASE, BY_TYPE, EXPECTED, batch_for, build
from counting import Counting
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.surgery.model_state import plan_of


@pytest.mark.parametrize("model_type", BY_TYPE)
def test_everything_in_the_encoder_is_quantized_and_an_independent_count_agrees(model_type: str) -> None:
    model = build(model_type, BASE[model_type])
    qmodel = qs.convert(model, inplace=True)
    made = plan_of(qmodel)
    linears, matmuls, adds, quantizers = (count * made.layers for count in EXPECTED[model_type])
    assert {kind: (c.found, c.quantized, c.refused) for kind, c in made.coverage.items()} == {
        "linear": (linears, linears, 0),
        "matmul": (matmuls, matmuls, 0),
        "residual add": (adds, adds, 0),
    }
    assert len(made.sites) == quantizers
    assert not [refusal for refusal in made.refusals if refusal.layer is not None]
    calls = model.config.num_hidden_layers // made.layers  # ALBERT calls its layer again and again
    counting = Counting(qmodel)
    with torch.no_grad(), counting:
        qmodel(**batch_for(model, (2, 6)))
    assert counting.bare == []
    assert counting.counts["linear"] == made.coverage["linear"].quantized * calls
    assert counting.counts["matmul"] == made.coverage["matmul"].quantized * calls


def test_the_independent_count_sees_what_is_bare() -> None:
    model = build("bert", "BertModel")
    qmodel = qs.convert(model, "linear-only")
    counting = Counting(qmodel)
    with torch.no_grad(), counting:
        qmodel(**batch_for(model, (2, 6)))
    assert counting.bare == ["matmul"] * 4
    refused = [refusal for refusal in qs.plan(model, "linear-only").refusals if refusal.operator == "matmul"]
    assert len(refused) == 4


def test_what_lies_outside_the_layers_is_listed() -> None:
    made = qs.plan(build("mobilebert", "MobileBertForMaskedLM"))
    listed = {(refusal.path, refusal.operator) for refusal in made.refusals}
    assert ("mobilebert.embeddings.embedding_transformation", "linear") in listed
    assert ("cls.predictions", "matmul") in listed
    assert all("outside the encoder layers" in refusal.reason for refusal in made.refusals)


class Hidden(torch.autograd.Function):
    """A product with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return left @ right

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        left, right = ctx.saved_tensors
        return grads[0] @ right.mT, left.mT @ grads[0]


class Plain(torch.autograd.Function):
    """A function without any product."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(_: Any, *grads: Any) -> Any:
        return grads[0] * 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(Plain.apply(x))
        return Hidden.apply(Hidden.apply(y, y.mT), y)


class Holder(PreTrainedModel):
    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.embed, self.layers = nn.Embedding(60, 8), nn.ModuleList([Layer()])
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.layers[0](self.embed(input_ids))


def test_products_inside_an_autograd_function_are_refused_and_counted() -> None:
    made = qs.plan(Holder(BertConfig(vocab_size=60)).eval())
    assert vars(made.coverage["matmul"]) == {"found": 2, "quantized": 0, "refused": 2}
    found = [refusal for refusal in made.refusals if refusal.operator == "autograd_function"]
    assert [refusal.count for refusal in found] == [2]  # on one line of the source
    reason = "its own backward goes with its forward, so the matmul inside takes no quantizers"
    assert {refusal.reason for refusal in found} == {reason}
