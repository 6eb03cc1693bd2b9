"""What a file says is believed by nobody: types, bounds and places of what JSON holds."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdq_surgery.untrusted import DamagedError, Item, parse_json, quoted, read_regular_file

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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "line 1, column 1"),
        ("{", "line 1, column 2"),
        ('{"a": 1,\n}', "line 2"),
        ("[" * 200_000, "nested too deep"),
        ('{"a":' * 200_000, "nested too deep"),
        ("1" * 5000, "limit"),
        ("x" * 200, "200 characters"),
        (b"\xff", "UTF-8"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_is_no_json_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(DamagedError, match=f"^the lock.*{reason}"):
        parse_json(text, "the lock", 100 if reason == "200 characters" else 1 << 22)


@pytest.mark.parametrize("value", ["a\x1b\n'\"", "x" * 1000, ["x"] * 1000, 10**4000, None])
def test_what_is_quoted_is_short_and_printable(value: Any) -> None:
    if isinstance(value, int):
        value = 10**400
    assert quoted(value).isprintable()
    assert len(quoted(value)) <= 80


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
