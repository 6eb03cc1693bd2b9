"""Rows of data by the format of their file: which texts they give, and where a row that cannot be used is named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from qdq_surgery.errors import CalibrationError, ModelError
from qdq_surgery.texts.samples import Sample, read_samples

IDS = '{"input_ids": [2, 7, 3, 0], "attention_mask": [1, 1, 1, 0], "token_type_ids": [0, 0, 0, 0]}'


def written(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "content", "columns", "wanted"),
    [
        ("a.txt", "\none\n\n two, 2\n", [], [("one",), ("two, 2",)]),
        ("a", "one\n", [], [("one",)]),
        ("a.smi", "CCO.CC>>CO\n", [], [("CCO.CC>>CO",)]),
        ("a.txt", "a, b\nc, d\ne, f\n", [], [("a, b",), ("c, d",), ("e, f",)]),
        ("a.txt", "[CLS] is a token\n{x} is a set\n", [], [("[CLS] is a token",), ("{x} is a set",)]),
        ("a.csv", 'id,text\n1,"a, ""b""\nc"\n\n2, d\n', [], [('a, "b"\nc',), ("d",)]),
        ("a.csv", "id,sentence\r\n1,a\r\n2,\r\n", [], [("a",)]),
        ("a.CSV", "q,p\n1,a\n2,b\n", ["p"], [("a",), ("b",)]),
        ("a.csv", "q,p\nx,a\ny,b\n", ["p", "q"], [("a", "x"), ("b", "y")]),
        ("a.tsv", 'text\tn\n"a\t1\nb"\t2\n', [], [('"a',), ('b"',)]),
        ("a.jsonl", '{"text": "a", "n": 1}\n\n{"text": " "}\n{"text": "b"}\n', [], [("a",), ("b",)]),
        ("a.ndjson", '{"sentence": "a"}\n', [], [("a",)]),
        ("a.jsonl", '{"s": "a", "t": "b", "input_ids": [1]}\n', ["s", "t"], [("a", "b")]),
    ],
)
def test_texts(tmp_path: Path, name: str, content: str, columns: list[str], wanted: list[tuple[str, ...]]) -> None:
    assert [sample.texts for sample in read_samples(written(tmp_path, name, content), columns)] == wanted


def test_tokenized_rows(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", f"{IDS}\n\n{IDS}\n")
    ids = {"input_ids": [2, 7, 3], "attention_mask": [1, 1, 1], "token_type_ids": [0, 0, 0]}
    assert read_samples(path) == [Sample(f"{path}:1", inputs=ids), Sample(f"{path}:3", inputs=ids)]
    path = written(tmp_path, "b.jsonl", '{"tokens": ["[C@H]", ">>"], "text": "no"}\n')
    assert read_samples(path) == [Sample(f"{path}:1", tokens=("[C@H]", ">>"))]


@pytest.mark.parametrize(
    ("name", "content", "columns", "found"),
    [
        ("a.txt", " \n", [], "a.txt has no text"),
        ("a.txt", "one\n", ["text"], "has no columns, .*leave --column out"),
        ("a.txt", '{"text": "a"}\n{"text": "b"}\n', [], r"looks like rows of JSON \(.jsonl\)"),
        ("a.txt", '[\n{"text": "a"}]\n', [], "looks like a JSON document"),
        ("a.txt", "text,label\na,1\nb,2\n", [], r"looks like a table with 2 columns \(.csv\)"),
        ("a.txt", "a b\tc\nd\te\n", [], r"looks like a table with 2 columns \(.tsv\)"),
        ("a.json", "{}", [], "one JSON document by its name"),
        ("a.csv", "q,p\n1,2\n", [], r"a.csv:1: no column is called text or sentence; .*--column NAME.*are 'q', 'p'"),
        ("a.csv", "q,p\n1,2\n", ["x"], r"a.csv:1: no column called 'x'; its columns are 'q', 'p'"),
        ("a.csv", "q,q\n1,2\n", ["q"], "a.csv:1: 2 columns called 'q'"),
        ("a.csv", "q,p\n1,2\n", ["q", "p", "q"], "3 columns are named"),
        ("a.csv", "n,text\n1,a\n2\n", [], "a.csv:3 has 1 columns, but the header has 2"),
        ("a.csv", 'n,text\n1,"a\nb"\n2,c,d\n', [], "a.csv:4 has 3 columns, but the header has 2"),
        ("a.csv", 'n,text\n1,"a\n2,b\n', [], "a.csv:3 cannot be read as a table: unexpected end of data"),
        ("a.csv", "q,p\na,\n", ["q", "p"], "a.csv:2: 'p' is empty, so there is no pair"),
        ("a.csv", "text\n", [], "a.csv has no text"),
        ("a.jsonl", "a text\n", [], "a.jsonl:1 is no JSON: Expecting value"),
        ("a.jsonl", "[" * 100_000, [], "a.jsonl:1 is no JSON: nested too deep"),
        ("a.jsonl", '{"text": "a"}\n"b"\n', [], "a.jsonl:2 is no JSON object"),
        ("a.jsonl", '{"text": 1}\n', [], "a.jsonl:1: 'text' is no text, but '1'"),
        ("a.jsonl", '{"text": null}\n', [], "a.jsonl:1: 'text' is no text, but 'null'"),
        ("a.jsonl", '{"text": "a\\u0000"}\n', [], "a.jsonl:1: 'text' holds a NUL"),
        ("a.jsonl", '{"text": "\\ud800"}\n', [], "a.jsonl:1: 'text' holds half a character"),
        ("a.jsonl", '{"text": "a"}\n{"label": 1}\n', [], "a.jsonl:2: no column is called text"),
        ("a.jsonl", '{"text": "a"}\n{"tokens": ["b"]}\n', [], "a.jsonl:2 has 'tokens', but .*a.jsonl:1 has a text"),
        ("a.jsonl", '{"input_ids": [1]}\n' + IDS, [], "a.jsonl:2 has 'input_ids' and .* has 'input_ids'; keep to one"),
        ("a.jsonl", '{"tokens": "a b"}\n', [], "a.jsonl:1: 'tokens' is no list of texts"),
        ("a.jsonl", '{"tokens": []}\n', [], "a.jsonl:1: 'tokens' is no list of texts"),
        ("a.jsonl", '{"input_ids": [1, true]}\n', [], "a.jsonl:1: 'input_ids' is no list of whole numbers from 0"),
        ("a.jsonl", '{"input_ids": [[1]]}\n', [], "a.jsonl:1: 'input_ids' is no list of whole numbers from 0"),
        ("a.jsonl", '{"input_ids": [-1]}\n', [], "a.jsonl:1: 'input_ids' is no list of whole numbers from 0"),
        (
            "a.jsonl",
            '{"input_ids": [1], "attention_mask": [1, 1]}\n',
            [],
            "a.jsonl:1: the lists differ in length: 1 of",
        ),
        ("a.jsonl", '{"input_ids": [1], "attention_mask": [0]}\n', [], "a.jsonl:1: 'attention_mask' is to be 1"),
        ("a.jsonl", '{"input_ids": [1], "attention_mask": [2]}\n', [], "a.jsonl:1: 'attention_mask' is to be 1"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, name: str, content: str, columns: list[str], found: str
) -> None:
    with pytest.raises(CalibrationError, match=found):
        read_samples(written(tmp_path, name, content), columns)


def test_a_line_may_be_of_any_length(tmp_path: Path) -> None:
    """The csv module, which is asked whether it is a table, takes no field so long."""
    found = read_samples(written(tmp_path, "a.txt", f"{'the cat ' * 20_000}\nthe dog\n"))
    assert [len(sample.texts[0]) for sample in found] == [159_999, 7]


def saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(folder)
    return folder


@pytest.mark.parametrize(
    ("rows", "columns", "wanted"),
    [
        ([{"n": 1, "text": "a"}, {"n": 2, "text": " "}, {"n": 3, "text": "b"}], [], [("a",), ("b",)]),
        ([{"q": "a", "p": "b", "input_ids": [1]}], ["p", "q"], [("b", "a")]),
    ],
)
def test_folders_of_datasets(
    tmp_path: Path, rows: list[dict[str, Any]], columns: list[str], wanted: list[tuple[str, ...]]
) -> None:
    found = read_samples(saved(tmp_path / "data", rows), columns)
    assert [sample.texts for sample in found] == wanted
    assert found[-1].place == f"{tmp_path / 'data'}[{len(rows) - 1}]"


def test_tokenized_datasets_of_any_format(tmp_path: Path) -> None:
    """Also one that gives tensors to those who load it."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    row = {"input_ids": [2, 7, 3, 0], "attention_mask": [1, 1, 1, 0], "label": 1}
    datasets.Dataset.from_list([row]).with_format("numpy").save_to_disk(tmp_path / "data")
    (found,) = read_samples(tmp_path / "data")
    assert found.inputs == {"input_ids": [2, 7, 3], "attention_mask": [1, 1, 1]}


