"""Which mask belongs to which argument, by name and by shape; what does not fit is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qdq_surgery.errors import CalibrationError
from qdq_surgery.padding.token_masks import Text, check_decoder, padded, resized, texts_of, trimmed, with_padding

IDS, MASK = torch.arange(8).reshape(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
MORE, LESS = torch.arange(10).reshape(2, 5), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
ALIKE = torch.arange(8, 16).reshape(2, 4)
STATES = torch.arange(32.0).reshape(2, 4, 4)


def pairs(batch: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {text.mask: text.names[1:] for text in texts_of(batch)}


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({}, {}),
        ({"passage_ids": MORE, "passage_mask": LESS}, {"passage_mask": ("passage_ids",)}),
        ({"passage_ids": ALIKE, "passage_mask": MASK}, {"passage_mask": ("passage_ids",)}),
        ({"passage_mask": MASK, "passage_ids": ALIKE}, {"passage_mask": ("passage_ids",)}),
        ({"input_ids_2": ALIKE, "attention_mask_2": MASK}, {"attention_mask_2": ("input_ids_2",)}),
        ({"mask_b": LESS, "text_pair_ids": MORE}, {"mask_b": ("text_pair_ids",)}),
        (
            {"decoder_input_ids": ALIKE, "decoder_attention_mask": MASK},
            {"decoder_attention_mask": ("decoder_input_ids",)},
        ),
        (
            {"encoder_hidden_states": STATES, "encoder_attention_mask": MASK},
            {"encoder_attention_mask": ("encoder_hidden_states",)},
        ),
        # Without masks of their own they go with none.
        ({"encoder_hidden_states": STATES, "passage_ids": ALIKE, "labels": ALIKE}, {}),
        # Masks of other things: heads are no tokens.
        ({"head_mask": torch.zeros(2, 4), "cross_attn_head_mask": torch.zeros(2, 4)}, {}),
        ({"pixel_values": torch.ones(2, 3, 8, 8), "pixel_mask": torch.ones(2, 8, 8)}, {}),
    ],
    ids=[
        "one",
        "two",
        "two-of-one-length",
        "two-the-other-way-round",
        "numbered",
        "by-shape",
        "decoder",
        "memory",
        "no-masks",
        "other-masks",
        "pixels",
    ],
)  # fmt: skip
def test_masks_and_what_they_mask(more: dict[str, Tensor], wanted: dict[str, tuple[str, ...]]) -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK, **more}
    assert pairs(batch) == {"attention_mask": ("input_ids",), **wanted}


def test_what_goes_with_a_text() -> None:
    batch = {
        "input_ids": IDS,
        "token_type_ids": IDS,
        "position_ids": torch.arange(4)[None],
        "bbox": torch.ones(2, 4, 4),
        "attention_mask": MASK,
        "global_attention_mask": MASK,
        "entity_ids": MORE,
        "entity_attention_mask": LESS,
        "entity_position_ids": torch.ones(2, 5, 3),
        "entity_start_positions": MORE,
        "labels": IDS,
    }
    assert pairs(batch) == {
        "attention_mask": ("input_ids", "token_type_ids", "position_ids", "bbox", "global_attention_mask"),
        "entity_attention_mask": ("entity_ids", "entity_position_ids", "entity_start_positions"),
    }


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"attention_mask": MASK.float() * 0.5}, "attention_mask holds something else than 0 and 1"),
        ({"attention_mask": (1.0 - MASK) * -1e4}, "attention_mask holds something else than 0 and 1"),
        ({"attention_mask": torch.ones(2, 4, 4)}, r"attention_mask has the shape \(2, 4, 4\), wanted \(2, 4\)"),
        ({"passage_ids": MORE, "passage_mask": MASK}, r"passage_mask has the shape \(2, 4\), wanted \(2, 5\)"),
        ({"passage_mask": LESS}, r"passage_mask has the shape \(2, 5\) and masks something.*no argument has such"),
        ({"pixel_values": torch.ones(2, 3, 8, 8), "pixel_mask": torch.zeros(2, 8, 8)}, "pixel_mask .* no argument"),
        ({"left_ids": MORE, "right_ids": MORE, "mask_b": LESS}, "mask_b .*left_ids and right_ids have that shape"),
        ({"passage_ids": MORE, "passage_mask": [[1] * 5] * 2}, "passage_mask is a list, wanted a tensor"),
    ],
    ids=["fractions", "added", "3-D", "another-length", "nothing-masked", "pixels", "two-fit", "list"],
)
def test_masks_that_cannot_be_used(batch: dict[str, Any], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        texts_of({"input_ids": IDS, "attention_mask": MASK, **batch})


def test_trimmed_cuts_one_text_and_leaves_another_of_the_same_shape() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    batch = {"input_ids": IDS, "attention_mask": mask, "passage_ids": ALIKE, "passage_mask": MASK, "labels": IDS}
    found = trimmed(batch)
    assert found["input_ids"].tolist() == IDS[:, :3].tolist()
    assert found["labels"].shape == (2, 3)
    assert found["passage_ids"] is ALIKE
    assert found["passage_mask"] is MASK
    assert trimmed(batch, labels=False)["labels"] is IDS  # an encoder-decoder's are its decoder's text


@pytest.mark.parametrize(
    ("batch", "name"),
    [
        ({"decoder_input_ids": torch.tensor([[1, 5, 6], [1, 5, 0]])}, "decoder_input_ids"),
        ({"labels": torch.tensor([[5, 6, 7], [5, -100, -100]])}, "labels"),
        ({"labels": torch.tensor([[5, 6, 7], [5, 0, 0]])}, "labels"),
    ],
)
def test_a_decoder_with_padding_and_no_mask_is_refused(batch: dict[str, Tensor], name: str) -> None:
    config = SimpleNamespace(is_encoder_decoder=True, pad_token_id=0)
    with pytest.raises(CalibrationError, match=rf"{name} ends in padding, and no decoder_attention_mask says so"):
        check_decoder(config, batch)
    check_decoder(SimpleNamespace(is_encoder_decoder=False, pad_token_id=0), batch)
    if name == "decoder_input_ids":
        check_decoder(config, {**batch, "decoder_attention_mask": torch.ones(2, 3)})


@pytest.mark.parametrize(
    "batch",
    [{}, {"decoder_input_ids": torch.zeros(2, 1)}, {"labels": torch.tensor([[5, 6]])}, {"labels": torch.tensor([1])}],
    ids=["none", "start", "whole", "classes"],
)
def test_a_decoder_without_padding_needs_no_mask(batch: dict[str, Tensor]) -> None:
    check_decoder(SimpleNamespace(is_encoder_decoder=True, pad_token_id=0), batch)


def test_another_size_and_other_padding() -> None:
    batch = {"input_ids": IDS, "position_ids": torch.arange(4)[None], "attention_mask": MASK, "start_positions": IDS}
    (text,) = texts_of(batch)
    assert text == Text("attention_mask", "input_ids", ("attention_mask", "input_ids", "position_ids"), (2, 4))
    places = padded(batch, text)
    assert places is not None
    assert torch.equal(places, MASK == 0)
    made = resized(batch, (text,), 3, (5,))
    assert made["input_ids"].tolist() == [[0, 1, 2, 3, 0], [4, 5, 6, 7, 4], [0, 1, 2, 3, 0]]
    assert made["position_ids"].tolist() == [[0, 1, 2, 3, 0]]
    assert made["attention_mask"].tolist() == [[1] * 5] * 3
    assert "start_positions" not in made
    where = torch.arange(5).expand(3, 5) > torch.tensor([[3], [1], [4]])
    one, other = (with_padding(made, batch, text, where, i) for i in (0, 1))
    assert torch.equal(one["attention_mask"] == 0, where)
    assert bool((one["input_ids"] != other["input_ids"])[where].all())
    assert torch.equal(one["input_ids"][~where], other["input_ids"][~where])
    assert torch.equal(one["position_ids"], made["position_ids"])  # one row for all rows is nobody's padding
