from __future__ import annotations

import json
import random
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import SCRIPTS
from tiny_checkpoint import tiny_tokenizer

from tasks import make_ner, make_pairs, make_qa, make_sentences
from tasks.conll_file import Tagged, read_conll
from tasks.errors import OptionError, TaskFileError
from tasks.features import IGNORED, Collator, Feature, calibration_batches, rows
from tasks.generate import TASKS, generate
from tasks.metrics import answer_scores, class_scores, tag_scores
from tasks.options import parse
from tasks.qa_answers import best_answers
from tasks.qa_windows import windows
from tasks.squad_file import Answer, Question, read_squad
from tasks.table_file import read_table
from tasks.tagging import tag_features, tags_of
from tasks.words import FIRST_NAMES, PLACES, SURNAMES, part


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = [paragraph["context"] for paragraph in make_qa.make(random.Random(0), 60, False)["data"][0]["paragraphs"]]
    return tiny_tokenizer([*texts, "who what when where how many is the of ?"])


# --- generators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_bytes(task: str, tmp_path: Path) -> None:
    first, again, other = (
        [file.read_bytes() for file in generate(task, tmp_path / str(name), seed=seed, train=20, held_out=7)]
        for name, seed in enumerate((3, 3, 4))
    )
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]
    assert b"\r" not in first[0]


def test_files_have_the_counts_wanted(tmp_path: Path) -> None:
    made = {task: generate(task, tmp_path, train=11, held_out=5) for task in TASKS}
    for number, count in enumerate((11, 5)):
        assert len(read_squad(made["qa"][number])) == count
        assert len(read_table(made["pairs"][number])) == count
        assert len(read_table(made["sentences"][number])) == count
        assert len(read_conll(made["ner"][number])) == count


def test_answers_are_at_their_offsets_and_occur_once(tmp_path: Path) -> None:
    train, held_out = (read_squad(path) for path in generate("qa", tmp_path, train=300, held_out=100))
    for question in (*train, *held_out):
        (answer,) = question.answers
        assert question.context[answer.start :].startswith(answer.text)
        assert len(re.findall(rf"\b{answer.text}\b", question.context)) == 1, question
        assert answer.text not in question.question


def test_a_question_does_not_copy_the_sentence_of_its_answer(tmp_path: Path) -> None:
    train, _ = (read_squad(path) for path in generate("qa", tmp_path, train=300, held_out=3))
    shares = []
    for question in train:
        start = question.context.rfind(". ", 0, question.answers[0].start) + 2
        sentence = set(question.context[start:].split(".")[0].lower().split())
        words = [word for word in question.question.lower().rstrip("?").split() if word not in ("the", "of", "is")]
        shares.append(sum(word in sentence for word in words) / len(words))
    assert sum(shares) / len(shares) < 0.5


def test_the_place_of_an_answer_says_nothing(tmp_path: Path) -> None:
    train, _ = (read_squad(path) for path in generate("qa", tmp_path, train=600, held_out=3))
    places = [question.context.count(". ", 0, question.answers[0].start) for question in train]
    assert max(places.count(place) for place in set(places)) < 0.3 * len(places)


def test_parts_share_no_names() -> None:
    for words in (FIRST_NAMES, PLACES, SURNAMES):
        assert len(set(words)) == len(words)
        assert not set(part(words, True)) & set(part(words, False))
        assert sorted([*part(words, True), *part(words, False)]) == sorted(words)


def test_held_out_answers_and_entities_are_new(tmp_path: Path) -> None:
    train, held_out = (read_squad(path) for path in generate("qa", tmp_path, train=600, held_out=200))
    named = re.compile(r"[A-Z]")
    seen = {question.answers[0].text for question in train if named.match(question.answers[0].text)}
    assert seen
    assert not seen & {question.answers[0].text for question in held_out}
    ner_train, ner_held_out = (read_conll(path) for path in generate("ner", tmp_path, train=600, held_out=200))
    assert not surfaces(ner_train, "PER") & surfaces(ner_held_out, "PER")
    assert not surfaces(ner_train, "MISC") & (surfaces(ner_held_out, "MISC") - set(make_ner._EVENTS))


def surfaces(sentences: list[Tagged], kind: str) -> set[str]:
    tagged = ((word, tag) for one in sentences for word, tag in zip(one.words, one.tags, strict=True))
    found = {word for word, tag in tagged if tag.endswith(kind)}
    return found - set(make_ner._EVENTS)


def test_a_surface_is_of_several_kinds(tmp_path: Path) -> None:
    train, _ = (read_conll(path) for path in generate("ner", tmp_path, train=600, held_out=3))
    assert len(surfaces(train, "PER") & surfaces(train, "LOC") & surfaces(train, "ORG")) > 10


