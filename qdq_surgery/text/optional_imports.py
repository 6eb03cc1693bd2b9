"""Packages that only some need: imported when they are, with a word on how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType

from qdq_surgery.errors import ModelError

__all__ = ["require"]


def require(package: str, what: str, extra: str = "onnx") -> ModuleType:
    """The module of ``package``.

    Args:
        what: What needs it, as a message's subject.
        extra: Which extra of this package has it.

    Raises:
        ModelError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModelError(
            f"{what} needs {package}, which is not installed; pip install 'qdq-surgery[{extra}]'"
        ) from None
