"""Converted models in generate, pipelines, compilers, threads and worker processes."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import forked
import pytest
import torch
from architectures import BASE, BY_TYPE, DECODERS, EVERY_HEAD, batch_for, build, tensors_of
from ecosystem import Scored, assert_equal, calibrated, called, memory, ranges
from tiny_checkpoint import tiny_tokenizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from transformers import EncoderDecoderConfig, EncoderDecoderModel, PreTrainedModel, pipeline
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import qdq_surgery as qs
from qdq_surgery.trace.attention import QDQ_ATTENTION

#: Attention behind transformers' interface and written into a block, in layers of every kind.
SIX = ("bert", "distilbert", "albert", "mpnet", "deberta-v2", "modernbert")

# generate ------------------------------------------------------------------------------------------------------------

SEARCHES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 10},
    "beams-sampled": {"do_sample": True, "num_beams": 2},
}


def generated(model: PreTrainedModel, batch: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(3)
    return model.generate(**batch, max_new_tokens=8, pad_token_id=0, eos_token_id=None, **options)


def prompt(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of two lengths, padded on the left."""
    batch = batch_for(model, (2, 6), mask=False)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :2] = 0
    batch["input_ids"][0, :2] = 0
    return {**batch, "attention_mask": mask}


@pytest.mark.parametrize(
    ("model_type", "head", "search"),
    [
        *((*DECODERS[0], search) for search in SEARCHES),
        *((*each, search) for each, search in zip(DECODERS[1:], ("beams", "sampling", "beams-sampled"), strict=True)),
    ],
)
def test_generate_with_a_cache(model_type: str, head: str, search: str) -> None:
    options = SEARCHES[search]
    qmodel = calibrated(model_type, head, is_decoder=True)
    batch = prompt(qmodel)
    found = generated(qmodel, batch, use_cache=True, **options)
    assert found.shape == (2, 14)
    assert torch.equal(found, generated(qmodel, batch, use_cache=False, **options))
    plain = build(model_type, head, is_decoder=True)
    with qs.quantization_disabled(qmodel):
        floats = generated(qmodel, batch, use_cache=True, **options)
        assert torch.equal(floats, generated(plain, batch, use_cache=True, **options))
    for each in qs.quantizers(qmodel).values():  # so coarse a grid that quantizers must show
        each.amax = each.amax * 30
    assert not torch.equal(generated(qmodel, batch, use_cache=True, **options), floats)


