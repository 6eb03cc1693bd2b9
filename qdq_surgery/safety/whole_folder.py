"""A folder that appears whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdq_surgery.errors import ModelError

__all__ = ["check_new", "whole_folder"]


def check_new(folder: str | Path) -> None:
    """Whether a model can be written there.

    Raises:
        ModelError: The folder exists and is not empty.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ModelError(f"{folder} exists and is not empty; give a new folder")


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A place beside ``folder`` for a draft, which becomes it when the block ends, and is gone if the block raises.

    Raises:
        ModelError: The folder exists and is not empty, or cannot be written.
    """
    check_new(folder)
    path = Path(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".qdq-surgery-") as temporary:
            draft = Path(temporary) / "model"
            yield draft
            if path.exists():
                path.rmdir()
            draft.rename(path)
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {error.strerror or error}") from error
