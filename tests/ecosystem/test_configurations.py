"""Configurations as they are released: attentions asked for in the config, fused weights, configs that were used."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import BASE, batch_for, build
from transformers import PreTrainedModel

import qdq_surgery as qs


def calibrated(model: PreTrainedModel, rules: str = "qdqbert") -> PreTrainedModel:
    qmodel = qs.convert(model, rules)
    qs.calibrate(qmodel, [batch_for(model, (3, 8))])
    return qmodel


def attentions(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        found = model(**batch).attentions
    assert found
    return tuple(found)


def assert_equal(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mobilebert", "mpnet", "deberta-v2", "modernbert"])
def test_attentions_in_the_config_are_the_float_models(model_type: str) -> None:
    model = build(model_type, BASE[model_type])
    model.config.output_attentions = True
    qs.plan(model)
    qmodel = qs.convert(model)
    assert qmodel.config.output_attentions
    batch = batch_for(model, (3, 7))
    with qs.quantization_disabled(qmodel):
        assert_equal(attentions(qmodel, batch), attentions(model, batch))


@pytest.mark.parametrize("rules", ["qdqbert", "linear-only"])
@pytest.mark.parametrize("model_type", ["albert", "deberta-v2"])
def test_attentions_in_the_config_are_saved_and_loaded(model_type: str, rules: str, tmp_path: Path) -> None:
    model = build(model_type, BASE[model_type])
    model.config.output_attentions = True
    model.save_pretrained(tmp_path / "float")
    qmodel = calibrated(model, rules)
    batch = batch_for(model, (3, 7))
    before = copy.deepcopy(qmodel.config.__dict__)
    wanted = attentions(qmodel, batch)
    for folder in ("first", "second"):
        qmodel.save_pretrained(tmp_path / folder)
        assert type(qmodel.config._attn_implementation_internal) is str
        assert qmodel.config._attn_implementation == before["_attn_implementation_internal"]
        assert json.loads((tmp_path / folder / "config.json").read_text())["output_attentions"] is True
        qmodel = type(model).from_pretrained(tmp_path / folder).eval()
        assert qmodel.config.output_attentions
        assert_equal(attentions(qmodel, batch), wanted)
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=qs.QDQConfig(rules))
    assert len(qs.quantizers(loaded)) == len(qs.quantizers(qmodel))


@pytest.mark.parametrize("rules", ["qdqbert", "linear-only"])
def test_an_albert_loaded_and_called_as_rxnmapper_does_gives_its_attentions(rules: str, tmp_path: Path) -> None:
    trained = build("albert", "AlbertForMaskedLM")
    trained.config.output_past = True  # its released config is of 2020
    trained.save_pretrained(tmp_path)
    asked = {"output_attentions": True, "output_past": False, "output_hidden_states": False}
    model = transformers.AlbertModel.from_pretrained(tmp_path, **asked)
    qmodel = calibrated(model, rules)
    batch = batch_for(model, (3, 7))
    with torch.no_grad(), qs.quantization_disabled(qmodel):
        assert_equal(qmodel(**batch)[2], model(**batch)[2])
    with torch.no_grad():
        assert not torch.equal(qmodel(**batch)[2][-1], model(**batch)[2][-1])


@pytest.mark.parametrize("rules", ["qdqbert", "linear-only"])
def test_attentions_may_be_asked_for_when_loading(rules: str, tmp_path: Path) -> None:
    qmodel = calibrated(build("bert", "BertModel"), rules)
    batch = batch_for(qmodel, (3, 7))
    wanted = attentions(qmodel, {**batch, "output_attentions": True})
    qmodel.save_pretrained(tmp_path / "plain")
    loaded = type(qmodel).from_pretrained(tmp_path / "plain", output_attentions=True).eval()
    assert_equal(attentions(loaded, batch), wanted)
    loaded.save_pretrained(tmp_path / "asked")
    assert_equal(attentions(type(qmodel).from_pretrained(tmp_path / "asked").eval(), batch), wanted)


@pytest.mark.parametrize("model_type", ["nomic_bert", "gte", "jina_embeddings_v3"])
def test_models_whose_projections_are_stored_as_one_are_saved(model_type: str, tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    qmodel = calibrated(model)
    batch = batch_for(model, (2, 6))
    with torch.no_grad():
        wanted = qmodel(**batch).last_hidden_state
    for folder in ("first", "second"):
        qmodel.save_pretrained(tmp_path / folder)
        loaded = transformers.AutoModel.from_pretrained(tmp_path / folder).eval()
        for name, quantizer in qs.quantizers(qmodel).items():
            assert torch.equal(qs.quantizers(loaded)[name].amax, quantizer.amax), name
        with torch.no_grad():
            assert torch.equal(loaded(**batch).last_hidden_state, wanted)
        qmodel = loaded


def test_plan_raises_what_convert_raises() -> None:
    model = build("bert", "BertModel")
    layer = model.encoder.layer[1]

    class Output(type(layer.output)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
            if self.training and bool(hidden_states.sum() > 0):
                hidden_states = hidden_states * 1
            return super().forward(hidden_states, input_tensor)

    layer.output.__class__ = Output
    errors = []
    for action in (qs.plan, qs.convert):
        with pytest.raises(qs.TraceError, match=r"encoder\.layer\.1\.output, in training mode: .*__bool__") as caught:
            action(model)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert not qs.quantizers(model)


@pytest.mark.parametrize(("model_type", "chunk"), [("bert", 3), ("distilbert", 1), ("albert", 3)])
def test_a_feed_forward_in_chunks_is_converted(model_type: str, chunk: int) -> None:
    model = build(model_type, BASE[model_type], chunk_size_feed_forward=chunk)
    qmodel = qs.convert(model)
    assert qs.quantizers(qmodel).keys() == qs.quantizers(qs.convert(build(model_type, BASE[model_type]))).keys()
    for training in (False, True):
        model.train(training)
        qmodel.train(training)
        for shape in ((2, 12), (1, 18)):
            batch = batch_for(model, shape)
            with qs.quantization_disabled(qmodel):
                torch.manual_seed(1)
                wanted = model(**batch).last_hidden_state
                torch.manual_seed(1)
                assert torch.equal(qmodel(**batch).last_hidden_state, wanted)


QDQBERT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


@pytest.mark.parametrize("head", ["QDQBertModel", "QDQBertForSequenceClassification"])
def test_a_config_that_was_used_once_may_be_used_to_load(head: str, tmp_path: Path) -> None:
    kind = getattr(qs, head)
    config = qs.QDQBertConfig(**QDQBERT)
    before = copy.deepcopy(config.__dict__)
    made = kind(config)
    assert config.__dict__ == before
    made.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path, config=config)
    assert qs.quantizers(loaded).keys() == qs.quantizers(made).keys()


@pytest.mark.parametrize("head", ["QDQBertModel", "QDQBertForSequenceClassification"])
def test_qdqbert_is_built_without_data(head: str) -> None:
    kind = getattr(qs, head)
    made = kind(qs.QDQBertConfig(**QDQBERT)).eval()
    with torch.device("meta"):
        empty = kind(qs.QDQBertConfig(**QDQBERT)).eval()
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert qs.quantizers(empty).keys() == qs.quantizers(made).keys()
    empty.to_empty(device="cpu")
    empty.load_state_dict(made.state_dict())
    for (name, buffer), (_, other) in zip(made.named_buffers(), empty.named_buffers(), strict=True):
        if name.rpartition(".")[2] in ("position_ids", "token_type_ids"):  # in no state dict
            other.copy_(buffer)
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(empty(input_ids=ids)[0], made(input_ids=ids)[0])
