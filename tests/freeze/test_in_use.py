"""Frozen models where models are used: compilers, pipelines, sentence-transformers, threads, copies, pickles."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from architectures import batch_for
from frozen_models import apart, calibrated, frozen, outputs
from tiny_checkpoint import save_tiny_bert, tiny_tokenizer
from transformers import pipeline

import qdq_surgery as qs

TEXTS = ["the quick brown fox jumps over the lazy dog", "paris is the capital of france", "a dog"]

WARNINGS = "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.filterwarnings(*WARNINGS)
@torch.no_grad()
def test_inductor() -> None:
    """The feed-forward network alone: what a C++ compiler needs for a whole model is a minute."""
    layer = frozen(num_hidden_layers=1).get_submodule("encoder.layer.0")
    network = torch.nn.Sequential(layer.intermediate, layer.output.dense)
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    wanted = network(states)
    torch._dynamo.reset()
    found = torch.compile(network, fullgraph=True, dynamic=False)(states)
    # A value between two integers to the last bit may become the other one.
    assert apart({"states": found}, {"states": wanted}) < 0.05


@pytest.mark.filterwarnings(*WARNINGS)
def test_torch_export_is_refused() -> None:
    model = frozen(num_hidden_layers=1)
    with pytest.raises(qs.ModelError, match="integers are in no such file; export the quantized model"):
        torch.export.export(model, (), dict(batch_for(model, (2, 5))), strict=False)


@pytest.mark.parametrize("rules", ["linear-only", "qdqbert"])
def test_copies_and_pickles(rules: str) -> None:
    model = frozen("bert", rules, num_hidden_layers=1)
    batch = batch_for(model, (2, 5))
    wanted = outputs(model, batch)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert type(again) is type(model) or type(again).__name__ == type(model).__name__
        assert same(outputs(again, batch), wanted)
        assert qs.frozen_receipt(again, shape=(1, 4)).linear == 1.0
    del model
    assert same(outputs(again, batch), wanted)


@torch.inference_mode()
def test_inference_mode() -> None:
    model = frozen("bert", "qdqbert", num_hidden_layers=1)
    batch = batch_for(model, (2, 5))
    wanted = {name: value.clone() for name, value in outputs(model, batch).items()}
    assert same(dict(model(**batch)), wanted)


def test_made_in_inference_mode() -> None:
    qmodel = calibrated(num_hidden_layers=1)
    with torch.inference_mode():
        model = qs.freeze(qmodel)
    batch = batch_for(qmodel, (2, 5))
    assert apart(outputs(model, batch), outputs(qmodel, batch)) < 0.05


def test_threads() -> None:
    model = frozen(num_hidden_layers=1)
    batches = [batch_for(model, (2, tokens)) for tokens in range(3, 11)]
    wanted = [outputs(model, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: outputs(model, batch), batches))
    assert all(map(same, found, wanted))


def test_a_pipeline() -> None:
    tokenizer = tiny_tokenizer(TEXTS)
    qmodel = calibrated("bert", "linear-only", "BertForSequenceClassification", vocab_size=len(tokenizer))
    wanted = pipeline("text-classification", model=qmodel, tokenizer=tokenizer, device="cpu")(TEXTS)
    found = pipeline("text-classification", model=qs.freeze(qmodel), tokenizer=tokenizer, device="cpu")(TEXTS)
    assert [each["label"] for each in found] == [each["label"] for each in wanted]
    assert all(abs(one["score"] - other["score"]) < 0.01 for one, other in zip(found, wanted, strict=True))


def test_sentence_transformers(tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    encoder = package.SentenceTransformer(str(save_tiny_bert(tmp_path / "tiny", TEXTS)), device="cpu")
    model = encoder[0].model
    qs.convert(model, "linear-only", inplace=True)
    qs.calibrate(model, [dict(encoder.tokenizer(TEXTS, padding=True, return_tensors="pt"))])
    wanted = encoder.encode(TEXTS, convert_to_tensor=True)
    qs.freeze(model, inplace=True)
    found = encoder.encode(TEXTS, convert_to_tensor=True)
    assert float(torch.nn.functional.cosine_similarity(found, wanted).min()) > 0.999


def test_other_attention_implementations() -> None:
    qmodel = calibrated()
    model = qs.freeze(qmodel)
    batch = batch_for(qmodel, (2, 5))
    wanted = outputs(model, batch)
    model.set_attn_implementation("sdpa")
    assert apart(outputs(model, batch), wanted) < 0.05
    quantized = frozen("bert", "qdqbert")
    quantized.set_attn_implementation("sdpa")
    with pytest.raises(qs.AttentionBypassError):
        quantized(**batch)
