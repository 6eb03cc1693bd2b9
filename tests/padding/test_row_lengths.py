"""Rows of several batches in one: each keeps what belongs to it, whatever the widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qdq_surgery.padding.row_lengths import joined, row_batch


def batch_of(lengths: list[int], width: int, seed: int = 0, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 100, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, **more}


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_each_row_keeps_its_tokens(batches: list[list[int]], more: int, random: Any) -> None:
    made = [batch_of(lengths, 6 + seed, seed) for seed, lengths in enumerate(batches)]
    for each in made:
        each["token_type_ids"], each["labels"] = each["input_ids"] + 1000, each["input_ids"][:, 0]
    found = [row_batch(each) for each in made]
    rows = [(each, row) for each in found if each is not None for row in range(len(each.lengths))]
    assert [each.lengths[row] for each, row in rows] == [length for lengths in batches for length in lengths]
    random.shuffle(rows)
    width = max(1, *(batch.lengths[row] for batch, row in rows)) + more
    whole = joined(rows, width)
    assert whole["input_ids"].shape == whole["attention_mask"].shape == (len(rows), width)
    for at, (batch, row) in enumerate(rows):
        length = batch.lengths[row]
        for name in ("input_ids", "token_type_ids"):
            assert torch.equal(whole[name][at, :length], batch.inputs[name][row, :length])
        assert torch.equal(whole["labels"][at], batch.inputs["labels"][row])
        assert int(whole["attention_mask"][at].sum()) == length
    assert int(whole["input_ids"].max()) < 100  # what fills is an id, too


def test_labels_of_tokens_and_choices_go_with_them() -> None:
    tokens = row_batch({**batch_of([2, 4], 4), "labels": torch.arange(8).reshape(2, 4)})
    assert tokens is not None
    assert joined([(tokens, 0)], 2)["labels"].tolist() == [[0, 1]]
    mask = torch.tensor([[[1, 0, 0], [1, 1, 0]], [[1, 0, 0], [1, 0, 0]]])
    choices = row_batch({"input_ids": torch.arange(12).reshape(2, 2, 3), "attention_mask": mask})
    assert choices is not None
    assert (choices.lengths, choices.axis, choices.size, choices.text.choices) == ((2, 1), 2, 12, 2)
    assert joined([(choices, 1)], 1)["input_ids"].tolist() == [[[6], [9]]]


def test_what_is_no_tensor_is_the_same_for_all() -> None:
    one = row_batch({**batch_of([2], 4), "output_attentions": True, "labels": None})
    other = row_batch({**batch_of([2], 5), "output_attentions": False, "labels": None})
    assert one is not None
    assert other is not None
    assert one.form != other.form
    assert joined([(one, 0)], 2)["output_attentions"] is True


@pytest.mark.parametrize(
    "more",
    [
        {"position_ids": torch.arange(4)[None]},
        {"scale": torch.tensor(1.0)},
        {"attention_mask": None},
        {"attention_mask": torch.full((2, 4), 0.5)},
        {"passage_ids": torch.ones(2, 3), "passage_mask": torch.ones(2, 3)},
        {"input_ids": torch.ones(0, 4), "attention_mask": torch.ones(0, 4)},
    ],
    ids=["positions of all", "a number", "no mask", "no mask of tokens", "two texts", "no row"],
)
def test_rows_that_cannot_be_told_apart(more: dict[str, Any]) -> None:
    assert row_batch({**batch_of([2, 4], 4), **more}) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("input_ids", torch.ones(2, 4, dtype=torch.int32)), ("inputs_embeds", torch.ones(2, 4, 8))],
)
def test_other_kinds_of_tensors_are_another_form(name: str, value: Tensor) -> None:
    one, other = row_batch(batch_of([2, 4], 4)), row_batch({**batch_of([2, 4], 4), name: value})
    assert one is not None
    assert other is not None
    assert one.form != other.form
