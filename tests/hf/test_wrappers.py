"""What is refused because it is not the model itself: wrappers name the model inside, decoders are called decoders."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from architectures import build
from torch import nn
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PegasusConfig,
    PegasusForCausalLM,
    PreTrainedModel,
)

import qdq_surgery as qs
from qdq_surgery.hf.wrappers import is_decoder_only, models_inside


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = build("bert", "BertModel")
        self.others = nn.ModuleDict({"a-b": nn.Sequential(nn.Identity(), build("bert", "BertForMaskedLM"))})


@pytest.mark.parametrize("what", ["convert", "plan"])
def test_a_wrapper_is_told_which_model_it_holds_and_where(what: str) -> None:
    model = Towers()
    words = (
        r"found a Towers, .* it holds a BertModel at model\.query, a BertForMaskedLM at model\.others\['a-b'\]\[1\]: "
    )
    with pytest.raises(qs.ModelError, match=words + r".*convert\(model\.query, \.\.\., inplace=True\)"):
        getattr(qs, what)(model)
    assert [path for path, _ in models_inside(model)] == [".query", ".others['a-b'][1]"]
    for path, inner in models_inside(model):  # and it works as it is told
        assert eval(f"model{path}") is inner
        qs.convert(inner, inplace=True)


def test_a_model_under_two_names_is_named_once() -> None:
    model = Towers()
    model.again = model.query
    model.last = build("bert", "BertModel")
    with pytest.raises(qs.ModelError, match=r"model\.query, a BertForMaskedLM at [^,]*, a BertModel at model\.last: "):
        qs.convert(model)  # type: ignore[type-var]


def test_an_object_that_holds_a_model() -> None:
    holder = SimpleNamespace(model=build("bert", "BertModel"), device="cpu")
    with pytest.raises(qs.ModelError, match=r"found a SimpleNamespace.* a BertModel at model\.model"):
        qs.convert(holder)  # type: ignore[arg-type]


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), object(), None], ids=["linear", "object", "None"])
def test_what_holds_no_model(thing: object) -> None:
    with pytest.raises(qs.ModelError, match="wanted a Hugging Face PreTrainedModel; load it with transformers"):
        qs.convert(thing)  # type: ignore[arg-type]


SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "vocab_size": 64}
DECODERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=64)),
    "llama-without-cache": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=64, use_cache=False)
    ),
    "gpt2": lambda: GPT2Model(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64)),
    "gpt2-without-cache": lambda: GPT2Model(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64, use_cache=False)),
}


@pytest.mark.parametrize("rules", ["qdqbert", "linear-only"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_called_one(name: str, rules: str) -> None:
    with pytest.raises(qs.ModelError, match=r"is a decoder, and a decoder is not supported") as caught:
        qs.convert(DECODERS[name](), rules)
    assert "Cache" not in str(caught.value)


@pytest.mark.parametrize("kind", ["BertModel", "BertLMHeadModel"])
def test_an_encoder_type_that_can_decode_is_none(kind: str) -> None:
    model: PreTrainedModel = build("bert", kind, is_decoder=kind == "BertLMHeadModel")
    assert not is_decoder_only(model)


def test_half_of_an_encoder_decoder_is_converted() -> None:
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 60}
    model = PegasusForCausalLM(PegasusConfig(**sizes)).eval()
    assert not is_decoder_only(model)
    assert vars(qs.plan(model).coverage["linear"]) == {"found": 10, "quantized": 6, "refused": 4}


def test_a_decoders_type_that_looks_both_ways_is_an_encoder() -> None:
    sizes = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 16, "use_cache": False}
    assert is_decoder_only(Gemma3TextModel(Gemma3TextConfig(**sizes)))
    model = Gemma3TextModel(Gemma3TextConfig(**sizes, use_bidirectional_attention=True)).eval()
    assert not is_decoder_only(model)
    assert vars(qs.plan(model).coverage["linear"]) == {"found": 7, "quantized": 7, "refused": 0}
