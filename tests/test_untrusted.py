"""Data from a stranger: files and JSON under a budget."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qdq_surgery.untrusted import quoted, read_json_text, read_regular_file


def test_a_regular_file_and_a_link_to_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_regular_file(tmp_path / "file", 5) == read_regular_file(str(tmp_path / "link"), 9) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_regular_file(tmp_path / "file", 4)


@pytest.mark.parametrize("name", ["folder", "fifo", "to-fifo", "device", "n\0l"])
def test_anything_else_is_refused_before_it_is_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "to-fifo").symlink_to("fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(ValueError, match=r"no regular file|NUL"):
        read_regular_file(tmp_path / name, 100)


def test_one_that_becomes_a_fifo_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    real = os.stat(tmp_path / "file")
    monkeypatch.setattr(os, "stat", lambda *_: real)
    with pytest.raises(ValueError, match="no regular file"):  # and it does not wait for a writer
        read_regular_file(tmp_path / "fifo", 100)


@pytest.mark.parametrize("text", ["null", "[]", '{"a": [1, 2.5, "]]]]", {"b": true}]}', "[" * 64 + "]" * 64])
def test_json_that_is_read(text: str) -> None:
    assert read_json_text(text, where="it") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "Expecting value"),
        ("{", "no JSON that can be read"),
        ("[" * 200_000, "nested deeper than 64 levels"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64 levels"),
        ("[" + "[],[]," * 400_000 + "1]", "more than 1000000 values"),
        (f'"{"a" * 2**24}"', "characters of JSON, more than"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("9" * 5000, "no JSON that can be read"),
    ],
)
def test_json_that_is_refused(text: str, found: str) -> None:
    with pytest.raises(ValueError, match=found) as caught:
        read_json_text(text, where="the lock")
    assert str(caught.value).startswith("the lock ")
    assert len(str(caught.value)) < 500


def test_foreign_text_is_shown_without_what_a_terminal_acts_on() -> None:
    assert quoted("a.b") == "'a.b'"
    assert quoted("\x1b[2J\n\ud800") == r"'\x1b[2J\n\ud800'"
    assert len(quoted("x" * 10**6)) <= 120
