"""Samples as batches, and the command that calibrates with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import save_tiny_bert
from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel, PreTrainedModel, RobertaConfig, RobertaModel

import qdq_surgery as qs
from qdq_surgery.cli.commands import main
from qdq_surgery.cli.folder import load_model
from qdq_surgery.texts.batches import text_batches
from qdq_surgery.texts.samples import Sample, read_samples

TEXTS = ["a short one", "a text with some more words in it", "words", "the longest of all of these texts, by some way"]
#: Letters that the tokenizer has never seen, as a SMILES is to BERT.
UNKNOWN = ["\u4e00 \u4e8c words", "\u4e09 \u56db", "a \u4e94"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny", TEXTS)


@pytest.fixture(scope="module")
def bert(model: Path) -> PreTrainedModel:
    return load_model(model)


def samples(texts: Sequence[str]) -> list[Sample]:
    return [Sample(f"a.txt:{number}", texts=(text,)) for number, text in enumerate(texts, 1)]


def rows(*ids: list[int]) -> list[Sample]:
    return [Sample(f"a.jsonl:{number}", inputs={"input_ids": each}) for number, each in enumerate(ids, 1)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n" + "\n\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def test_batches_are_sorted_by_length(model: Path, bert: PreTrainedModel) -> None:
    data = text_batches(samples(TEXTS), bert, model, 2, 8)
    assert [tuple(batch["input_ids"].shape) for batch in data.batches] == [(2, 5), (2, 8)]
    assert [int(batch["attention_mask"].sum()) for batch in data.batches] == [3 + 5, 8 + 8]
    assert data.notes[0] == "2 of 4 texts are cut at 8 tokens"
    assert data.notes[1].startswith("only 4 texts with 24 tokens in all: ")


def test_one_text_of_a_few_tokens_is_called_too_little_and_hundreds_are_not(model: Path, bert: PreTrainedModel) -> None:
    (note,) = text_batches(samples(["words"]), bert, model).notes
    assert note.startswith("only 1 text with 3 tokens in all")
    assert "100 to 500" in note
    assert text_batches(samples(TEXTS * 50), bert, model).notes == ()


def test_pairs_tokens_and_ids_give_what_the_tokenizer_gives(model: Path, bert: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    wanted = tokenizer("a text", "some words", return_tensors="pt")
    found = text_batches([Sample("a:1", texts=("a text", "some words"))], bert, model).batches[0]
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    whole = tokenizer("a text")["input_ids"]
    words = tokenizer.convert_ids_to_tokens(whole)
    for tokens in (words, words[1:-1]):
        found = text_batches([Sample("a:1", tokens=tuple(tokens))], bert, model).batches[0]
        assert found["input_ids"].tolist() == [whole]
    found = text_batches(rows([2, 8, 3], [2, 9, 9, 9, 3]), bert, "no folder is needed").batches[0]
    assert found["input_ids"].tolist() == [[2, 8, 3, 0, 0], [2, 9, 9, 9, 3]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_tokens_are_cut_inside_their_special_tokens(model: Path, bert: PreTrainedModel) -> None:
    data = text_batches([Sample("a:1", tokens=tuple("abcdefgh"))], bert, model, length=5)
    ids = data.batches[0]["input_ids"][0].tolist()
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "a", "b", "c", "[SEP]"]
    assert data.notes[0] == "1 of 1 texts are cut at 5 tokens"


def test_ids_are_padded_with_the_models_own_token(model: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    roberta = RobertaModel(RobertaConfig(**sizes, vocab_size=60, pad_token_id=5, max_position_embeddings=10)).eval()
    data = text_batches(rows([7, 8, 9], [7] * 9), roberta, model)
    assert data.batches[0]["input_ids"].tolist() == [[7, 8, 9, 5], [7, 7, 7, 7]]  # four positions are left behind five
    assert data.notes[0] == "1 of 2 texts are cut at 4 tokens"
    roberta(**data.batches[0])


def test_arguments_that_the_model_lacks_are_left_out(model: Path) -> None:
    torch.manual_seed(0)
    small = DistilBertModel(DistilBertConfig(vocab_size=600, dim=32, n_layers=1, n_heads=2, hidden_dim=64)).eval()
    (batch,) = text_batches(samples(TEXTS), small, model).batches
    assert batch.keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(("length", "cut"), [(None, 128), (128, 128), (129, 128), (4096, 128), (64, 64)])
def test_a_length_above_the_models_is_reduced_with_a_word(
    model: Path, bert: PreTrainedModel, length: int | None, cut: int
) -> None:
    data = text_batches(samples(["words " * 300] * 2), bert, model, length=length)
    assert data.batches[0]["input_ids"].shape == (2, cut)
    words = [f"--length {length} is more than the 128 tokens that BertModel takes; 128 it is"]
    assert list(data.notes[:-1]) == [*(words if (length or 0) > 128 else []), f"2 of 2 texts are cut at {cut} tokens"]
    bert(**data.batches[0])


def test_texts_of_unknown_tokens_are_refused_with_the_share_an_example_and_the_remedy(
    model: Path, bert: PreTrainedModel
) -> None:
    words = (
        r"^62\.5 % of the tokens \(5 of 8\) are unknown to the tokenizer of .*: it reads them as \[UNK\], most in "
        r"a\.txt:1, '\u4e00 \u4e8c words'; more than 10 % .*--tokenizer FOLDER.*'tokens'.*'input_ids'"
    )
    with pytest.raises(qs.CalibrationError, match=words):
        text_batches(samples([*UNKNOWN, "words"]), bert, model)
    with pytest.raises(qs.CalibrationError, match=r"100\.0 % of the tokens \(2 of 2\)"):
        text_batches([Sample("a:1", tokens=("C@H", ">>"))], bert, model)


@pytest.mark.parametrize(
    ("known", "words"), [(9, ["10.0 % of the tokens (1 of 10) are"]), (98, ["1.0 % of the tokens (1 of 99)"]), (99, [])]
)
def test_up_to_one_in_ten_unknown_tokens_get_a_word_and_one_in_a_hundred_does_not(
    model: Path, bert: PreTrainedModel, known: int, words: list[str]
) -> None:
    given = samples(["\u4e00 " + "words " * known])
    notes = [note for note in text_batches(given, bert, model).notes if "unknown" in note]
    assert len(notes) == len(words)
    assert all(note.startswith(word) for note, word in zip(notes, words, strict=True))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (rows([2, 3], [2, 600]), "a.jsonl:2 has 600 in 'input_ids', and BertModel takes 0 to"),
        (
            [Sample("a.jsonl:1", inputs={"input_ids": [2], "token_type_ids": [2]})],
            "a.jsonl:1 has 2 in 'token_type_ids', and BertModel takes 0 to 1",
        ),
    ],
)
def test_ids_outside_the_vocabulary(model: Path, bert: PreTrainedModel, given: list[Sample], found: str) -> None:
    with pytest.raises(qs.CalibrationError, match=found):
        text_batches(given, bert, model)


@pytest.mark.parametrize(
    ("count", "length", "found"),
    [
        (0, 16, r"batches of 0 texts hold nothing: give at least 1 \(--batch"),
        (2, 2, r"texts of at most 2 tokens .*: give at least 3 \(--length"),
        (2, 0, "texts of at most 0 tokens"),
    ],
)
def test_sizes_that_cannot_be(model: Path, bert: PreTrainedModel, count: int, length: int, found: str) -> None:
    with pytest.raises(qs.CalibrationError, match=found):
        text_batches(samples(TEXTS), bert, model, count, length)


def test_a_folder_without_a_tokenizer(tmp_path: Path, bert: PreTrainedModel) -> None:
    with pytest.raises(qs.ModelError, match=r"has no .*tokenizer"):
        text_batches(samples(TEXTS), bert, tmp_path)


def test_the_command_writes_a_calibrated_model(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "calibrated"
    options = ["--method", "percentile", "--percentile", "99.9", "--batch", "2"]
    assert main(["calibrate", str(model), str(texts), str(output), *options]) == 0
    printed = capsys.readouterr().out
    assert "20 ranges by percentile(99.9%)" in printed
    assert f"written to {output}" in printed
    wanted = qs.convert(load_model(model))
    qs.calibrate(wanted, text_batches(samples(TEXTS), wanted, model, 2).batches, "percentile", percentile=99.9)
    found = load_model(output)
    ranges = {name: each.amax for name, each in qs.quantizers(found).items()}
    assert all(torch.equal(each.amax, ranges[name]) for name, each in qs.quantizers(wanted).items())
    report = json.loads((output / "qdq_report.json").read_text())
    assert report["calibration"]["method"] == "percentile(99.9%)"
    assert len(report["calibration"]["ranges"]) == 20
    # The tokenizer travels along, so the result can be calibrated again, by another method.
    assert main(["calibrate", str(output), str(texts), str(tmp_path / "again"), "--method", "max"]) == 0
    assert "20 ranges by max" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--percentile", "99"], "--percentile goes with --method percentile only"),
        (["--method", "percentile", "--percentile", "101"], "outside (0, 100]"),
        (["--method", "percentile", "--percentile", "0.5"], "did you mean 99.5?"),
        (["--method", "percentile", "--percentile", "0.9999"], "did you mean 99.99?"),
        (["--column", "text"], "has no columns"),
        (["--tokenizer", "nowhere"], "nowhere is no folder, so it has no tokenizer"),
        (["--class", "BertModell"], "lacks (did you mean BertModel?); name one that it has (--class CLASS)"),
        (["--batch", "0"], "batches of 0 texts hold nothing: give at least 1 (--batch"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_line_and_write_nothing(
    model: Path, texts: Path, tmp_path: Path, options: list[str], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    assert main(["calibrate", str(model), str(texts), str(output), *options]) == 1
    error = capsys.readouterr().err
    assert found in error
    assert error.count("\n") == 1
    assert not output.exists()


def test_a_folder_without_a_vocabulary_is_calibrated_with_another_ones_or_with_rows(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    arguments = ["calibrate", str(bare), str(texts)]
    assert main([*arguments, str(tmp_path / "no")]) == 1
    assert "--tokenizer FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert main([*arguments, str(tmp_path / "one"), "--tokenizer", str(model)]) == 0
    assert (tmp_path / "one" / "tokenizer.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": tokenizer(text)["input_ids"]}) + "\n" for text in TEXTS))
    assert main(["calibrate", str(bare), str(rows), str(tmp_path / "two")]) == 0
    reports = [json.loads((tmp_path / name / "qdq_report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["calibration"]["ranges"] == reports[1]["calibration"]["ranges"]


def test_columns_and_notes_on_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "texts.csv"
    table.write_text(
        "id,question,answer\n" + "".join(f'{n},{text},"words, \x1b"\n' for n, text in enumerate(TEXTS[:3]))
    )
    options = ["--column", "question", "--column", "answer", "--length", "7"]
    assert main(["calibrate", str(model), str(table), str(tmp_path / "out"), *options]) == 0
    error = capsys.readouterr().err.splitlines()
    assert "qdq-surgery: note: 2 of 3 texts are cut at 7 tokens" in error
    assert any(line.startswith("qdq-surgery: note: only 3 texts with ") for line in error)
    assert len(read_samples(table, ["question", "answer"])) == 3
