"""Imports pytorch-quantization without what it does to logging: its import puts absl's handler on the root logger.

With that handler there, a ``logging.basicConfig`` of the user's does nothing. This is the first import of the package,
so that no other module of it brings pytorch-quantization in.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__: list[str] = []


@contextmanager
def _logging_kept() -> Iterator[None]:
    root = logging.root
    handlers, level, kind = root.handlers[:], root.level, logging.getLoggerClass()
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.setLoggerClass(kind)


with _logging_kept():
    importlib.import_module("pytorch_quantization.nn")