def test_tags_are_bio(tmp_path: Path) -> None:
    for sentence in read_conll(generate("ner", tmp_path, train=300, held_out=3)[0]):
        for before, tag in zip(("O", *sentence.tags), sentence.tags, strict=False):
            assert not tag.startswith("I-") or before[2:] == tag[2:]
    kinds = {tag[2:] for one in make_ner.make(random.Random(0), 300, True) for _, tag in one if tag != "O"}
    assert kinds == {"PER", "LOC", "ORG", "MISC"}


def test_labels_are_balanced() -> None:
    for made in (make_pairs.make(random.Random(0), 400, False), make_sentences.make(random.Random(0), 400, True)):
        share = sum(row[-1] == "1" for row in made) / len(made)
        assert 0.4 < share < 0.6


def test_pairs_of_both_labels_share_most_words() -> None:
    overlaps: dict[str, list[float]] = {"0": [], "1": []}
    for first, second, label in make_pairs.make(random.Random(0), 600, False):
        one, other = (set(re.findall(r"\w+", text.lower())) for text in (first, second))
        overlaps[label].append(len(one & other) / len(one | other))
    means = [sum(values) / len(values) for values in overlaps.values()]
    assert min(means) > 0.45
    assert abs(means[0] - means[1]) < 0.2


def test_the_generator_runs_as_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate.py", "all", str(tmp_path), "--train", "3", "--held-out", "2"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(SCRIPTS / "tasks" / "generate.py"), run_name="__main__")
    assert len(capsys.readouterr().out.split()) == 8
    assert len(list(tmp_path.iterdir())) == 8


# --- files -----------------------------------------------------------------------------------------------------------


def squad(context: object = "Ada lives in Rome.", **question: object) -> dict[str, Any]:
    entry = {"id": "q1", "question": "Where?", "answers": [{"text": "Rome", "answer_start": 13}], **question}
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": [entry]}]}]}


