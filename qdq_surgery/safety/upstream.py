"""Imports pytorch-quantization without what its import does: absl's handler on the root logger, and a warning.

With that handler there, a ``logging.basicConfig`` of the user's does nothing. The warning is torch's, of a function
that pytorch-quantization 2.1.3 scripts; nobody here can do anything about it. This is the first import of the package,
so that no other module of it brings pytorch-quantization in.
"""

from __future__ import annotations

import importlib
import logging
import warnings
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
    importlib.import_module("torch")  # whose own filters, and NumPy's, are to stay
with _logging_kept(), warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"`torch\.jit\.script`")
    importlib.import_module("pytorch_quantization.nn")
