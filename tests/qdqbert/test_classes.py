"""QDQBERT's classes: that they are BERT converted, bit-equal to the real ones, and take what those took."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import transformers
from golden_case import Golden, assert_equal, flat, target_of
from hearing import Heard
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor
from transformers import BertConfig, DynamicCache, EncoderDecoderCache, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.qdqbert import classes as qdqbert
from qdq_surgery.qdqbert.legacy_cache import as_cache
from reference_cases import HEADS

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}
IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 3, 4, 2]])
OURS = {"quant_method": "qdq_surgery", "rules": "qdqbert"}


def tiny(**config: Any) -> qs.QDQBertConfig:
    return qs.QDQBertConfig(**{**SIZES, **config})


def build(name: str, **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = getattr(qs, name)(tiny(is_decoder=name == "QDQBertLMHeadModel", **config)).eval()
    return made


@functools.cache
def _built(name: str) -> PreTrainedModel:
    return build(name)


def built(name: str) -> PreTrainedModel:
    """What :func:`build` makes, sooner."""
    return copy.deepcopy(_built(name))


def ids_for(name: str) -> Tensor:
    return IDS[:, None].repeat(1, 2, 1) if name == "QDQBertForMultipleChoice" else IDS


# --------------------------------------------------------------------------------------------------------- the config


def test_the_config_carries_how_it_is_quantized() -> None:
    assert tiny().quantization_config == OURS
    assert tiny(quantization_config=None).quantization_config == OURS
    other = {**OURS, "rules": "linear-only"}
    assert tiny(quantization_config=other).quantization_config == other
    first, second = tiny(), tiny()
    assert first.quantization_config is not second.quantization_config
    assert first == second
    assert (first.model_type, first.is_decoder, first.add_cross_attention) == ("qdqbert", False, False)


def test_the_config_takes_positions_as_it_did() -> None:
    config = qs.QDQBertConfig(99, 32, 1, 2, 40, "relu", is_decoder=True)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.hidden_act) == (99, 32, 1, "relu")
    assert config.is_decoder


def test_the_config_takes_a_function() -> None:
    config = tiny(hidden_act=torch.nn.functional.relu)
    assert copy.deepcopy(config).hidden_act is torch.nn.functional.relu
    torch.manual_seed(0)
    found = qs.QDQBertModel(config).eval()(IDS)[0]
    assert torch.equal(found, build("QDQBertModel", hidden_act="relu")(IDS)[0])


def test_the_config_comes_back_from_a_folder(tmp_path: Path) -> None:
    tiny(num_labels=5, output_attentions=True).save_pretrained(tmp_path)
    found = qs.QDQBertConfig.from_pretrained(tmp_path)
    assert (found.num_labels, found.output_attentions, found.hidden_size) == (5, True, 32)
    assert found.quantization_config == OURS
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is qs.QDQBertConfig
    assert qs.QDQBertConfig.from_pretrained(tmp_path, num_labels=7).num_labels == 7


def test_the_config_of_a_bert_folder(tmp_path: Path, heard: Heard) -> None:
    BertConfig(**SIZES, num_labels=3, layer_norm_eps=1e-5).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    found = qs.QDQBertConfig.from_pretrained(tmp_path)
    assert (found.num_labels, found.layer_norm_eps, found.vocab_size) == (3, 1e-5, 32)
    assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (0, None, None)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in saved.items() if not k.endswith("_token_id")}))
    assert qs.QDQBertConfig.from_pretrained(tmp_path).pad_token_id == 0
    assert not heard.records
    (tmp_path / "config.json").write_text(json.dumps({**saved, "model_type": "roberta"}))
    qs.QDQBertConfig.from_pretrained(tmp_path)
    assert "of type `roberta`" in heard.text


def test_a_bert_config_keeps_its_values() -> None:
    given = BertConfig(**SIZES, num_labels=3, pad_token_id=None, is_decoder=True, my_own="kept")
    before = copy.deepcopy(given)
    found = qs.QDQBertConfig.of(given)
    assert type(found) is qs.QDQBertConfig
    assert (found.num_labels, found.pad_token_id, found.eos_token_id, found.my_own) == (3, None, None, "kept")
    assert found.is_decoder
    assert found.quantization_config == OURS
    assert given == before
    assert not hasattr(given, "quantization_config")
    assert type(qs.QDQBertForMaskedLM(BertConfig(**SIZES)).config) is qs.QDQBertConfig


def test_what_is_no_bert_is_said() -> None:
    with pytest.raises(qs.ModelError, match=r"found a RobertaConfig, wanted .*qdq_surgery\.convert"):
        qs.QDQBertModel(transformers.RobertaConfig(**SIZES))
    with pytest.raises(qs.ModelError, match="position_embedding_type is 'relative_key'"):
        qs.QDQBertModel(tiny(position_embedding_type="relative_key"))
    qs.QDQBertModel(tiny(position_embedding_type="absolute"))
    with pytest.raises(qs.ModelError, match="of the method 'gptq', which QDQBertModel does not know"):
        qs.QDQBertModel(tiny(quantization_config={"quant_method": "gptq", "bits": 4}))
    with pytest.raises(qs.RuleFileError, match="no-such-rules"):
        qs.QDQBertModel(tiny(quantization_config={**OURS, "rules": "no-such-rules"}))


# -------------------------------------------------------------------------------------------------------- the classes


class Real(Golden):
    """What the real one computes, for QDQBERT's class under its own name."""

    def converted(self) -> PreTrainedModel:
        model = getattr(qs, f"QDQ{self.meta['head']}")(qs.QDQBertConfig(**self.config())).eval()
        missing, unexpected = model.load_state_dict(self.group("weights"), strict=False)
        assert not missing
        assert not unexpected
        return model


