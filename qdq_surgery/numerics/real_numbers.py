"""Numbers that callers give."""

from __future__ import annotations

import numbers

__all__ = ["is_number"]


def is_number(value: object) -> bool:
    """Whether it is a real number: Python's, or one of numpy's."""
    return isinstance(value, numbers.Real)
