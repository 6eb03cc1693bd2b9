"""Paths that callers give."""

from __future__ import annotations

import os
from pathlib import Path

from qdq_surgery.errors import OptionError

__all__ = ["given_path"]


def given_path(path: object, what: str) -> Path:
    """``path`` as a path, whether or not anything is there.

    Args:
        what: What it is the path of, for the message.

    Raises:
        OptionError: It is no text and no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError(f"found a {type(path).__name__}, wanted the path of {what}: a str or a pathlib.Path")
    return Path(path)
