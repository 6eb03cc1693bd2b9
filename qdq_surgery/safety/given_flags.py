"""Flags that callers give."""

from __future__ import annotations

import numpy as np

from qdq_surgery.errors import OptionError

__all__ = ["check_flags"]


def check_flags(**given: object) -> None:
    """Whether each is true or false: to Python ``"no"`` is true.

    Raises:
        OptionError: One is something else.
    """
    for name, value in given.items():
        if not isinstance(value, (bool, np.bool_)):
            raise OptionError(f"{name}={value!r} is neither true nor false; give True or False")
