"""Converted encoders in sentence-transformers, where it holds its model: ``SentenceTransformer(...)[0].model``."""

from __future__ import annotations

import copy
import multiprocessing
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from ecosystem import called
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_checkpoint import save_tiny_bert
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import qdq_surgery as qs

TEXTS = ["the quick brown fox jumps over the lazy dog", "paris is the capital of france", "a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("tiny"), TEXTS)


def loaded(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def batch_of(encoder: Any, texts: Any = TEXTS) -> dict[str, Tensor]:
    return dict(encoder.tokenizer(texts, padding=True, return_tensors="pt"))


@pytest.fixture(scope="module")
def made(folder: Path) -> SentenceTransformer:
    encoder = loaded(folder)
    qs.convert(encoder[0].model, inplace=True)
    qs.calibrate(encoder[0].model, [batch_of(encoder)])
    return encoder


@pytest.fixture
def encoder(made: SentenceTransformer) -> SentenceTransformer:
    return copy.deepcopy(made)


def pooled(encoder: SentenceTransformer, pooling: str = "mean") -> Tensor:
    batch = batch_of(encoder)
    with torch.no_grad():
        states = encoder[0].model(**batch).last_hidden_state
    if pooling == "cls":
        return states[:, 0]
    mask = batch["attention_mask"].unsqueeze(-1).float()
    if pooling == "max":
        return states.masked_fill(mask == 0, -torch.inf).amax(1)
    return (states * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalized"])
def test_embeddings_are_those_pooled_by_hand(encoder: SentenceTransformer, pooling: str, normalized: bool) -> None:
    encoder[1] = Pooling(32, pooling)
    found = encoder.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=normalized)
    wanted = pooled(encoder, pooling)
    if normalized:
        wanted = torch.nn.functional.normalize(wanted, dim=-1)
    # One batch, so the same hidden states; float32 rounding of the mean and of the norm.
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)


def test_it_is_quantized_and_nothing_else_is(encoder: SentenceTransformer, folder: Path) -> None:
    batch = batch_of(encoder)
    assert called(encoder[0].model, batch).keys() == qs.quantizers(encoder[0].model).keys()
    wanted = loaded(folder)
    wanted[0].model.set_attn_implementation("eager")
    floats = wanted.encode(TEXTS, convert_to_tensor=True)
    assert not torch.equal(encoder.encode(TEXTS, convert_to_tensor=True), floats)
    with qs.quantization_disabled(encoder):
        assert torch.equal(encoder.encode(TEXTS, convert_to_tensor=True), floats)


def test_a_converted_copy_takes_the_place_of_the_model(encoder: SentenceTransformer, folder: Path) -> None:
    other = loaded(folder)
    qmodel = qs.convert(other[0].model)
    qs.calibrate(qmodel, [batch_of(other)])
    assert not qs.quantizers(other)
    other[0].model = qmodel
    assert qs.quantizers(other)
    assert torch.equal(other.encode(TEXTS, convert_to_tensor=True), encoder.encode(TEXTS, convert_to_tensor=True))


def test_the_whole_is_no_model_to_convert(encoder: SentenceTransformer) -> None:
    with pytest.raises(qs.ModelError, match="found a SentenceTransformer, wanted a Hugging Face PreTrainedModel"):
        qs.convert(encoder)  # type: ignore[type-var]
    with pytest.raises(qs.ModelError, match="this SentenceTransformer is not converted"):
        qs.calibrate(encoder, [batch_of(encoder)])


def test_similarities_survive(encoder: SentenceTransformer, folder: Path) -> None:
    found, wanted = encoder.encode(TEXTS, convert_to_tensor=True), loaded(folder).encode(TEXTS, convert_to_tensor=True)
    # A wide bound: that the quantized model is the same model, no more.
    assert torch.cosine_similarity(found, wanted).min() > 0.98
    assert torch.allclose(encoder.similarity(found, found).diagonal(), torch.ones(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(encoder: SentenceTransformer, dtype: torch.dtype) -> None:
    wanted = encoder.encode(TEXTS, convert_to_tensor=True)
    found = encoder.to(dtype).encode(TEXTS, convert_to_tensor=True)
    assert found.dtype == dtype
    # A bfloat16 has 8 bits: far from exact, the same direction.
    assert torch.cosine_similarity(found.float(), wanted).min() > 0.99


def test_a_loss_trains_it(encoder: SentenceTransformer) -> None:
    ranges = {name: each.amax.clone() for name, each in qs.quantizers(encoder).items()}
    loss = CosineSimilarityLoss(encoder.train())
    features = [encoder.preprocess([text]) for text in TEXTS[:2]]
    labels = torch.tensor([1.0])
    optimizer = torch.optim.AdamW(encoder.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        torch.manual_seed(0)
        value = loss([dict(feature) for feature in features], labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(each.amax, ranges[name]) for name, each in qs.quantizers(encoder).items())


def test_a_pool_of_processes(encoder: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.multiprocessing, "get_context", lambda _: forked.CONTEXT
    )  # it would spawn, and import all
    wanted = encoder.encode(TEXTS, batch_size=3)
    pool = encoder.start_multi_process_pool(["cpu"])
    try:
        found = encoder.encode(TEXTS, pool=pool, batch_size=3)
    finally:
        encoder.stop_multi_process_pool(pool)
    assert not [each for each in multiprocessing.active_children() if each in pool["processes"]]
    # Another process may take other kernels, by its number of threads: float32 rounding, and no step of a grid here.
    assert torch.allclose(torch.as_tensor(found), torch.as_tensor(wanted), rtol=0, atol=1e-5)


def test_a_cross_encoder(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(folder, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ranker = CrossEncoder(str(tmp_path), device="cpu")
    pairs = [[TEXTS[0], TEXTS[2]], [TEXTS[1], TEXTS[2]]]
    batch = batch_of(ranker, pairs)
    floats = ranker.predict(pairs, convert_to_tensor=True)
    qs.convert(ranker[0].model, inplace=True)
    qs.calibrate(ranker[0].model, [batch])
    found = ranker.predict(pairs, convert_to_tensor=True)
    with torch.no_grad():
        wanted = ranker[0].model(**batch).logits[:, 0].sigmoid()
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)  # a sigmoid of float32
    assert not torch.equal(found, floats)
