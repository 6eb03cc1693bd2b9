"""What a file says is believed by nobody: types, bounds and places of what JSON holds."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdq_surgery.safety.untrusted import DamagedError, Item, parse_json, quoted, read_json_text, read_regular_file

WORD = re.compile("[a-z]+")

WRONG: dict[str, tuple[Any, Callable[[Item], Any]]] = {
    "a-list-as-mapping": ([], lambda item: item.entries()),
    "an-unknown-key": ({"a": 1, "b\x1b": 2}, lambda item: item.fields((), ("a",))),
    "a-missing-key": ({}, lambda item: item.fields(("a",))),
    "a-long-key": ({"a" * 2000: 1}, lambda item: item.entries()),
    "too-many-entries": ({"a": 1, "b": 2}, lambda item: item.entries(1)),
    "a-text-as-list": ("ab", lambda item: item.items()),
    "a-long-list": ([1, 2], lambda item: item.items(1)),
    "a-number-as-text": (7, lambda item: item.text()),
    "a-long-text": ("aa", lambda item: item.text(1)),
    "a-control-character": ("a\x1b[2J", lambda item: item.text()),
    "a-line-break": ("a\nb", lambda item: item.text()),
    "a-direction-mark": ("a\u202e", lambda item: item.lines()),
    "another-pattern": ("A", lambda item: item.text(pattern=WORD, wanted="a word")),
    "no-choice": ("c", lambda item: item.one_of(("a", "b"))),
    "true-for-one": (True, lambda item: item.one_of((0, 1))),
    "true-as-number": (True, lambda item: item.integer(0, 1)),
    "a-float-as-integer": (1.0, lambda item: item.integer(0, 1)),
    "out-of-bounds": (10**40, lambda item: item.integer(0, 100)),
    "no-number": (float("nan"), lambda item: item.number(0, 1)),
    "an-infinite-number": (float("inf"), lambda item: item.number(0, 1)),
    "one-as-flag": (1, lambda item: item.flag()),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_with_its_place(name: str) -> None:
    value, read = WRONG[name]
    with pytest.raises(DamagedError, match=r"config\.sites") as caught:
        read(Item(value, "config.sites"))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_what_is_right_is_given() -> None:
    item = parse_json('{"a": [1, 2.5, "x", true, null], "b c": {"d": "e\\nf"}}', "file")
    fields = item.fields(("a",), ("b c",))
    one, half, text, flag, none = fields["a"].items()
    assert (one.integer(0, 2), half.number(0, 3), text.text(), flag.flag()) == (1, 2.5, "x", True)
    assert none.one_of((None, 1)) is None
    assert none.where == "file.a[4]"
    inner = fields["b c"].entries()["d"]
    assert inner.where == "file.'b c'.d"
    assert inner.lines() == "e\nf"


def test_json_says_where_it_ends() -> None:
    with pytest.raises(DamagedError, match=r"^the lock is no JSON .*line 2, column 1"):
        parse_json('{"a": 1,\n}', "the lock")
    with pytest.raises(DamagedError, match="the lock is not UTF-8 at byte 2"):
        parse_json(b'"a\xff"', "the lock")
    with pytest.raises(DamagedError, match="the lock has 200 characters of JSON, more than 100"):
        parse_json("x" * 200, "the lock", 100)


@pytest.mark.parametrize("value", ["a\x1b\n'\"", "x" * 1000, ["x"] * 1000, 10**4000, None])
def test_what_is_quoted_is_short_and_printable(value: Any) -> None:
    if isinstance(value, int):
        value = 10**400
    assert quoted(value).isprintable()
    assert len(quoted(value)) <= 120


def fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "fifo": fifo,
    "socket": a_socket,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_refused_unopened(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    path = Path("special")
    SPECIAL[kind](path)
    opened: list[Any] = []
    monkeypatch.setattr(os, "open", lambda *args: opened.append(args))
    with pytest.raises(DamagedError, match="no regular file"):
        read_regular_file(path, 100)
    assert opened == []


def test_a_regular_file_is_read_within_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    link = tmp_path / "link"
    link.symlink_to(path)
    assert read_regular_file(path, 3) == read_regular_file(link, 3) == b"abc"
    with pytest.raises(DamagedError, match="3 bytes"):
        read_regular_file(path, 2)
    with pytest.raises(OSError, match="No such file"):
        read_regular_file(tmp_path / "none", 2)


def test_a_regular_file_and_a_link_to_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_regular_file(tmp_path / "file", 5) == read_regular_file(str(tmp_path / "link"), 9) == b"12345"
    with pytest.raises(ValueError, match="more than the 4"):
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
    (tmp_path / "file").write_text("text")
    real = os.stat(tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *_, **__: real)
        with pytest.raises(DamagedError, match="no regular file"):  # and it does not wait for a writer
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
        ("[" + "[],[]," * 600_000 + "1]", "more than 1000000 values"),
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
