"""Reading a text file as a whole, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path

from tasks.errors import TaskFileError

__all__ = ["read_text"]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        TaskFileError: There is no such file, or it is no UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise TaskFileError(path, line, "a byte that is no UTF-8", "save the file as UTF-8") from error
    except OSError as error:
        raise TaskFileError(path, None, error.strerror or str(error), "give a file that can be read") from error