@pytest.mark.usefixtures("threads_of_the_reference")
@pytest.mark.parametrize("case", ["model", "masked-lm", "multiple-choice", "decoder", "decoder-cross"])
def test_outputs_are_those_of_the_real_one(case: str, reference: Path) -> None:
    golden = Real(reference / f"{case}.safetensors")
    output = golden.calibrated()(**golden.arguments(), output_hidden_states=True, output_attentions=True)
    found, wanted = flat(output), golden.group("legacy")
    if "loss" in wanted:
        found["loss"] = target_of(golden, output).detach()
    assert_equal(found, wanted, tolerance=0.0)


@pytest.mark.parametrize("name", HEADS)
def test_the_state_dict_has_the_names_of_the_real_one(name: str, reference: Path) -> None:
    cross = {"add_cross_attention": True} if name == "QDQBertLMHeadModel" else {}
    model = build(name, num_hidden_layers=1, **cross)
    for quantizer in qs.quantizers(model).values():
        quantizer.amax = torch.tensor(1.0)
    assert sorted(model.state_dict()) == json.loads((reference / "names.json").read_text())[name]


@pytest.mark.parametrize("name", HEADS)
def test_a_model_is_its_class_and_a_converted_bert(name: str) -> None:
    model, ids = built(name), ids_for(name)
    bert = getattr(transformers, name.removeprefix("QDQ"))
    assert type(model) is getattr(qs, name)
    assert isinstance(model, bert)
    assert isinstance(model.base_model, qs.QDQBertModel)
    assert len(qs.quantizers(model)) == 40
    torch.manual_seed(0)
    config = BertConfig(**SIZES, pad_token_id=1, is_decoder=model.config.is_decoder, attn_implementation="eager")
    plain = bert(config).eval()
    with torch.no_grad(), qs.quantization_disabled(model):
        assert torch.equal(model(ids)[0], plain(ids)[0])
    assert not torch.equal(model(ids)[0], plain(ids)[0])


@pytest.mark.parametrize("name", HEADS)
def test_copies_and_pickles(name: str) -> None:
    model, ids = built(name), ids_for(name)
    wanted = model(ids)[0]
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(made) is type(model)
        assert isinstance(made.base_model, qs.QDQBertModel)
        assert torch.equal(made(ids)[0], wanted)
        assert len(made(ids, output_attentions=True).attentions) == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["made", "unpickled"])
def test_a_fresh_process_knows_the_classes(how: str, tmp_path: Path) -> None:
    """transformers notes by class what a model can return, when it makes one: here it makes no QDQBertModel."""
    path = tmp_path / how
    if how == "unpickled":
        path.write_bytes(pickle.dumps(built("QDQBertForMaskedLM")))
        make = "pickle.load(open(sys.argv[1], 'rb'))"
    else:
        tiny().save_pretrained(path)
        make = "transformers.AutoModelForMaskedLM.from_config(transformers.AutoConfig.from_pretrained(sys.argv[1]))"
    code = (
        "import pickle, sys, warnings; warnings.simplefilter('ignore')\n"
        "import torch, transformers, qdq_surgery\n"
        f"model = {make}\n"
        "print(type(model).__name__, len(model(torch.tensor([[3, 4]]), output_attentions=True).attentions))"
    )
    assert forked.run(code, path, folder=tmp_path / "printed").split() == ["QDQBertForMaskedLM", "2"]


