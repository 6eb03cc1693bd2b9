"""The file appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdq_surgery.errors import ExportError

__all__ = ["DATA_SUFFIX", "LARGEST", "draft", "writable"]

#: Where protobuf ends: from here on, weights stand in a file beside the graph.
LARGEST = 2**31 - 2**24
DATA_SUFFIX = ".data"


def writable(path: str | Path) -> Path:
    """``path``, if a file can be written there.

    Raises:
        ExportError: Its folder does not exist or cannot be written to, or it is a folder itself.
    """
    file = Path(path)
    if file.is_dir():
        raise ExportError(f"{path} is a folder; give the name of a file, such as {Path(path) / 'model.onnx'}")
    if not file.parent.is_dir():
        raise ExportError(f"{path} cannot be written: there is no folder {file.parent}; make it first")
    if not os.access(file.parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise ExportError(f"{path} cannot be written: permission denied; give another path")
    return file


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A file of the same name in a folder beside ``path``, which takes its place if all goes well.

    Raises:
        ExportError: The disk is full, or whatever else the system says.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".qdq-surgery-") as temporary:
            file = Path(temporary) / path.name
            yield file
            data, old = Path(f"{file}{DATA_SUFFIX}"), Path(f"{path}{DATA_SUFFIX}")
            stale = path.exists() and old.exists() and not data.exists()
            if data.exists():
                data.replace(old)
            file.replace(path)
            if stale:  # the data of the file that was replaced
                old.unlink()
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error