def write(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")
    return path


def test_squad_is_read(tmp_path: Path) -> None:
    (question,) = read_squad(write(tmp_path / "a.json", squad()))
    assert question == Question("q1", "Where?", "Ada lives in Rome.", (Answer("Rome", 13),))


@pytest.mark.parametrize(
    ("document", "found"),
    [
        (squad(answers=[{"text": "Rome", "answer_start": 3}]), r"a.json:11: data\[0\].paragraphs\[0\].qas\[0\]"
         r".answers\[0\]: the answer 'Rome' is not at character 3, where ' liv' is; it is at 13"),
        (squad(answers=[{"text": "Oslo", "answer_start": 13}]), r"a.json:11: .*'Oslo' is not at .*; give a span"),
        (squad(answers=[{"text": "Rome", "answer_start": -5}]), r"a.json:11: .* is not at character -5"),
        (squad(answers=[{"text": "Rome", "answer_start": True}]), r"a.json:11: .*no whole number named 'answer_start'"),
        (squad(answers=[{"text": "", "answer_start": 0}]), r"a.json:11: .*the answer is empty"),
        (squad(answers=[]), r"a.json:11: .*question 'q1' has no answer; leave unanswerable questions"),
        (squad(context=3), r"a.json:1: data\[0\].paragraphs\[0\]: no text named 'context'"),
        ({"version": "1.1"}, r"a.json:1: the document: no list named 'data'; give a SQuAD v1.1 file"),
        ([], r"a.json:1: the document: no list"),
        ({"data": []}, r"a.json:1: no question in it"),
        ({"data": squad()["data"] * 2}, r"id 'q1' is also that of data\[0\].paragraphs\[0\].qas\[0\]"),
    ],
)  # fmt: skip
def test_a_malformed_squad_file_is_named_with_its_line(tmp_path: Path, document: object, found: str) -> None:
    with pytest.raises(TaskFileError, match=found):
        read_squad(write(tmp_path / "a.json", document))


def test_a_file_that_is_no_json_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"data":\n[\n}')
    with pytest.raises(TaskFileError, match=r"a.json:3: no JSON"):
        read_squad(tmp_path / "a.json")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskFileError, match=r"none.tsv: No such file"):
        read_table(tmp_path / "none.tsv")
    (tmp_path / "latin.txt").write_bytes(b"a O\n\xe4 O\n")
    with pytest.raises(TaskFileError, match=r"latin.txt:2: a byte that is no UTF-8"):
        read_conll(tmp_path / "latin.txt")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("sentence\tlabel\nGood .\t1\n", ("Good .",)),
        ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tA \"b\t\"B\r\n", ('A "b', '"B')),
        ("index\tquestion\tsentence\tlabel\n0\tWho?\tAda.\t1\n\n", ("Who?", "Ada.")),
    ],
    ids=["sst2", "mrpc", "qnli"],
)  # fmt: skip
def test_tables_of_glue_are_read(tmp_path: Path, text: str, sentences: tuple[str, ...]) -> None:
    (tmp_path / "a.tsv").write_bytes(text.encode())
    (row,) = read_table(tmp_path / "a.tsv")
    assert (row.sentences, row.label) == (sentences, "1")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("sentence,label\nGood,1\n", r"a.tsv:1: the header names the columns 'sentence,label'; separate the columns"),
        ("sentence\tlabel\nGood\t1\nBad\n", r"a.tsv:3: 1 columns where the header has 2"),
        ("sentence\tlabel\nGood\t1\n\nBad\t0\t0\n", r"a.tsv:4: 3 columns where the header has 2"),
        ("sentence\tlabel\n \t1\n", r"a.tsv:2: an empty sentence or label"),
        ("sentence\tlabel\n", r"a.tsv:1: no row below the header"),
    ],
)
def test_a_malformed_table_is_named_with_its_line(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "a.tsv").write_text(text)
    with pytest.raises(TaskFileError, match=found):
        read_table(tmp_path / "a.tsv")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Ada NNP B-NP B-PER\nruns O\n", r"a.txt:2: 2 columns, where 4 came before"),
        ("Ada\n", r"a.txt:1: 1 columns, where a word and a tag are needed"),
        ("Ada B-PER\n\nruns PER\n", r"a.txt:3: the tag 'PER'; write tags as O, B-TYPE or I-TYPE"),
        ("-DOCSTART- -X- -X- O\n\n", r"a.txt:1: no sentence in it"),
    ],
)
def test_a_malformed_conll_file_is_named_with_its_line(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(TaskFileError, match=found):
        read_conll(tmp_path / "a.txt")


def test_conll_is_read_with_two_and_with_four_columns(tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("Ada B-PER\nruns O\n\n\nNo O")
    (tmp_path / "four.txt").write_text("-DOCSTART- -X- O O\n\nAda N B B-PER\nruns V B O\n\nNo X X O\n")
    wanted = [Tagged(("Ada", "runs"), ("B-PER", "O")), Tagged(("No",), ("O",))]
    assert read_conll(tmp_path / "two.txt") == read_conll(tmp_path / "four.txt") == wanted


# --- features --------------------------------------------------------------------------------------------------------


def test_every_window_knows_where_its_tokens_are(tokenizer: Any, tmp_path: Path) -> None:
    questions = read_squad(generate("qa", tmp_path, train=30, held_out=3)[0])
    features = windows(questions, tokenizer, max_length=64, stride=16)
    assert len(features) > len(questions)
    found = set()
    for feature in features:
        question = questions[feature.example]
        assert len(feature.inputs["input_ids"]) == len(feature.spans) <= 64
        start, end = feature.targets["start_positions"], feature.targets["end_positions"]
        assert isinstance(start, int)
        assert isinstance(end, int)
        first, last = feature.spans[start], feature.spans[end]
        if first is not None and last is not None:
            assert question.context[first[0] : last[1]] == question.answers[0].text
            found.add(feature.example)
    assert found == set(range(len(questions)))  # the stride is longer than any answer: some window has all of it


def test_a_window_without_the_answer_points_to_its_first_token(tokenizer: Any) -> None:
    context = " ".join(["the"] * 60)
    question = Question("q", "who ?", context, (Answer("the", 0),))
    features = windows([question], tokenizer, max_length=24, stride=4)
    targets = [(feature.targets["start_positions"], feature.targets["end_positions"]) for feature in features]
    assert targets[0] != (0, 0)
    assert set(targets[1:]) == {(0, 0)}


def test_a_question_without_room_is_refused(tokenizer: Any) -> None:
    question = Question("long", "the " * 20, "the the", (Answer("the", 0),))
    with pytest.raises(OptionError, match=r"--max_seq_length 24 leaves 1 tokens .* 'long' \(20 tokens\)"):
        windows([question], tokenizer, max_length=24, stride=4)


def test_the_best_answer_comes_from_the_best_window() -> None:
    question = Question("q", "?", "ab cd ef", (Answer("cd", 3),))
    spans = (None, (0, 2), (3, 5), (6, 8), None)
    features = [Feature({}, {}, 0, spans), Feature({}, {}, 0, spans)]
    weak = [torch.tensor([9.0, 1, 0, 0, 0]), torch.tensor([9.0, 1, 0, 0, 0])]
    strong = [torch.tensor([0.0, 0, 3, 0, 0, 50]), torch.tensor([0.0, 2, 0, 3, 0, 50])]  # the last is padding
    best = best_answers([question], features, [weak, strong], count=3, max_answer_length=2)["q"]
    assert best[0].text == "cd ef"
    assert len(best) == 3
    assert sum(candidate.probability for candidate in best) == pytest.approx(1)
    short = best_answers([question], features, [weak, strong], count=3, max_answer_length=1)["q"]
    assert all(" " not in candidate.text for candidate in short)


def test_tags_go_to_first_pieces_and_back(tokenizer: Any) -> None:
    sentences = [Tagged(("Firm", "bridge-works", "is"), ("B-ORG", "I-ORG", "O"))]
    labels = {"O": 0, "B-ORG": 1, "I-ORG": 2}
    (feature,) = tag_features(sentences, tokenizer, labels, 128)
    targets = feature.targets["labels"]
    assert isinstance(targets, list)
    assert [label for label in targets if label != IGNORED] == [1, 2, 0]
    assert len(targets) > 5  # the second word has several pieces
    logits = torch.nn.functional.one_hot(torch.tensor(targets).clamp_min(0), 3).float()
    assert tags_of(sentences, [feature], [logits], list(labels)) == [["B-ORG", "I-ORG", "O"]]
    (cut,) = tag_features(sentences, tokenizer, labels, 3)
    assert tags_of(sentences, [cut], [logits[:3]], list(labels)) == [["B-ORG", "O", "O"]]


def test_batches_are_padded(tokenizer: Any) -> None:
    made = Collator(tokenizer)(
        rows([Feature({"input_ids": [5]}, {"labels": [1]}, 0), Feature({"input_ids": [6, 7]}, {"labels": [1, 2]}, 1)])
    )
    assert made["input_ids"].tolist() == [[5, tokenizer.pad_token_id], [6, 7]]
    assert made["labels"].tolist() == [[1, IGNORED], [1, 2]]


def test_calibration_takes_as_many_batches_as_asked(tokenizer: Any) -> None:
    features = [Feature({"input_ids": [index]}, {"labels": 0}, index) for index in range(20)]
    options: dict[str, Any] = {"size": 4, "device": torch.device("cpu")}
    some = list(calibration_batches(features, Collator(tokenizer), batches=3, seed=0, **options))
    assert [batch["input_ids"].shape[0] for batch in some] == [4, 4, 4]
    assert set(some[0]) == {"input_ids"}
    every = list(calibration_batches(features, Collator(tokenizer), batches=99, seed=0, **options))
    assert sorted(torch.cat([batch["input_ids"] for batch in every]).flatten().tolist()) == list(range(20))


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_answers_are_scored_as_squad_does() -> None:
    questions = [
        Question("a", "", "", (Answer("the red car", 0), Answer("a car", 0))),
        Question("b", "", "", (Answer("Rome", 0),)),
    ]
    assert answer_scores(questions, {"a": "Car.", "b": "Oslo"}) == {"exact_match": 50, "f1": 50}
    assert answer_scores(questions[:1], {"a": "red bus"})["f1"] == pytest.approx(50)


def test_classes_are_scored() -> None:
    scores = class_scores(torch.tensor([1, 1, 0, 1]), torch.tensor([1, 0, 0, 1]), 2)
    assert scores == {"accuracy": 75, "f1": pytest.approx(80)}
    assert class_scores(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), 3) == {"accuracy": 100, "f1": 100}


def test_entities_count_as_a_whole() -> None:
    sentences = [Tagged(("a", "b", "c"), ("B-PER", "I-PER", "B-LOC"))]
    assert tag_scores(sentences, [["B-PER", "O", "B-LOC"]]) == {"precision": 50, "recall": 50, "f1": 50}
    assert tag_scores(sentences, [["O", "O", "O"]])["f1"] == 0


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("", "nothing to do"),
        ("--do_calib", "--do_calib needs --train_file"),
        ("--do_train", "--do_train needs --train_file"),
        ("--do_eval", "--do_eval needs --validation_file"),
        ("--do_calib --fp32 --train_file a", "--do_calib is about quantizers"),
        ("--do_train --fp32 --learn_ranges --train_file a", "--learn_ranges is about quantizers"),
        ("--do_train --train_file a --warmup_ratio 5", "no share of the steps"),
        ("--do_train --train_file a --max_seq_length 0", "0 is less than 1"),
        ("--do_train --train_file a --calibrator magic", "invalid choice"),
    ],
)
def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture[str], given: str, found: str) -> None:
    with pytest.raises(SystemExit):
        parse("x", ["--model_name_or_path", "m", "--output_dir", "o", *given.split()])
    assert found in capsys.readouterr().err
