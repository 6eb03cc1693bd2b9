"""Data from a stranger: regular files of bounded size, JSON of bounded size and depth, text that is fit to print."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

__all__ = ["open_regular_file", "quoted", "read_json_text", "read_regular_file"]

#: Characters, values and levels of a JSON text.
_MOST_TEXT, _MOST_VALUES, _DEEPEST = 2**24, 10**6, 64
#: How much of a foreign name a message holds, in characters.
_SHOWN = 120
#: What opens and closes a level, and what parts two values. Strings are taken whole: their brackets do not count.
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{}\],]', re.DOTALL)


def quoted(text: object) -> str:
    """A foreign text in quotes, without anything that a terminal would act on, and not too long."""
    shown = repr(str(text))
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 4]}...{shown[0]}"


def open_regular_file(path: str | Path) -> BinaryIO:
    """A regular file, or a link to one, opened for reading.

    A FIFO, a device, a socket or a folder is refused before it is opened: that may wait for ever, or do something.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is no regular file, or the path holds a NUL.
    """
    if "\0" in str(path):
        raise ValueError("its path holds a NUL character")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no regular file")
    # Between the two looks it may have become a FIFO.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is no regular file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular_file(path: str | Path, limit: int) -> bytes:
    """The content of a regular file.

    Args:
        limit: Most bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no regular file, or larger than ``limit``.
    """
    with open_regular_file(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return data


def read_json_text(text: str, *, where: str) -> Any:
    """What a JSON text says; lists and objects are nested 64 deep at most.

    Args:
        where: What it is, as the subject of a message.

    Raises:
        ValueError: It is no JSON, it is too large or too deep, or an object has a key twice; says where.
    """
    if len(text) > _MOST_TEXT:
        raise ValueError(f"{where} has {len(text)} characters of JSON, more than {_MOST_TEXT}")
    _check_size(text, where)
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON that can be read: {error}") from None


def _check_size(text: str, where: str) -> None:
    depth = values = 0
    for found in _TOKENS.finditer(text):
        token = found[0]
        if token in "[{":
            depth += 1
            if depth > _DEEPEST:
                raise ValueError(f"{where} is no JSON that can be read: it is nested deeper than {_DEEPEST} levels")
        elif token in "]}":
            depth -= 1
        values += not token.startswith('"')
        if values > _MOST_VALUES:
            raise ValueError(f"{where} is no JSON that can be read: it has more than {_MOST_VALUES} values")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {quoted(twice)} stands twice")
    return made