@torch.no_grad()
def test_a_decoder_with_cross_attention() -> None:
    qmodel = calibrated("bert", "BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    batch: dict[str, Any] = {**batch_for(qmodel, (2, 6), mask=False), **memory(2)}
    counts = called(qmodel, batch, use_cache=False)
    assert counts.keys() == qs.quantizers(qmodel).keys()
    assert sum(".crossattention." in name for name in counts) == 2 * 14
    # Step by step, with the cache that transformers makes for it (its generate makes another one, which has no place
    # for the encoder's keys; float models fail alike).
    wanted = generated(qmodel, batch, use_cache=False, do_sample=False)
    ids, cache = batch["input_ids"], EncoderDecoderCache(DynamicCache(), DynamicCache())
    for _ in range(8):
        step = ids[:, cache.get_seq_length() :]
        logits = qmodel(input_ids=step, past_key_values=cache, use_cache=True, **memory(2)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, wanted)
    other = {**batch, **memory(2, seed=1)}
    assert not torch.equal(qmodel(**batch).logits, qmodel(**other).logits)


def test_an_encoder_and_a_decoder_generate() -> None:
    torch.manual_seed(0)
    halves = BY_TYPE["bert"].config(), BY_TYPE["bert"].config(is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*halves)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = EncoderDecoderModel(config).eval()
    batch = batch_for(build("bert", "BertModel"), (2, 5))
    example = {**batch, "decoder_input_ids": batch["input_ids"]}
    qmodel = qs.convert(model, example_inputs=example)
    qs.calibrate(qmodel, [{**example, "decoder_attention_mask": batch["attention_mask"]}])
    for name in ("greedy", "beams-sampled"):
        options = SEARCHES[name]
        found = generated(qmodel, batch, use_cache=True, **options)
        assert torch.equal(found, generated(qmodel, batch, use_cache=False, **options))
        with qs.quantization_disabled(qmodel):
            floats = generated(qmodel, batch, use_cache=True, **options)
        assert torch.equal(floats, generated(model, batch, use_cache=True, **options))


# pipelines -----------------------------------------------------------------------------------------------------------

TEXTS = ["the quick brown fox jumps over the lazy dog", "paris is the capital of france"]


@functools.cache
def tokenizer() -> Any:
    return tiny_tokenizer([*TEXTS, "this example is about ."])


def encoded(*texts: Any) -> dict[str, Tensor]:
    return dict(tokenizer()(*texts, padding=True, return_tensors="pt"))


def for_texts(head: str, **options: Any) -> PreTrainedModel:
    qmodel = calibrated(head=head, vocab_size=len(tokenizer()), num_hidden_layers=1, **options)
    qs.calibrate(qmodel, [encoded(TEXTS)])
    return qmodel


def scores(model: PreTrainedModel, *texts: Any) -> Tensor:
    with torch.no_grad():
        return model(**encoded(*texts))[0]


# Scores go through NumPy or Python there: the softmax is computed in another order of sums.
near = functools.partial(pytest.approx, rel=1e-5, abs=0)


def test_fill_mask() -> None:
    qmodel = for_texts("BertForMaskedLM")
    text = "the quick [MASK] fox"
    found = pipeline("fill-mask", model=qmodel, tokenizer=tokenizer())(text, top_k=5)
    place = encoded(text)["input_ids"][0].tolist().index(tokenizer().mask_token_id)
    wanted = scores(qmodel, text)[0, place].softmax(-1).topk(5)
    assert [each["token"] for each in found] == wanted.indices.tolist()
    assert [each["score"] for each in found] == near(wanted.values.tolist())


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_text_classification(problem: str) -> None:
    qmodel = for_texts("BertForSequenceClassification", num_labels=3, problem_type=problem)
    classify = pipeline("text-classification", model=qmodel, tokenizer=tokenizer(), top_k=None)
    found = classify(TEXTS, batch_size=2)
    logits = scores(qmodel, TEXTS)
    wanted = logits.softmax(-1) if problem.startswith("single") else logits.sigmoid()
    for row, labels in zip(wanted, found, strict=True):
        assert {each["label"]: each["score"] for each in labels} == {
            f"LABEL_{index}": near(float(value)) for index, value in enumerate(row)
        }


def test_token_classification() -> None:
    qmodel = for_texts("BertForTokenClassification", num_labels=3)
    tag = pipeline("token-classification", model=qmodel, tokenizer=tokenizer(), ignore_labels=[])
    found = tag(TEXTS[0])
    wanted = scores(qmodel, TEXTS[0])[0, 1:-1].softmax(-1).max(-1)
    assert [each["entity"] for each in found] == [f"LABEL_{index}" for index in wanted.indices]
    assert [float(each["score"]) for each in found] == near(wanted.values.tolist())


def test_feature_extraction() -> None:
    qmodel = for_texts("BertModel")
    found = pipeline("feature-extraction", model=qmodel, tokenizer=tokenizer())(TEXTS[0], return_tensors=True)
    assert torch.equal(found, scores(qmodel, TEXTS[0]))


def test_zero_shot_classification() -> None:
    names = {"contradiction": 0, "neutral": 1, "entailment": 2}
    qmodel = for_texts("BertForSequenceClassification", num_labels=3)
    qmodel.config.label2id, qmodel.config.id2label = names, {index: name for name, index in names.items()}
    classify = pipeline("zero-shot-classification", model=qmodel, tokenizer=tokenizer())
    found = classify(TEXTS[0], candidate_labels=["fox", "capital"], multi_label=True)
    for label, score in zip(found["labels"], found["scores"], strict=True):
        pair = scores(qmodel, TEXTS[0], f"This example is {label}.")[0]
        assert score == near(float(pair[[0, 2]].softmax(-1)[1]))


def test_text_generation() -> None:
    qmodel = for_texts("BertLMHeadModel", is_decoder=True)
    write = pipeline("text-generation", model=qmodel, tokenizer=tokenizer())
    found = write(TEXTS[0], max_new_tokens=5, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    ids = encoded(TEXTS[0])
    with torch.no_grad():
        wanted = qmodel.generate(**ids, max_new_tokens=5, do_sample=False)
    assert found == wanted[0].tolist()


def test_question_answering_by_hand() -> None:
    # transformers 5.23 has no pipeline for it any more.
    qmodel = for_texts("BertForQuestionAnswering")
    batch = encoded("who jumps", TEXTS[0])
    with torch.no_grad():
        output = qmodel(**batch)
        with qs.quantization_disabled(qmodel):
            floats = qmodel(**batch)
    assert output.start_logits.shape == output.end_logits.shape == batch["input_ids"].shape
    for name in ("start_logits", "end_logits"):
        assert not torch.equal(output[name], floats[name])
        # A wide bound: that the quantized model is the same model, no more.
        assert torch.cosine_similarity(output[name], floats[name]).item() > 0.9


# What a call may ask for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", SIX)
@torch.no_grad()
def test_attentions_and_hidden_states(model_type: str) -> None:
    """That they equal the float model's when quantizers are disabled is in test_float_exact.py."""
    qmodel = calibrated(model_type, BASE[model_type])
    batch = batch_for(qmodel, (2, 7))
    plain = qmodel(**batch)
    assert set(plain) <= {"last_hidden_state", "pooler_output"}
    full = qmodel(**batch, output_attentions=True, output_hidden_states=True)
    assert_equal({name: value for name, value in tensors_of(full).items() if name in plain}, dict(plain))
    layers = qmodel.config.num_hidden_layers
    assert len(full.attentions) == layers
    assert len(full.hidden_states) == layers + 1
    for weights in full.attentions:
        assert weights.shape == (2, 4, 7, 7)
        # Before their quantizer: rows of a softmax.
        assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 7), rtol=0, atol=1e-5)
    with qs.quantization_disabled(qmodel):
        floats = qmodel(**batch, output_attentions=True)
    assert not torch.equal(full.attentions[-1], floats.attentions[-1])
    assert dict(qmodel(**batch)).keys() == dict(plain).keys()  # asked for once is not asked for always


