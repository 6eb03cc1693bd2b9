"""The exceptions: each message says where, what was found and what to do."""

from __future__ import annotations

from pathlib import Path

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
]


class QdqSurgeryError(Exception):
    """Base of every error that a user's input can cause."""


class RuleFileError(QdqSurgeryError):
    """A rule file that cannot be used.

    Attributes:
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
        super().__init__(f"{place + ': ' if place else ''}{_short(found)}; {_short(fix)}")


def _short(text: str) -> str:
    # What a user wrote may be a megabyte long.
    return text if len(text) <= 600 else f"{text[:597]}..."


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


class ExportError(QdqSurgeryError):
    """A file for deployment cannot be written, or is not what it should be."""


class ParityError(ExportError):
    """A file computes something else than the model that it was exported from."""


class ReceiptError(ExportError):
    """A runtime runs less of a file in INT8 than was asked for, or leaves more Q/DQ over."""
