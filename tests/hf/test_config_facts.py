"""How many tokens a model takes, held against the position embeddings of transformers itself."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qdq_surgery.hf.config_facts import attention_of, chunk_size, configs_of, decodes, max_tokens, set_attention
from qdq_surgery.hf.example_inputs import SHAPES, make_examples

#: Small values; a config takes those that it knows.
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 60,
    "type_vocab_size": 2,
    "max_position_embeddings": 20,
    "pad_token_id": 3,
}

#: Type, and what is unusual. Every one is asked how many tokens it really takes.
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("albert", {}),
    ("bert", {}),
    ("big_bird", {"attention_type": "original_full"}),
    ("camembert", {}),
    ("canine", {}),
    ("convbert", {}),
    ("data2vec-text", {}),
    ("deberta", {}),
    ("deberta", {"position_biased_input": False, "relative_attention": True}),
    ("deberta-v2", {}),
    ("deberta-v2", {"position_biased_input": False, "relative_attention": True}),
    ("distilbert", {}),
    ("electra", {}),
    ("ernie", {}),
    ("esm", {}),
    ("esm", {"position_embedding_type": "rotary"}),
    ("fnet", {}),
    ("ibert", {}),
    ("layoutlm", {}),
    ("layoutlmv3", {"type_vocab_size": 1, "coordinate_size": 6, "shape_size": 4, "visual_embed": False}),
    ("lilt", {"hidden_size": 48, "channel_shrink_ratio": 2}),
    ("longformer", {}),
    ("luke", {}),
    ("markuplm", {}),
    ("megatron-bert", {}),
    ("mobilebert", {}),
    ("modernbert", {}),
    ("mpnet", {}),
    ("mpnet", {"pad_token_id": 1}),
    ("nomic_bert", {}),
    ("nystromformer", {}),
    ("rembert", {}),
    ("roberta", {}),
    ("roberta", {"pad_token_id": 5, "max_position_embeddings": 10}),
    ("roberta-prelayernorm", {}),
    ("roformer", {}),
    ("tapas", {}),
    ("tapas", {"reset_position_index_per_cell": False}),
    ("visual_bert", {}),
    ("xlm", {"pad_index": 3}),
    ("xlm-roberta", {}),
    ("xlm-roberta-xl", {}),
    ("xmod", {"languages": ["en_XX"], "default_language": "en_XX"}),
]


def model_of(kind: str, unusual: dict[str, Any]) -> PreTrainedModel:
    base = CONFIG_MAPPING[kind]()
    known = {name: value for name, value in (SMALL | unusual).items() if hasattr(base, name)}
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModel.from_config(CONFIG_MAPPING[kind](**known)).eval()
    return made


def takes(model: PreTrainedModel, tokens: int) -> bool:
    ids = torch.full((1, tokens), 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "bbox" in inspect.signature(model.forward).parameters:
        inputs["bbox"] = torch.ones(1, tokens, 4, dtype=torch.long)
    try:
        with torch.no_grad():
            model(**inputs)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


@pytest.mark.parametrize(("kind", "unusual"), MODELS, ids=[f"{kind}{[*unusual] or ''}" for kind, unusual in MODELS])
def test_it_is_what_the_model_takes(kind: str, unusual: dict[str, Any]) -> None:
    model = model_of(kind, unusual)
    longest = max_tokens(model.config)
    assert takes(model, longest or 64)
    assert longest is None or not takes(model, longest + 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_examples_of_a_roberta_with_ten_positions_behind_padding_five_have_four_tokens(shape: tuple[int, int]) -> None:
    model = model_of("roberta", {"pad_token_id": 5, "max_position_embeddings": 10})
    inputs = make_examples(model, shape)
    assert inputs["input_ids"].shape == (shape[0], 4)
    model(**inputs)


def test_the_part_about_texts_counts() -> None:
    text = SimpleNamespace(model_type="bert", max_position_embeddings=12)
    assert max_tokens(SimpleNamespace(max_position_embeddings=99, get_text_config=lambda: text)) == 12


def test_a_config_without_positions_takes_any_number() -> None:
    assert max_tokens(SimpleNamespace(model_type="t5")) is None


def test_chunks_of_several_parts_divide_a_length_that_both_take() -> None:
    parts = [SimpleNamespace(chunk_size_feed_forward=size) for size in (4, 0, 6, None)]
    assert chunk_size(*parts) == 12
    assert chunk_size(SimpleNamespace()) == chunk_size() == 1


def test_configs_are_listed_once() -> None:
    model = model_of("bert", {})
    assert configs_of(model) == [model.config]


@pytest.mark.parametrize("name", ["is_decoder", "is_encoder_decoder"])
def test_one_part_that_decodes_is_enough(name: str) -> None:
    assert decodes(SimpleNamespace(), SimpleNamespace(**{name: True}))
    assert not decodes(SimpleNamespace(), SimpleNamespace(**{name: False}))


def test_a_config_without_attention_stays_without() -> None:
    config = SimpleNamespace()
    set_attention(config, "eager")
    assert attention_of(config) is None
    assert vars(config) == {}
