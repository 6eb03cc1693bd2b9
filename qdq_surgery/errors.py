"""The exceptions: each message says where, what was found and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = [
    "AlreadyConvertedError",
    "AttentionBypassError",
    "CalibrationError",
    "ExportError",
    "MatchError",
    "ModelError",
    "OptionError",
    "ParityError",
    "QdqSurgeryError",
    "ReceiptError",
    "RuleFileError",
    "TraceError",
    "printable",
]

#: The longest message; what is longer says little more.
_MAX_MESSAGE = 20_000

#: The longest part of a message about a rule file.
_MAX_PART = 600


def printable(text: str, keep: str = "") -> str:
    """``text`` with every control, format and other invisible character as an escape, except those in ``keep``.

    Names and texts out of files end in terminals and logs, where a control character moves the cursor, a line break
    forges a line and a direction mark turns the text around.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode()
        for letter in text
    )


class QdqSurgeryError(Exception):
    """Base of every error that a user's input can cause. Its message is printable and of a bounded length."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_shown(arg) if isinstance(arg, str) else arg for arg in args))


def _shown(message: str) -> str:
    # Texts of ours have lines; whoever quotes a file in one escapes the line breaks of the quotation.
    return _cut(printable(_cut(message, _MAX_MESSAGE), keep="\n"), _MAX_MESSAGE)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


class RuleFileError(QdqSurgeryError):
    """A rule file that cannot be used.

    Attributes:
        found, fix: As they were given; only in the message are they printable and cut.
        path: The rule file, or ``None`` for a rule set built in Python.
        line, column: 1-based position in that file, or ``None`` where the whole file is meant.
    """

    def __init__(
        self,
        found: str,
        fix: str,
        *,
        path: Path | str | None = None,
        line: int | None = None,
        column: int | None = None,
    ) -> None:
        self.found, self.fix = found, fix
        self.path, self.line, self.column = path, line, column
        place = "" if path is None else str(path)
        if line is not None:
            place += f":{line}"
            if column is not None:
                place += f":{column}"
        super().__init__(f"{printable(place) + ': ' if place else ''}{_part(found)}; {_part(fix)}")

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is pickled by its message alone, which does not make one of these again.
        return _again, (self.found, self.fix, self.path, self.line, self.column)


def _again(found: str, fix: str, path: Path | str | None, line: int | None, column: int | None) -> RuleFileError:
    return RuleFileError(found, fix, path=path, line=line, column=column)


def _part(text: str) -> str:
    # What a user wrote may be a megabyte long, and it is quoted: a line break in it is not one of ours.
    return _cut(printable(_cut(text, _MAX_PART)), _MAX_PART)


class MatchError(QdqSurgeryError):
    """The rules do not fit the model: a rule, an exclusion or an expected count is off."""


class TraceError(QdqSurgeryError):
    """A block's forward does something that a graph cannot hold."""


class ModelError(QdqSurgeryError):
    """The model given cannot be converted, or is not what the call needs."""


class OptionError(QdqSurgeryError, ValueError):
    """An option has a value that it cannot have, or goes with another one that is not there."""


class AlreadyConvertedError(ModelError):
    """The model holds quantizers already."""


class AttentionBypassError(QdqSurgeryError):
    """The attention implementation was switched, so that the quantizers would not run."""


class CalibrationError(QdqSurgeryError):
    """Ranges cannot be found from the data, or a quantizer has none where one is needed."""


class NegativeValueError(CalibrationError, TypeError):
    """What is quantized to an unsigned grid without a zero point has negative values (pytorch-quantization's error)."""


class ExportError(QdqSurgeryError):
    """A file for deployment cannot be written, or is not what it should be."""


class ParityError(ExportError):
    """A file computes something else than the model that it was exported from."""


class ReceiptError(ExportError):
    """A runtime runs less of a file in INT8 than was asked for, or leaves more Q/DQ over."""


class LossError(QdqSurgeryError):
    """A model loses more against float than was asked for."""
