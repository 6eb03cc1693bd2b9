"""What a user of the run scripts can get wrong, said with place, finding and remedy."""

from __future__ import annotations

from pathlib import Path

from qdq_surgery.errors import QdqSurgeryError

__all__ = ["OptionError", "TaskFileError"]


class TaskFileError(QdqSurgeryError):
    """A file of questions, sentences or tags that cannot be used.

    Attributes:
        path: The file.
        line: 1-based, or ``None`` where the whole file is meant.
    """

    def __init__(self, path: Path, line: int | None, found: str, fix: str) -> None:
        self.path, self.line = path, line
        place = str(path) if line is None else f"{path}:{line}"
        super().__init__(f"{place}: {found}; {fix}")


class OptionError(QdqSurgeryError):
    """Options that do not go together, or do not fit the model or the data."""