@pytest.mark.parametrize(
    ("rows", "columns", "found"),
    [
        ([{"q": "a"}], [], r"data\[0\]: no column is called text or sentence"),
        ([{"text": "a"}], ["x"], r"data\[0\]: no column called 'x'; its columns are 'text'"),
        ([{"text": "a"}, {"text": None}], [], r"data\[1\]: 'text' is no text, but 'null'"),
    ],
)
def test_rows_of_datasets_that_cannot_be_used(
    tmp_path: Path, rows: list[dict[str, Any]], columns: list[str], found: str
) -> None:
    with pytest.raises(CalibrationError, match=found):
        read_samples(saved(tmp_path / "data", rows), columns)


def test_folders_that_are_no_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    with pytest.raises(CalibrationError, match=r"is a folder that datasets cannot load .*save_to_disk"):
        read_samples(tmp_path)
    part = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "all")
    with pytest.raises(CalibrationError, match="all has several parts: 'train', 'test'; give the folder of one"):
        read_samples(tmp_path / "all")
    (tmp_path / "all" / "train" / "data-00000-of-00001.arrow").write_bytes(b"nonsense")
    with pytest.raises(CalibrationError, match="train is a folder that datasets cannot load"):
        read_samples(tmp_path / "all" / "train")


def test_a_folder_needs_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModelError, match=r"the folder .* needs datasets, which is not installed; pip install"):
        read_samples(tmp_path)
