"""Protobuf's wire format, field by field: a file is looked through before anything makes objects of it.

A parser makes objects of hundreds of bytes out of messages of two, and a runtime acts on what it parses. This walks
over a file of any size in constant memory, under a budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

__all__ = ["Field", "Walk"]

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
_LONGEST_VARINT = 10


@dataclass(frozen=True)
class Field:
    """One field of a message.

    Attributes:
        number: As the schema has it.
        value: Of a varint; otherwise 0.
        start, end: Where the bytes of a string, of packed numbers or of a message stand; alike for other kinds.
        nested: Whether it is one of those.
    """

    number: int
    value: int
    start: int
    end: int
    nested: bool


class Walk:
    """Goes over the messages of a file.

    Attributes:
        left: How many fields may still be looked at.
    """

    def __init__(self, file: BinaryIO, most_fields: int) -> None:
        self._file, self.left = file, most_fields

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """The fields of the message between two places. Between two of them, others may be walked over.

        Raises:
            ValueError: This is no protobuf, or the budget is used up.
        """
        at = start
        while at < end:
            self.left -= 1
            if self.left < 0:
                raise ValueError("it has too many fields")
            self._file.seek(at)
            tag, at = self._varint(at, end)
            number, kind = tag >> 3, tag & 7
            value, begin = 0, at
            if number == 0 or kind not in (_VARINT, _EIGHT, _BYTES, _FOUR):
                raise ValueError(f"there is no field at byte {at}")
            if kind == _VARINT:
                value, at = self._varint(at, end)
                begin = at
            elif kind == _BYTES:
                size, begin = self._varint(at, end)
                at = begin + size
            else:
                at = begin = at + (8 if kind == _EIGHT else 4)
            if at > end:
                raise ValueError(f"the field at byte {begin} is cut off")
            yield Field(number, value, begin, at, kind == _BYTES)

    def read(self, field: Field, most: int) -> bytes:
        """The bytes of a field.

        Raises:
            ValueError: They are more than ``most``.
        """
        if field.end - field.start > most:
            raise ValueError(f"the text at byte {field.start} has more than {most} bytes")
        self._file.seek(field.start)
        return self._file.read(field.end - field.start)

    def text(self, field: Field, most: int) -> str:
        """The text of a field; same errors."""
        try:
            return self.read(field, most).decode()
        except UnicodeDecodeError:
            raise ValueError(f"the text at byte {field.start} is no UTF-8") from None

    def packed(self, field: Field) -> list[int]:
        """The varints of a packed field.

        Raises:
            ValueError: They are none, or the budget is used up.
        """
        made: list[int] = []
        at = field.start
        self._file.seek(at)
        while at < field.end:
            self.left -= 1
            if self.left < 0:
                raise ValueError("it has too many fields")
            value, at = self._varint(at, field.end)
            made.append(value)
        return made

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for place in range(_LONGEST_VARINT):
            byte = self._file.read(1) if at + place < end else b""
            if not byte:
                raise ValueError(f"the number at byte {at} is cut off")
            value |= (byte[0] & 0x7F) << (7 * place)
            if byte[0] < 0x80:
                return value, at + place + 1
        raise ValueError(f"the number at byte {at} has no end")
