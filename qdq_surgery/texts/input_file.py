"""A user's file of text, read whole: regular files only, up to a limit, as UTF-8."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from qdq_surgery.errors import CalibrationError

__all__ = ["LARGEST", "printable", "read_lines", "read_text"]

#: Bytes. Ranges need some hundred texts; what is larger was meant for something else.
LARGEST = 256 << 20

_OTHERS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK\x03\x04": "a ZIP archive", b"\x1f\x8b": "gzip"}
_SHOWN = 60


def read_text(path: str | Path, largest: int = LARGEST) -> str:
    """The text of a file, without a byte order mark, its lines ended by line feeds alone.

    Raises:
        CalibrationError: It cannot be read, is no regular file, too large, not UTF-8, or holds a NUL.
    """
    data = _read(path, largest)
    other = next((what for start, what in _OTHERS.items() if data.startswith(start)), None)
    if other is not None:
        raise CalibrationError(f"{path} is {other}, no UTF-8 text; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CalibrationError(f"{path}:{line} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise CalibrationError(f"{path}:{line} holds a NUL character, which no text has; save it as plain UTF-8 text")
    return text


def read_lines(path: str | Path, largest: int = LARGEST) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, without blanks at their ends, each with its number.

    Raises:
        CalibrationError: As for :func:`read_text`.
    """
    lines = read_text(path, largest).split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def printable(text: str) -> str:
    """Somebody's text in quotes for a message: short, on one line, nothing in it that a terminal obeys."""
    shown = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
    return "'" + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown) + "'"


def _read(path: str | Path, largest: int) -> bytes:
    try:
        # Without waiting: to open a FIFO waits for whoever writes to it.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:  # a NUL in the name
        raise CalibrationError(f"{printable(str(path))} cannot be read: no file has such a name") from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise CalibrationError(f"{path} is {what}; give a file with texts")
    with os.fdopen(handle, "rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise CalibrationError(
            f"{path} has {found.st_size} bytes, more than the {largest} that are read; some hundred texts are enough: "
            f"take a sample of it"
        )
    return data