@pytest.mark.usefixtures("default_descriptors")
def test_default_descriptors_hold() -> None:
    quant_nn.QuantLinear.set_default_quant_desc_input(QuantDescriptor(num_bits=4, calib_method="histogram"))
    quant_nn.QuantLinear.set_default_quant_desc_weight(QuantDescriptor(num_bits=6, axis=None))
    for name, quantizer in qs.quantizers(build("QDQBertModel")).items():
        assert (quantizer.num_bits, quantizer.axis) == ((6, None) if "weight" in name else (4, None))


def test_the_rules_of_the_config_hold() -> None:
    model = build("QDQBertModel", quantization_config={**OURS, "rules": "linear-only"})
    assert len(qs.quantizers(model)) == 24
    assert built("QDQBertModel").config.quantization_config == OURS


def test_training_mode_and_random_numbers_stay() -> None:
    torch.manual_seed(0)
    model = qs.QDQBertForMaskedLM(tiny())
    after = torch.rand(3)
    torch.manual_seed(0)
    transformers.BertForMaskedLM(BertConfig(**SIZES))
    assert torch.equal(torch.rand(3), after)
    assert all(module.training for module in model.modules())


def test_made_from_the_config_of_another() -> None:
    first = built("QDQBertForMaskedLM")
    second = qs.QDQBertForMaskedLM(first.config).eval()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(IDS).logits, first(IDS).logits)


def test_heads_stay_tied() -> None:
    for name in ("QDQBertForMaskedLM", "QDQBertLMHeadModel"):
        model = built(name)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


@pytest.mark.parametrize(
    ("auto", "name"),
    [
        ("AutoModel", "QDQBertModel"),
        ("AutoModelForCausalLM", "QDQBertLMHeadModel"),
        *(
            (name.replace("QDQBert", "AutoModel"), name)
            for name in HEADS
            if name not in ("QDQBertModel", "QDQBertLMHeadModel")
        ),
    ],
)
def test_auto_classes(auto: str, name: str) -> None:
    made = getattr(transformers, auto).from_config(tiny(is_decoder=name == "QDQBertLMHeadModel"))
    assert type(made) is getattr(qs, name)
    assert len(qs.quantizers(made)) == 40


