"""What takes long to make is made once for all workers of a run, and kept on disk until it ends."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

__all__ = ["begin", "end", "kept"]

_VARIABLE = "QDQ_SURGERY_TESTS_KEPT"

_T = TypeVar("_T")


def begin() -> None:
    """A folder for this run. The process that starts the workers calls this: they inherit it."""
    os.environ[_VARIABLE] = tempfile.mkdtemp(prefix="qdq-surgery-tests-")


def end() -> None:
    """The end of :func:`begin`."""
    shutil.rmtree(os.environ.pop(_VARIABLE), ignore_errors=True)


def kept(make: Callable[[Path], _T], *key: object) -> _T:
    """A new copy of what ``make`` gave when it was first asked for with this key, by whichever worker.

    Args:
        make: Is given a folder for its files, which stay where they are. What it gives is pickled.
        key: Tells it from all others, by its ``repr``.
    """
    folder = Path(os.environ[_VARIABLE], hashlib.sha256(repr(key).encode()).hexdigest()[:24])
    with FileLock(f"{folder}.lock"):
        if not folder.with_suffix(".pickle").exists():
            folder.mkdir()
            try:
                made = pickle.dumps(make(folder))
            except BaseException:
                shutil.rmtree(folder)
                raise
            folder.with_suffix(".pickle").write_bytes(made)
        found: _T = pickle.loads(folder.with_suffix(".pickle").read_bytes())
    return found
