"""Numbers that callers give."""

from __future__ import annotations

import numbers

__all__ = ["is_number", "is_whole"]


def is_number(value: object) -> bool:
    """Whether it is a real number: Python's, or one of numpy's."""
    return isinstance(value, numbers.Real)


def is_whole(value: object) -> bool:
    """Whether it is a whole number: Python's, or one of numpy's, and no truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