def test_a_tokenizer_by_model_type(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello"]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, transformers.BertTokenizerFast)
    assert tokenizer("Hello")["input_ids"] == [2, 5, 3]


def test_registering_again_is_no_error() -> None:
    qdqbert._register()


# ------------------------------------------------------------------------------------------------------ the arguments


def test_the_order_of_arguments_is_that_of_qdqbert() -> None:
    model = built("QDQBertForTokenClassification")
    mask, kinds, places = torch.ones_like(IDS), IDS % 2, torch.arange(5).flip(0).expand(2, 5)
    heads, labels = torch.tensor([0.5, 1.0]), IDS % 2
    found = model(IDS, mask, kinds, places, heads, None, labels, True, None, False)
    wanted = model(
        input_ids=IDS, attention_mask=mask, token_type_ids=kinds, position_ids=places, head_mask=heads, labels=labels,
        output_attentions=True,
    )  # fmt: skip
    assert type(found) is tuple
    assert torch.equal(found[0], wanted.loss)
    assert torch.equal(found[1], wanted.logits)
    assert torch.equal(found[2][1], wanted.attentions[1])
    embedded = model.base_model.embeddings.word_embeddings(IDS)
    assert torch.equal(model(None, mask, kinds, places, heads, embedded).logits, wanted.logits)


def test_arguments_that_do_not_fit_are_said() -> None:
    model = built("QDQBertForTokenClassification")
    with pytest.raises(TypeError, match="at most 10 positional arguments, 11 were given"):
        model(IDS, *[None] * 10)
    with pytest.raises(TypeError, match="two values for 'input_ids'"):
        model(IDS, input_ids=IDS)


def test_a_tuple_without_a_pooler_says_so() -> None:
    torch.manual_seed(0)
    model = qs.QDQBertModel(tiny(), add_pooling_layer=False).eval()
    found = model(IDS, output_hidden_states=True, return_dict=False)
    assert found[1] is None
    assert len(found[2]) == 3
    model.config.return_dict = False
    assert type(model(IDS)) is tuple
    assert model(IDS, return_dict=True).pooler_output is None


def test_attentions_by_the_config(tmp_path: Path) -> None:
    config = tiny(output_attentions=True)
    model = qs.QDQBertForMaskedLM(config).eval()
    assert config.output_attentions
    assert len(model(IDS).attentions) == 2
    assert "attentions" not in model(IDS, output_attentions=False)
    model.config.output_attentions = False
    assert "attentions" not in model(IDS)
    model.config.output_attentions = True
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["output_attentions"]


def test_the_old_name_of_next_sentence_labels() -> None:
    model = built("QDQBertForNextSentencePrediction")
    labels = torch.tensor([0, 1])
    with pytest.warns(FutureWarning, match="pass labels"):
        found = model(IDS, next_sentence_label=labels)
    assert torch.equal(found.loss, model(IDS, labels=labels).loss)


# ---------------------------------------------------------------------------------------------------- past_key_values


def legacy(cache: Any) -> tuple[tuple[Tensor, ...], ...]:
    """As transformers 4 returned a cache."""
    if isinstance(cache, EncoderDecoderCache):
        both = zip(legacy(cache.self_attention_cache), legacy(cache.cross_attention_cache), strict=True)
        return tuple(own + other for own, other in both)
    return tuple((layer.keys, layer.values) for layer in cache.layers)


@pytest.mark.usefixtures("threads_of_the_reference")
@pytest.mark.parametrize("name", ["decoder", "decoder-cross"])
def test_a_step_from_tuples_is_that_of_the_real_one(name: str, reference: Path) -> None:
    golden = Real(reference / f"{name}.safetensors")
    qmodel, memory = golden.calibrated(), golden.group("memory")
    batch = {name: value for name, value in golden.group("batch").items() if name in ("input_ids", "token_type_ids")}
    with torch.no_grad():
        cache = qmodel(**{name: value[:, :-1] for name, value in batch.items()}, **memory, use_cache=True)[1]
        past = legacy(cache)
        assert {len(layer) for layer in past} == {4 if memory else 2}
        last = {name: value[:, -1:] for name, value in batch.items()}
        for _ in range(2):  # the tuples stay as they are
            step = qmodel(**last, **memory, past_key_values=past, use_cache=True)
            assert_equal({"logits": step.logits}, golden.group("cached"), tolerance=0.0)
            assert step.past_key_values.get_seq_length() == past[0][0].shape[2] + 1
        if memory:  # keys and values of cross-attention that are left out are computed
            step = qmodel(**last, **memory, past_key_values=tuple(layer[:2] for layer in past))
            assert_equal({"logits": step.logits}, golden.group("cached"), tolerance=0.0)


def test_generation() -> None:
    model = build("QDQBertLMHeadModel", eos_token_id=None)
    for quantizer in qs.quantizers(model).values():
        quantizer.amax = torch.tensor(2.0)  # else the range is that of the tokens at hand, and a cache matters
    found = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False))
    assert found.shape == (2, 9)


LAYER = (torch.zeros(1, 2, 3, 16),) * 2


def test_a_cache_stays_the_object_it_is() -> None:
    cache = DynamicCache()
    assert as_cache(cache, 2, crosses=True) is cache
    assert as_cache(None, 2, crosses=True) is None


@pytest.mark.parametrize(
    ("past", "said"),
    [
        ((LAYER,), "entries for 1 layers, the model has 2"),
        ((LAYER, LAYER * 2), "2 tensors for some layers and 4 for others"),
        ((LAYER, LAYER[:1]), "a tuple of 2 tensors .* or 4"),
        ((LAYER, ("key", "value")), "neither a Cache nor"),
        (torch.zeros(2, 2, 1, 2, 3, 16), "neither a Cache nor"),
    ],
)
def test_a_wrong_cache_is_said(past: Any, said: str) -> None:
    with pytest.raises(qs.ModelError, match=said):
        built("QDQBertLMHeadModel")(IDS, past_key_values=past)
