"""A user's file of text: only regular files, up to a limit, UTF-8, whatever its line ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qdq_surgery.errors import CalibrationError
from qdq_surgery.texts.input_file import printable, read_lines, read_text


def test_line_ends_and_a_byte_order_mark_make_no_difference(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\r\n two\u2028half \x0b\rthree".encode())
    assert read_text(path) == "one\n\n two\u2028half \x0b\nthree"
    assert read_lines(path) == [(1, "one"), (3, "two\u2028half"), (4, "three")]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "a.txt cannot be read: No such file"),
        (b"fine\n\xff\n", "a.txt:2 is not UTF-8 at byte 5; save it as UTF-8"),
        (b"fine\na\0b\n", "a.txt:2 holds a NUL character"),
        ("text".encode("utf-16"), "a.txt is UTF-16"),
        (b"\x1f\x8b\x08", "a.txt is gzip"),
        (b"PK\x03\x04", "a.txt is a ZIP archive"),
        (b"x" * 101, "a.txt has 101 bytes, more than the 100 that are read"),
    ],
    ids=["missing", "latin-1", "nul", "utf-16", "gzip", "zip", "large"],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: bytes | None, found: str) -> None:
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=found):
        read_text(path, 100)


def test_a_fifo_a_folder_and_a_device_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")  # to read it would wait for ever
    with pytest.raises(CalibrationError, match=r"pipe.txt is no regular file"):
        read_text(tmp_path / "pipe.txt")
    with pytest.raises(CalibrationError, match="is a folder"):
        read_text(tmp_path)
    with pytest.raises(CalibrationError, match="/dev/zero is no regular file"):
        read_text("/dev/zero")
    with pytest.raises(CalibrationError, match=r"'a\\x00b' cannot be read: no file has such a name"):
        read_text("a\0b")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a b", "'a b'"), ("\x1b[2J\n", r"'\x1b[2J\n'"), ("x" * 70, "'" + "x" * 57 + "...'"), ("\ud800", r"'\ud800'")],
)
def test_texts_of_others_are_shown_without_what_a_terminal_obeys(text: str, shown: str) -> None:
    assert printable(text) == shown
