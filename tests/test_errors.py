"""Messages: whatever they quote, they are printable, of a bounded length and on the lines that we gave them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

import qdq_surgery.errors
from qdq_surgery.errors import QdqSurgeryError, RuleFileError, printable

#: C0, DEL, C1, directions, line separators, zero-width, half a character, a noncharacter.
HIDDEN = "\0\x07\x08\t\r\x1b[2J\x7f\x85\x9b\u061c\u200b\u200d\u200e\u2028\u2029\u202e\u2066\ufeff\ud800\uffff\U000e0001"

FAMILY = [
    getattr(qdq_surgery.errors, name) for name in qdq_surgery.errors.__all__ if name.endswith("Error")
]  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in FAMILY if kind is not RuleFileError])
def test_every_message_is_printable(kind: type[QdqSurgeryError]) -> None:
    error = kind(f"first\nsecond {HIDDEN} größer → 😀")
    first, second = str(error).split("\n")
    assert first == "first"
    assert second.isprintable()
    assert second.endswith(" größer → 😀")
    assert r"\x1b[2J" in second
    assert r"\u202e" in second


@pytest.mark.parametrize("letter", ["\n", *HIDDEN])
def test_what_a_rule_file_error_quotes_stays_on_its_line(letter: str) -> None:
    error = RuleFileError(f"found {letter}", f"fix {letter}", path=f"a{letter}.yaml", line=1, column=2)
    assert str(error).isprintable()
    assert str(error).startswith("a")
    assert (error.found, error.fix) == (f"found {letter}", f"fix {letter}")


@pytest.mark.parametrize("kind", [kind for kind in FAMILY if kind is not RuleFileError])
@pytest.mark.parametrize("letter", ["x", "\x1b", "\U000e0001"])
def test_every_message_has_an_end(kind: type[QdqSurgeryError], letter: str) -> None:
    assert len(str(kind(letter * 1_000_000))) == 20_000
    assert len(str(kind(letter * 1_000))) == 1_000 * len(printable(letter))


@pytest.mark.parametrize("letter", ["x", "\x1b"])
def test_every_message_about_a_rule_file_has_an_end(letter: str) -> None:
    assert len(str(RuleFileError(letter * 1_000_000, letter * 1_000_000))) == 1202


def test_what_is_printable_stays_as_it_is() -> None:
    text = "größer → 😀 'quoted' \\x1b C:\\new"
    assert printable(text) is text
    assert str(QdqSurgeryError(text)) == text


def test_errors_survive_pickling() -> None:
    error = RuleFileError("found\n", "fix", path=Path("a.yaml"), line=3, column=7)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is RuleFileError
    assert (str(again), vars(again)) == (str(error), vars(error))
    for kind in FAMILY:
        if kind is not RuleFileError:
            assert str(pickle.loads(pickle.dumps(kind("a\x1b")))) == r"a\x1b"
