"""Rows of any length: each gives what it gives alone, in order, whatever they are batched with."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from tiny_checkpoint import save_tiny_bert
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.serve import rows as module

WORDS = "the cat sat on a mat and saw two dogs run".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("tiny"), [" ".join(WORDS)])


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def reader(folder: Path) -> PreTrainedModel:
    found: PreTrainedModel = AutoModel.from_pretrained(folder)
    return found


def texts(count: int = 40) -> list[str]:
    drawn = random.Random(0)
    return [" ".join(drawn.choices(WORDS, k=drawn.randint(1, 30))) for _ in range(count)]


def ids(count: int = 40, longest: int = 30) -> list[dict[str, list[int]]]:
    drawn = random.Random(0)
    return [{"input_ids": drawn.choices(range(5, 60), k=drawn.randint(1, longest))} for _ in range(count)]


def model(head: str = "BertModel", **options: Any) -> PreTrainedModel:
    return build("bert", head, num_hidden_layers=1, **options).eval()


@torch.no_grad()
def alone(runs: Any, row: Mapping[str, list[int]]) -> Any:
    given = {name: torch.tensor([values]) for name, values in row.items()}
    given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    return runs(**given)


#: Float32 products of another number of rows may round differently.
NEAR = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("tokens", [1, 40, 4096])
def test_each_row_gives_what_it_gives_alone(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WINDOW", 16)
    runs, given = model(), ids()
    found = list(qs.run_rows(runs, given, tokens=tokens))
    assert len(found) == len(given)
    for row, each in zip(given, found, strict=True):
        wanted = alone(runs, row)
        assert each.keys() == {"last_hidden_state", "pooler_output"}
        assert each["last_hidden_state"].shape == (len(row["input_ids"]), 32)
        torch.testing.assert_close(each["last_hidden_state"], wanted.last_hidden_state[0], **NEAR)
        torch.testing.assert_close(each["pooler_output"], wanted.pooler_output[0], **NEAR)


@pytest.mark.parametrize(
    ("head", "by_token"),
    [
        ("BertForSequenceClassification", {"logits": False}),
        ("BertForTokenClassification", {"logits": True}),
        ("BertForQuestionAnswering", {"start_logits": True, "end_logits": True}),
    ],
)
def test_outputs_of_tokens_are_those_of_the_rows_own(head: str, by_token: dict[str, bool]) -> None:
    # As many labels as the widest batch has tokens.
    runs, given = model(head, **({} if "Question" in head else {"num_labels": 32})), ids()
    for row, each in zip(given, qs.run_rows(runs, given), strict=True):
        assert each.keys() == by_token.keys()
        for name, value in alone(runs, row).items():
            assert len(each[name]) == (len(row["input_ids"]) if by_token[name] else 32)
            torch.testing.assert_close(each[name], value[0], **NEAR)


def test_texts_and_pairs_are_read_as_the_tokenizer_reads_them(tokenizer: Any, reader: PreTrainedModel) -> None:
    runs = reader
    given: list[Any] = [(each, "a dog") if at % 3 == 0 else each for at, each in enumerate(texts())]
    for row, each in zip(given, qs.run_rows(runs, given, tokenizer, keep="first"), strict=True):
        encoded = tokenizer(*row) if isinstance(row, tuple) else tokenizer(row)
        torch.testing.assert_close(each, alone(runs, dict(encoded)).last_hidden_state[0, 0], **NEAR)


def test_texts_are_cut_and_rows_of_ids_are_not(tokenizer: Any, reader: PreTrainedModel) -> None:
    runs = reader
    long = " ".join(WORDS * 40)
    (found,) = qs.run_rows(runs, [long], tokenizer)
    assert len(found["last_hidden_state"]) == runs.config.max_position_embeddings
    (found,) = qs.run_rows(runs, [long], tokenizer, length=7)
    assert len(found["last_hidden_state"]) == 7
    (found,) = qs.run_rows(runs, [{"input_ids": [5] * 20}], tokenizer, length=7)
    assert len(found["last_hidden_state"]) == 20


def test_means_and_functions() -> None:
    runs, given = model(), ids()
    means = list(qs.run_rows(runs, given, keep="mean"))
    own = list(qs.run_rows(runs, given, keep=lambda _, batch: [int(each) for each in batch["attention_mask"].sum(1)]))
    for row, mean, count in zip(given, means, own, strict=True):
        torch.testing.assert_close(mean, alone(runs, row).last_hidden_state[0].mean(0), **NEAR)
        assert count == len(row["input_ids"])


def test_a_batch_has_so_many_tokens_and_few_widths() -> None:
    shapes: list[tuple[int, ...]] = []

    def note(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        shapes.append(tuple(batch["input_ids"].shape))
        return outputs.pooler_output  # type: ignore[no-any-return]

    given = ids(200)
    list(qs.run_rows(model(), given, keep=note, tokens=200))
    assert all(count * width <= 200 and width % 8 == 0 for count, width in shapes)
    assert [width for _, width in shapes] == sorted((width for _, width in shapes), reverse=True)
    padded, own = sum(count * width for count, width in shapes), sum(len(row["input_ids"]) for row in given)
    assert padded < own + 8 * len(given)


def test_rows_are_read_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WINDOW", 4)
    read: list[int] = []

    def endless() -> Iterator[dict[str, list[int]]]:
        for number in range(10**9):
            read.append(number)
            yield {"input_ids": [5] * (1 + number % 7)}

    found = qs.run_rows(model(), endless(), keep="first")
    for _ in range(6):
        next(found)
    assert len(read) == 8


def test_a_pair_beside_a_text_keeps_its_types(tokenizer: Any, reader: PreTrainedModel) -> None:
    pair = ("the cat", "sat on a mat")
    found, *_ = qs.run_rows(reader, [pair, {"input_ids": [5] * 20, "label": 3}], tokenizer, keep="first")
    torch.testing.assert_close(found, alone(reader, dict(tokenizer(*pair))).last_hidden_state[0, 0], **NEAR)


def test_a_compiled_model_takes_what_its_own_takes(tokenizer: Any, reader: PreTrainedModel) -> None:
    compiled: Any = torch.compile(reader, backend="eager")
    (found,) = qs.run_rows(compiled, [("the cat", "sat")], tokenizer, keep="first")
    wanted = alone(reader, dict(tokenizer("the cat", "sat"))).last_hidden_state[0, 0]
    torch.testing.assert_close(found, wanted, **NEAR)


def test_scores_of_tokens_are_those_of_the_rows_own() -> None:
    runs, given = build("electra", "ElectraForPreTraining").eval(), ids(9)
    for row, each in zip(given, qs.run_rows(runs, given), strict=True):
        torch.testing.assert_close(each["logits"], alone(runs, row).logits[0], **NEAR)


def test_a_tokenizer_and_a_model_without_a_limit(
    tokenizer: Any, reader: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = int(1e30)
    monkeypatch.setattr(module, "max_tokens", lambda _: None)
    (found,) = qs.run_rows(reader, ["the cat"], tokenizer)
    assert len(found["last_hidden_state"]) == len(tokenizer("the cat")["input_ids"])


def test_what_has_nothing_for_each_row_is_refused() -> None:
    with pytest.raises(qs.OptionError, match="has no last_hidden_state"):
        list(qs.run_rows(model("BertForSequenceClassification"), ids(2), keep="mean"))
    with pytest.raises(qs.OptionError, match="has no tensor with an entry for each row"):
        list(qs.run_rows(model("BertForMultipleChoice"), [{"input_ids": [5] * 8}] * 8))


def test_no_rows_give_nothing() -> None:
    assert list(qs.run_rows(model(), [])) == []


def test_a_model_without_a_mask_gets_rows_of_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, shapes = model(), []
    monkeypatch.setattr(module, "_arguments", lambda _: ["input_ids"])

    def note(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        shapes.append(batch["input_ids"].shape)
        return outputs.last_hidden_state[:, 0]  # type: ignore[no-any-return]

    given = ids(60, 5)
    for row, each in zip(given, qs.run_rows(runs, given, keep=note), strict=True):
        torch.testing.assert_close(each, alone(runs, row).last_hidden_state[0, 0], **NEAR)
    assert len(shapes) == len({len(row["input_ids"]) for row in given})


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("streams", [1, 3])
def test_files_in_streams(runtime: str, streams: int) -> None:
    pytest.importorskip(runtime)
    from exported import exported

    served = qs.load_onnx(exported("bert", target=runtime)[1].path, runtime, threads=1)
    given = ids(50, 12)
    found = list(qs.run_rows(served, given, tokens=64, streams=streams, keep="mean"))
    for row, each in zip(given, found, strict=True):
        # A position of the row may fall on the other side of a tie beside other rows.
        torch.testing.assert_close(each, alone(served, row).last_hidden_state[0].mean(0), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([3], {}, "row 0 is a int; give a text, a pair of texts, or token ids by name"),
        ([{"input_ids": [1]}, ("a", "b", "c")], {}, "row 1 is a tuple"),
        ([{"input_ids": [1]}, "text"], {}, "row 1 is a text, and there is no tokenizer"),
        ([{"input_ids": []}], {}, "row 0 has no list of whole numbers in 'input_ids'"),
        ([{"attention_mask": [1]}], {}, "row 0 has no list of whole numbers in 'input_ids'"),
        ([{"input_ids": torch.ones(1, 3)}], {}, "row 0 has no list of whole numbers in 'input_ids'"),
        ([{"input_ids": None}], {}, "row 0 has no list of whole numbers in 'input_ids'"),
        ([{"input_ids": [1], "position_ids": [2]}, {"input_ids": [1]}], {}, "some rows have 'position_ids' and some"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], {}, "row 0 has 1 numbers in 'attention_mask' and 2"),
        ([], {"keep": "median"}, "keep='median' is none of outputs, mean, first"),
        ([{"input_ids": [1]}], {"keep": lambda *_: []}, "keep gave 0 entries for 1 rows"),
        ([], {"tokens": 0}, "tokens=0"),
        ([], {"streams": 0}, "streams=0"),
        ([], {"length": 2}, "length=2"),
        ([], {"streams": 2}, "streams=2 is for a file; a BertModel in PyTorch runs one batch at once"),
    ],
)
def test_mistakes_are_said(rows: list[Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(qs.OptionError, match=words):
        list(qs.run_rows(model(), rows, **options))


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(qs.OptionError, match="this BertModel is in training mode"):
        qs.run_rows(model().train(), [])


@pytest.mark.parametrize(
    ("row", "said"), [([-1, 2], r"1 rows of 2 to 2 tokens, the ids -1 to 2"), ([1] * 41, r"1 rows of 41 to 41 tokens")]
)
def test_rows_that_a_model_cannot_run(row: list[int], said: str) -> None:
    with pytest.raises(qs.ModelError, match=rf"^BertModel cannot run {said}.*another model's ids$"):
        list(qs.run_rows(model(), [{"input_ids": row}]))