#: Each ties its output to the table of words in its own way.
TIED = ("bert", "roberta", "albert", "mobilebert", "modernbert")
MASKED = [(model_type, head) for model_type, head in EVERY_HEAD if model_type in TIED and head.endswith("ForMaskedLM")]


@pytest.mark.parametrize(
    ("model_type", "head"),
    [*MASKED, ("bert", "BertForPreTraining"), ("bert", "BertLMHeadModel"), ("bert", "BertForTokenClassification")],
    ids=lambda value: value if value[0].isupper() else "",
)
@torch.no_grad()
def test_resized_embeddings(model_type: str, head: str) -> None:
    options = {"num_hidden_layers": 1, **({"is_decoder": True} if head == "BertLMHeadModel" else {})}
    qmodel, plain = calibrated(model_type, head, **options), build(model_type, head, **options)
    names, before = list(qs.quantizers(qmodel)), ranges(qmodel)
    for model in (qmodel, plain):
        torch.manual_seed(0)
        if model_type == "mobilebert":  # its own method takes no more than the number
            model.resize_token_embeddings(67)
        else:
            model.resize_token_embeddings(67, mean_resizing=False)
    assert qmodel.get_input_embeddings().weight.shape[0] == 67
    assert list(qs.quantizers(qmodel)) == names
    assert_equal(ranges(qmodel), before)
    head_of = qmodel.get_output_embeddings()
    if plain.get_output_embeddings() is not None:
        tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
        assert (head_of.weight is qmodel.get_input_embeddings().weight) == tied
    batch = batch_for(qmodel, (2, 5))
    batch["input_ids"][0, 0] = 66
    assert called(qmodel, batch).keys() == set(names)
    assert not torch.equal(qmodel(**batch)[0], plain(**batch)[0])
    with qs.quantization_disabled(qmodel):
        assert_equal(tensors_of(qmodel(**batch)), tensors_of(plain(**batch)))


# Attention implementations -------------------------------------------------------------------------------------------

#: These models' attention is written into their blocks: transformers cannot switch it, and says so in its log.
INLINE = ("deberta-v2", "mpnet")


