"""A modeling file that looks attention functions up in a table of its own, as ModernBERT's did in transformers 5.0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertSelfAttention

import qdq_surgery as qs
from qdq_surgery.errors import ModelError


def eager_attention(module: BertSelfAttention, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    scores = torch.matmul(query, key.transpose(2, 3)) * module.scaling
    if mask is not None:
        scores = scores + mask
    weights = torch.nn.functional.softmax(scores, dim=-1)
    weights = torch.nn.functional.dropout(weights, p=module.dropout.p, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous()


TABLE: dict[str, Callable[..., Tensor]] = {"eager": eager_attention}


class TableAttention(BertSelfAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **_: Any) -> tuple[Tensor, None]:
        shape = hidden_states.shape
        heads = (*shape[:-1], -1, self.attention_head_size)
        parts = [each(hidden_states).view(heads).transpose(1, 2) for each in (self.query, self.key, self.value)]
        function = TABLE[self.config._attn_implementation]
        return function(self, *parts, attention_mask).reshape(*shape[:-1], -1), None


def bert_with(attention: type[BertSelfAttention]) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model = BertModel._from_config(config, attn_implementation="eager").eval()
    for layer in model.encoder.layer:
        layer.attention.self.__class__ = attention
    return model


@pytest.mark.parametrize("training", [False, True])
def test_its_eager_function_gets_the_quantizers(training: bool) -> None:
    model = bert_with(TableAttention)
    converted = qs.convert(model)
    assert len(qs.quantizers(converted)) == len(qs.quantizers(qs.convert(bert_with(BertSelfAttention))))
    assert converted.config._attn_implementation == "eager"
    ids, mask = torch.randint(0, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    found = []
    with torch.no_grad(), qs.quantization_disabled(converted):
        for each in (model, converted):
            each.train(training)
            torch.manual_seed(1)
            found.append(each(ids, attention_mask=mask).last_hidden_state)
    assert torch.equal(*found)


class Broken(BertSelfAttention):
    def forward(self, *_: Any, **__: Any) -> Any:
        raise KeyError("of its own")


def test_a_model_that_fails_otherwise_says_how() -> None:
    with pytest.raises(ModelError, match=r"does not run on the example inputs .*KeyError: 'of its own'"):
        qs.convert(bert_with(Broken))
