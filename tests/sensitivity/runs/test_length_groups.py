"""Rows that run with others of their length: less padding, the same figures, and only where that is so."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from architectures import build
from padded_models import TINY
from torch import Tensor
from transformers import BertConfig, BertModel, ConvBertConfig, ConvBertModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import qdq_surgery as qs
from qdq_surgery.errors import CalibrationError
from qdq_surgery.sensitivity.runs.length_groups import Group, length_groups

MODULE = sys.modules["qdq_surgery.sensitivity.runs.length_groups"]

#: Tokens of the widest batch.
WIDE = 40


def lengths_of(rows: int, seed: int) -> list[int]:
    return [*torch.randint(3, 16, (rows - 1,), generator=torch.Generator().manual_seed(seed)).tolist(), WIDE - seed]


def batches_of(count: int = 3, rows: int = 16, **more: Any) -> list[dict[str, Tensor]]:
    """Each as wide as its last row, and most rows are short."""
    made = []
    for seed in range(count):
        lengths = torch.tensor(lengths_of(rows, seed))
        ids = torch.randint(3, 60, (rows, WIDE - seed), generator=torch.Generator().manual_seed(seed))
        made.append({"input_ids": ids, "attention_mask": (torch.arange(WIDE - seed) < lengths[:, None]).long(), **more})
    return made


def grouped(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> list[Group]:
    model.eval()

    def run(inputs: Mapping[str, Any]) -> Any:
        with torch.no_grad():
            return model(**inputs)

    return list(length_groups(model, batches, run))


def tokens(groups: list[Group]) -> int:
    return sum(each.inputs["input_ids"].numel() for each in groups)


def test_every_row_comes_once_with_less_padding() -> None:
    batches = batches_of()
    found = grouped(build("bert", "BertModel"), batches)
    assert tokens(found) < 0.6 * sum(each["input_ids"].numel() for each in batches)
    assert {each.name for each in found} == {"batches 0 to 2, rows sorted by length"}
    assert sum(each.batches for each in found) == pytest.approx(3)

    def rows(inputs: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
        pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        return [tuple(ids[mask != 0].tolist()) for ids, mask in pairs]

    assert sorted(row for each in found for row in rows(each.inputs)) == sorted(
        row for each in batches for row in rows(each)
    )


class Rows(BertModel):
    """Whose outputs depend on how many rows there are."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = super().forward(*args, **kwargs).last_hidden_state
        return BaseModelOutput(last_hidden_state=states * states.shape[0])


@pytest.mark.parametrize(
    "model",
    [
        ConvBertModel(ConvBertConfig(**TINY, embedding_size=32)),
        Rows(BertConfig(**TINY)),
    ],
    ids=["padding enters tokens", "rows enter rows"],
)
def test_a_model_in_which_it_changes_something_keeps_its_batches(model: PreTrainedModel) -> None:
    batches = batches_of()
    found = grouped(model, batches)
    assert [each.name for each in found] == ["batch 0", "batch 1", "batch 2"]
    assert all(
        torch.equal(each.inputs["input_ids"], own["input_ids"]) for each, own in zip(found, batches, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_change(dtype: torch.dtype) -> None:
    assert len(grouped(build("bert", "BertModel").to(dtype), batches_of())) < 3 * 16


@pytest.mark.parametrize(
    "batches",
    [
        [{"input_ids": each["input_ids"]} for each in batches_of()],
        [{name: value[:2, :9] for name, value in each.items()} for each in batches_of()],
        [{**batches_of()[0], "output_attentions": True}, batches_of()[1]],
    ],
    ids=["no padding", "little to save", "called in two ways"],
)
def test_batches_stay_where_there_is_nothing_to_gain(batches: list[dict[str, Tensor]]) -> None:
    assert [each.name for each in grouped(build("bert", "BertModel"), batches)] == [
        f"batch {index}" for index in range(len(batches))
    ]


@pytest.mark.parametrize("head", ["BertModel", "BertForTokenClassification", "BertForSequenceClassification"])
def test_the_figures_are_those_of_the_batches(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel = qs.convert(build("bert", head, num_hidden_layers=1))
    batches = batches_of()
    qs.calibrate(qmodel, batches)
    found = qs.sensitivity(qmodel, batches, sites=False)
    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "_LEAST", 10**9)
        wanted = qs.sensitivity(qmodel, batches, sites=False)
    counts = (found.batches, found.rows, found.tokens)
    assert counts == (wanted.batches, wanted.rows, wanted.tokens) == (3, 48, int(sum(map(real, batches))))
    ours, theirs = ({(each.what, each.name): each for each in result.costs} for result in (found, wanted))
    assert found.int8 == pytest.approx(wanted.int8, rel=0.02)
    for part, cost in theirs.items():
        # Sums in another order: a value that lies half-way between two integers goes to the other one.
        assert ours[part].alone == pytest.approx(cost.alone, rel=0.05), part
        assert ours[part].outliers == cost.outliers, part


def real(batch: Mapping[str, Tensor]) -> int:
    return int(batch["attention_mask"].sum())


def test_what_is_large_is_not_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = build("bert", "BertModel").eval(), []

    def batches() -> Iterator[dict[str, Tensor]]:
        for index, each in enumerate(batches_of(rows=64)):
            read.append(index)
            yield each

    monkeypatch.setattr(MODULE, "_BYTES", 1)
    groups = length_groups(model, batches(), lambda inputs: model(**inputs))
    assert next(groups).name == "batch 0, rows sorted by length"
    assert read == [0]
    assert {each.name.partition(",")[0] for each in groups} == {"batch 0", "batch 1", "batch 2"}


@pytest.mark.parametrize("metric", ["mse", "kl"])
def test_scores_of_tokens_have_the_same_figures(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel = qs.convert(build("bert", "BertForQuestionAnswering"))
    batches = batches_of()
    qs.calibrate(qmodel, batches)
    found = qs.sensitivity(qmodel, batches, metric, sites=False, kinds=False)
    monkeypatch.setattr(MODULE, "_LEAST", 10**9)
    wanted = qs.sensitivity(qmodel, batches, metric, sites=False, kinds=False)
    assert found.to_json() != wanted.to_json()
    assert found.int8 == pytest.approx(wanted.int8, rel=0.02)


def test_a_metric_of_the_user_s_sees_the_user_s_batches() -> None:
    qmodel = qs.convert(build("bert", "BertModel"))
    batches = batches_of()
    qs.calibrate(qmodel, batches)
    seen = set()

    def metric(_: Any, batch: Mapping[str, Tensor]) -> float:
        seen.add(tuple(batch["input_ids"].shape))
        return 1.0

    qs.sensitivity(qmodel, batches, metric, sites=False, kinds=False)
    qs.tune(build("bert", "BertModel", num_hidden_layers=1), batches[:1], "linear-only", metric=metric)
    assert seen == {tuple(each["input_ids"].shape) for each in batches}


def test_what_is_wrong_names_the_batches() -> None:
    qmodel = qs.convert(build("bert", "BertModel"))
    qs.calibrate(qmodel, batches_of())
    wrong = batches_of()
    wrong[2]["input_ids"][2, 1] = 10**6
    with pytest.raises(CalibrationError, match="batches 0 to 2, rows sorted by length: BertModel cannot run it: index"):
        qs.sensitivity(qmodel, wrong, sites=False, kinds=False)
