"""Examples made from the config, for models that take more than text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import qdq_surgery as qs
from lineage import KIN, build
from qdq_surgery.errors import ModelError
from qdq_surgery.hf.example_inputs import make_examples

BY_TYPE = {kin.model_type: kin for kin in KIN}


def made(model_type: str, head: str, shape: tuple[int, int] = (2, 7)) -> tuple[PreTrainedModel, dict[str, Any]]:
    model = build(BY_TYPE[model_type], head)
    inputs = make_examples(model, shape)
    with torch.no_grad():
        model(**inputs)
    return model, inputs


@pytest.mark.parametrize(
    ("model_type", "head", "name", "shape"),
    [
        ("bros", "BrosModel", "bbox", (2, 7, 8)),
        ("lilt", "LiltModel", "bbox", (2, 7, 4)),
        ("udop", "UdopModel", "bbox", (2, 7, 4)),
        ("clip", "CLIPModel", "pixel_values", (2, 3, 32, 32)),
        ("blip", "BlipForQuestionAnswering", "pixel_values", (2, 3, 32, 32)),
        ("blip", "BlipForQuestionAnswering", "decoder_input_ids", (2, 6)),
        ("lxmert", "LxmertModel", "visual_feats", (2, 3, 2048)),
        ("lxmert", "LxmertModel", "visual_pos", (2, 3, 4)),
        ("canine", "CanineModel", "input_ids", (2, 7)),
        ("t5", "T5Model", "decoder_input_ids", (2, 6)),
    ],
)
def test_what_the_model_cannot_do_without(model_type: str, head: str, name: str, shape: tuple[int, ...]) -> None:
    _, inputs = made(model_type, head)
    assert tuple(inputs[name].shape) == shape


def test_boxes_of_udop_are_fractions_of_a_page_and_those_of_lilt_are_places() -> None:
    fractions: Tensor = made("udop", "UdopModel")[1]["bbox"]
    assert fractions.is_floating_point()
    assert 0 <= float(fractions.min()) < float(fractions.max()) <= 1
    places: Tensor = made("lilt", "LiltModel")[1]["bbox"]
    assert not places.is_floating_point()
    assert int(places.max()) < 100


@pytest.mark.parametrize("head", ["BartForSequenceClassification", "BartForQuestionAnswering"])
def test_heads_that_judge_a_text_get_its_end_and_no_text_of_the_decoder(head: str) -> None:
    model, inputs = made("bart", head)
    assert "decoder_input_ids" not in inputs
    assert (inputs["input_ids"] == model.config.eos_token_id).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize("head", ["LongformerForQuestionAnswering", "LongformerForMultipleChoice"])
def test_longformer_gets_three_separators(head: str) -> None:
    model, inputs = made("longformer", head)
    assert (inputs["input_ids"] == model.config.sep_token_id).sum(-1).unique().tolist() == [3]


def test_splinter_gets_a_question() -> None:
    model, inputs = made("splinter", "SplinterForPreTraining")
    assert (inputs["input_ids"] == model.config.question_token_id).any(1).all()


def test_a_model_of_images_gets_images_alone() -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=16
    )
    model = transformers.ViTModel(config).eval()
    assert {name: tuple(value.shape) for name, value in make_examples(model, (2, 7)).items()} == {
        "pixel_values": (2, 3, 32, 32)
    }
    assert qs.plan(model).coverage["linear"].quantized == 12


def test_images_whose_size_no_config_says() -> None:
    config = transformers.Siglip2VisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.Siglip2VisionModel(config).eval()
    with pytest.raises(
        ModelError, match=r"Siglip2VisionModel takes 'pixel_values', for which its config gives no size"
    ):
        make_examples(model, (2, 7))


_BART = {f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")}


def test_a_config_that_no_example_can_be_made_from_is_refused_in_words() -> None:
    odd = transformers.BartConfig(vocab_size=60, d_model=8, eos_token_id=[2, 3], **_BART)
    model = transformers.BartForSequenceClassification(odd)
    for call in (qs.plan, qs.convert):
        with pytest.raises(ModelError, match=r"no example can be made from the config of Bart.*pass example_inputs="):
            call(model)


def test_a_judge_with_room_for_one_token_has_it_end_the_text() -> None:
    small = transformers.BartConfig(vocab_size=60, d_model=8, max_position_embeddings=1, **_BART)
    inputs = make_examples(transformers.BartForSequenceClassification(small), (2, 7))
    assert inputs["input_ids"].tolist() == [[small.eos_token_id]] * 2
