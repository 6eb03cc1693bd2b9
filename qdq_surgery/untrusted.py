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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qdq_surgery.errors import printable

__all__ = ["DamagedError", "Item", "parse_json", "quoted", "read_regular_file"]

#: The longest JSON text that is parsed, in characters. The plan of a model of 100 layers takes some 100,000.
_MOST_JSON = 1 << 22

#: The longest text and the most entries that an item may have where its reader sets no limit of its own.
_MOST_TEXT = 1000
_MOST_ENTRIES = 100_000

#: How much of a stranger's text an error quotes.
_QUOTED = 80


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
    text = ascii(value) if not isinstance(value, (list, dict)) else type(value).__name__
    return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 3]}..."


def read_regular_file(path: str | Path, limit: int) -> bytes:
    """The bytes of a regular file; anything else is refused before it is opened.

    A file whose size is 0 is not opened either: so say the files of ``/proc``, of which some block their reader.

    Args:
        limit: Most bytes.

    Raises:
        OSError: The file cannot be read.
        DamagedError: It is no regular file, or has more bytes. Its text is printable.
    """
    if _regular_size(os.stat(path), limit) == 0:
        return b""
    descriptor = os.open(path, _FLAGS)
    try:
        _regular_size(os.fstat(descriptor), limit)
        return _read(descriptor, limit)
    finally:
        os.close(descriptor)


def _regular_size(found: os.stat_result, limit: int) -> int:
    if not stat.S_ISREG(found.st_mode):
        raise DamagedError(f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'a special file')}, no regular file")
    if found.st_size > limit:
        raise DamagedError(_too_large(found.st_size, limit))
    return found.st_size


def _read(descriptor: int, limit: int) -> bytes:
    parts, left = [], limit + 1  # one more, to see a file that grows
    while left > 0 and (part := os.read(descriptor, left)):
        parts.append(part)
        left -= len(part)
    if left <= 0:
        raise DamagedError(_too_large(limit + 1, limit))
    return b"".join(parts)


def _too_large(size: int, limit: int) -> str:
    return printable(f"it has {size} bytes, more than the {limit} that are read")


def parse_json(text: str | bytes, where: str, limit: int = _MOST_JSON) -> Item:
    """What a JSON text says.

    Args:
        where: What the text is, for messages.
        limit: The most characters that are parsed.

    Raises:
        DamagedError: It is no JSON, or too long or too deep.
    """
    if len(text) > limit:
        raise DamagedError(f"{where} has {len(text)} characters, more than {limit}")
    try:
        return Item(json.loads(text), where)
    except UnicodeDecodeError as error:
        raise DamagedError(f"{where} is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise DamagedError(f"{where} is nested too deep") from None
    except json.JSONDecodeError as error:
        raise DamagedError(f"{where}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise DamagedError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Item:
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
