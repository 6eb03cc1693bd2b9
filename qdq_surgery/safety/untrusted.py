"""What a file says, before anything is done with it: read within limits, and asked for by type, with its place.

A checkpoint, a rule file or an exported model is data from a stranger. Its bytes come in here, bounded; what JSON in it
says is an :class:`Item`, which gives its value only as what it is asked for, and otherwise says where it stands.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

__all__ = [
    "DamagedError",
    "Item",
    "open_regular_file",
    "parse_json",
    "quoted",
    "read_json_text",
    "read_regular_file",
]

#: The longest JSON text that is parsed, in characters. The plan of a model of 100 layers takes some 100,000.
_MOST_JSON = 1 << 24

#: The longest text and the most entries that an item may have where its reader sets no limit of its own.
_MOST_TEXT = 1000
_MOST_ENTRIES = 100_000

#: How much of a stranger's text an error quotes.
_QUOTED = 120

#: Values and levels of a JSON text.
_MOST_VALUES, _DEEPEST = 1_000_000, 64

#: What is no bracket of a JSON text, strings whole: their brackets do not count.
_NO_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[^\[\]{}"]+', re.DOTALL)

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
}

#: Without O_NONBLOCK a FIFO that took the file's place in the meantime would block. Not every system has all of these.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"))


class DamagedError(ValueError):
    """A file does not say what it should; the message holds the place and what was found there."""


def quoted(value: object) -> str:
    """``value`` for a message: printable, in quotes if it is a text, and short."""
    if isinstance(value, (list, tuple, dict)):
        return type(value).__name__
    if isinstance(value, int) and abs(value) > 1 << 64:
        return "a number of many digits"
    shown = str(value) if isinstance(value, (int, float, type(None))) else repr(str(value))
    return shown if len(shown) <= _QUOTED else f"{shown[: _QUOTED - 4]}...{shown[0]}"


def open_regular_file(path: str | Path) -> BinaryIO:
    """A regular file, or a link to one, opened for reading.

    A FIFO, a device, a socket or a folder is refused before it is opened: that may wait for ever, or do something.

    Raises:
        OSError: It cannot be opened.
        DamagedError: It is no regular file, or the path holds a NUL.
    """
    if "\0" in str(path):
        raise DamagedError("its path holds a NUL character")
    _regular_size(os.stat(path))
    handle = os.open(path, _FLAGS)
    try:
        _regular_size(os.fstat(handle))  # between the two looks it may have become a FIFO
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular_file(path: str | Path, limit: int) -> bytes:
    """The bytes of a regular file; anything else is refused before it is opened.

    A file whose size is 0 is not opened either: so say the files of ``/proc``, of which some block their reader.

    Args:
        limit: Most bytes.

    Raises:
        OSError: The file cannot be read.
        DamagedError: It is no regular file, or has more bytes. Its text is printable.
    """
    if "\0" not in str(path) and _regular_size(os.stat(path), limit) == 0:
        return b""
    with open_regular_file(path) as file:
        data = file.read(limit + 1)  # one more, to see a file that grows
    if len(data) > limit:
        raise DamagedError(_too_large(len(data), limit))
    return data


def _regular_size(found: os.stat_result, limit: int | None = None) -> int:
    if not stat.S_ISREG(found.st_mode):
        raise DamagedError(f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'a special file')}, no regular file")
    if limit is not None and found.st_size > limit:
        raise DamagedError(_too_large(found.st_size, limit))
    return found.st_size


def _too_large(size: int, limit: int) -> str:
    return f"it has {size} bytes, more than the {limit} that are read"


def read_json_text(text: str | bytes, *, where: str, limit: int = _MOST_JSON) -> Any:
    """What a JSON text says; lists and objects are nested 64 deep at most.

    Args:
        where: What it is, as the subject of a message.
        limit: The most characters that are parsed.

    Raises:
        DamagedError: It is no JSON, it is too large or too deep, or an object has a key twice; says where.
    """
    if len(text) > limit:
        raise DamagedError(f"{where} has {len(text)} characters of JSON, more than {limit}")
    try:
        text = text if isinstance(text, str) else text.decode()
        _check_size(text)
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise DamagedError(f"{where} is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DamagedError(f"{where} is no JSON that can be read: {error.msg} ({place})") from None
    except ValueError as error:
        raise DamagedError(f"{where} is no JSON that can be read: {error}") from None


def _check_size(text: str) -> None:
    if text.count(",") > _MOST_VALUES:
        raise DamagedError(f"it has more than {_MOST_VALUES} values")
    depth = 0
    for bracket in _NO_BRACKET.sub("", text):
        depth += 1 if bracket in "[{" else -1
        if depth > _DEEPEST:
            raise DamagedError(f"it is nested deeper than {_DEEPEST} levels")


def _no_constant(name: str) -> NoReturn:
    raise DamagedError(f"{name} is no number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DamagedError(f"the key {quoted(twice)} stands twice")
    return made


def parse_json(text: str | bytes, where: str, limit: int = _MOST_JSON) -> Item:
    """What a JSON text says, to be asked for by type; as :func:`read_json_text`, for data of several levels."""
    return Item(read_json_text(text, where=where, limit=limit), where)


class Item(NamedTuple):
    """A value of a file and its place."""

    value: Any
    where: str

    def refuse(self, wanted: str) -> NoReturn:
        """Raise the error that says that the value is not what is wanted."""
        raise DamagedError(f"{self.where} is {quoted(self.value)}, wanted {wanted}")

    def fields(self, required: Iterable[str] = (), optional: Iterable[str] = ()) -> dict[str, Item]:
        """The entries of a mapping with known keys; unknown and missing ones are refused."""
        found = self.entries()
        known = {*required, *optional}
        for key in found:
            if key not in known:
                raise DamagedError(f"{self.where} has the unknown key {quoted(key)}, known: {', '.join(sorted(known))}")
        for key in required:
            if key not in found:
                raise DamagedError(f"{self.where} lacks the key '{key}'")
        return found

    def entries(self, most: int = _MOST_ENTRIES) -> dict[str, Item]:
        """The entries of a mapping."""
        if not isinstance(self.value, dict) or len(self.value) > most:
            self.refuse(f"a mapping of at most {most} entries")
        for key in self.value:
            if not isinstance(key, str) or len(key) > _MOST_TEXT:
                raise DamagedError(f"{self.where} has the key {quoted(key)}, wanted a short text")
        return {
            key: Item(value, f"{self.where}.{key if key.isidentifier() else quoted(key)}")
            for key, value in self.value.items()
        }

    def items(self, most: int = _MOST_ENTRIES) -> list[Item]:
        """The entries of a list."""
        if not isinstance(self.value, (list, tuple)) or len(self.value) > most:
            self.refuse(f"a list of at most {most} entries")
        return [Item(value, f"{self.where}[{index}]") for index, value in enumerate(self.value)]

    def text(self, most: int = _MOST_TEXT, pattern: re.Pattern[str] | None = None, wanted: str = "a text") -> str:
        """A printable text."""
        value = self.value
        if not isinstance(value, str) or len(value) > most or not value.isprintable():
            self.refuse(f"{wanted} of at most {most} printable characters")
        if pattern is not None and pattern.fullmatch(value) is None:
            self.refuse(wanted)
        return value

    def lines(self, most: int = _MOST_TEXT) -> str:
        """A text of one line or more, without control characters."""
        value = self.value
        if not isinstance(value, str) or len(value) > most or not value.replace("\n", " ").isprintable():
            self.refuse(f"a text of at most {most} printable characters")
        return value

    def one_of(self, choices: Collection[Any]) -> Any:
        """One of the values that there may be, of the very type."""
        value = self.value
        for choice in choices:
            if type(choice) is type(value) and choice == value:
                return choice
        self.refuse(f"one of {', '.join(map(str, sorted(choices, key=str)))}")

    def integer(self, low: int, high: int) -> int:
        """A whole number within bounds."""
        value = self.value
        if type(value) is not int or not low <= value <= high:
            self.refuse(f"a whole number from {low} to {high}")
        return value

    def number(self, low: float, high: float) -> float:
        """A number within bounds."""
        value = self.value
        if type(value) not in (int, float) or not low <= value <= high:
            self.refuse(f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            self.refuse("true or false")
        return self.value