class _Sdpa(TorchFunctionMode):
    """Counts calls of torch's fused attention."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def fused(model: PreTrainedModel, batch: dict[str, Any]) -> int:
    with _Sdpa() as mode:
        model(**batch)
    return mode.calls


@pytest.mark.parametrize(("model_type", "way"), [*zip(SIX, itertools.cycle(("method", "dict", "config")))])
@torch.no_grad()
def test_no_switch_leaves_attention_unquantized(model_type: str, way: str) -> None:
    """The error in words is in test_convert.py."""
    qmodel = calibrated(model_type, BASE[model_type])
    batch = batch_for(qmodel, (2, 5))
    wanted, mine = qmodel(**batch)[0], qmodel.config._attn_implementation

    def switch(implementation: str) -> None:
        if way == "config":
            qmodel.config._attn_implementation = implementation
        else:
            qmodel.set_attn_implementation(implementation if way == "method" else {"": implementation})

    for implementation in ("sdpa", "eager"):
        switch(implementation)
        if model_type in INLINE:
            assert len(called(qmodel, batch)) == len(qs.quantizers(qmodel))
        else:
            with pytest.raises(qs.AttentionBypassError, match=rf"'{implementation}'.*{QDQ_ATTENTION}"):
                qmodel(**batch)
    switch(mine)
    assert torch.equal(qmodel(**batch)[0], wanted)


@pytest.mark.parametrize("model_type", SIX)
@torch.no_grad()
def test_linear_only_takes_any_implementation(model_type: str) -> None:
    qmodel = calibrated(model_type, BASE[model_type], "linear-only")
    batch = batch_for(qmodel, (2, 5))
    wanted = qmodel(**batch)[0]
    assert fused(qmodel, batch) == 0
    qmodel.set_attn_implementation("sdpa")
    assert fused(qmodel, batch) == (0 if model_type in INLINE else qmodel.config.num_hidden_layers)
    assert len(called(qmodel, batch)) == len(qs.quantizers(qmodel))
    real = batch["attention_mask"].bool()  # what becomes of padding is each implementation's own affair
    # The fused sums are rounded otherwise; here no value lies so near the edge of a step that it would show more.
    assert torch.allclose(qmodel(**batch)[0][real], wanted[real], rtol=0, atol=1e-4)
    qmodel.set_attn_implementation("eager")
    assert fused(qmodel, batch) == 0
    assert torch.equal(qmodel(**batch)[0], wanted)


# Compilers -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_compiled_training_step() -> None:
    """Of a layer in one graph, which all that is quantized lies in."""
    qmodel = calibrated(num_hidden_layers=1).train()
    qs.learn_ranges(qmodel, weights=True)
    batch = batch_for(qmodel, (2, 5), labels=True)
    compiled = copy.deepcopy(qmodel)
    torch._dynamo.reset()
    compiled.bert.encoder.layer[0].compile(backend="eager", fullgraph=True)
    results = []
    for model in (qmodel, compiled):
        torch.manual_seed(5)
        model(**batch).loss.backward()
        results.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
    assert any(name.endswith("_amax") for name in results[0])
    assert_equal(results[1], results[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_a_block_compiled_in_place() -> None:
    qmodel = calibrated(num_hidden_layers=1)
    plain = build("bert", "BertForSequenceClassification", num_hidden_layers=1)
    batch = batch_for(qmodel, (2, 5))
    wanted = qmodel(**batch).logits
    torch._dynamo.reset()
    qmodel.bert.encoder.layer[0].output.compile(backend="eager")
    assert torch.equal(qmodel(**batch).logits, wanted)
    with qs.quantization_disabled(qmodel):  # what is compiled knows what is switched off
        assert torch.equal(qmodel(**batch).logits, plain(**batch).logits)
    assert torch.equal(qmodel(**batch).logits, wanted)


# Processes -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_models_in_the_worker_of_a_loader() -> None:
    """They are pickled to a new process, where nothing is recorded yet."""
    qmodel = calibrated()
    batches = [batch_for(qmodel, shape, mask=mask) for shape in ((2, 5), (3, 7)) for mask in (True, False)]
    data = Scored(qmodel, batches)
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=forked.CONTEXT)
    for found, index in zip(loader, range(4), strict=True):
        assert torch.equal(found, data[index])
