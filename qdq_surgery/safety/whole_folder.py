"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qdq_surgery.errors import ModelError

__all__ = ["check_new", "whole_folder"]


def check_new(folder: str | Path) -> None:
    """Whether a folder can be made there.

    Raises:
        ModelError: There is a file, a link, a mount point, the working folder, or a folder that is not empty.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ModelError(f"{folder} exists and is not empty; give a new folder")
    # What is written takes the place of an empty folder, which these cannot leave.
    if path.is_symlink() or os.path.ismount(path) or path.resolve() == Path.cwd():
        raise ModelError(
            f"{folder} is a link, a mount point or the working folder; give a new folder, such as one in it"
        )


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A place beside ``folder`` for a draft, which becomes it when the block ends, and is gone if the block raises.

    Raises:
        ModelError: The folder exists and is not empty, or cannot be written. (What the block raises stays what it is.)
    """
    check_new(folder)
    path = Path(folder)
    missing = [each for each in path.parents if not each.exists()]
    with ExitStack() as stack:
        with _in_words(folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Removed last, if they are empty: where the block raised.
            stack.callback(_remove_empty, missing)
            drafts = tempfile.TemporaryDirectory(dir=path.parent, prefix=".qdq-surgery-")
        draft = Path(stack.enter_context(drafts)) / "model"
        yield draft
        with _in_words(folder):
            if path.exists():
                path.rmdir()
            draft.rename(path)


@contextmanager
def _in_words(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {error.strerror or error}") from error


def _remove_empty(folders: list[Path]) -> None:
    for each in folders:  # the innermost first
        with contextlib.suppress(OSError):
            each.rmdir()
