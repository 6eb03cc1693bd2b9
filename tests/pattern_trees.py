"""Patterns of any shape, for property tests."""

from __future__ import annotations

from collections.abc import Iterator
from keyword import iskeyword

from hypothesis import settings
from hypothesis import strategies as st

from qdq_surgery.rules.pattern import OPERATORS, Operand, Pattern

PROPERTY = settings(max_examples=150, database=None)

ANYTHING = Operand()

NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True).filter(
    lambda name: name not in OPERATORS and name != "maybe" and not iskeyword(name)
)
OPERATOR_NAMES = st.sampled_from(sorted(OPERATORS))


def _draw_operand(draw: st.DrawFn, names: Iterator[str], depth: int, *, capturing: bool) -> Operand:
    forms = ["anything", "operator", "maybe"] if depth else ["anything"]
    form = draw(st.sampled_from([*forms, "capture"] if capturing else forms))
    if form == "capture":
        return Operand(capture=next(names))
    if form == "anything":
        return ANYTHING
    capture = next(names) if capturing and draw(st.booleans()) else None
    if form == "operator":
        return Operand(_draw_call(draw, names, depth - 1), capture)
    operators = tuple(draw(st.lists(OPERATOR_NAMES, min_size=1, max_size=3)))
    return Operand(
        Pattern(operators, (_draw_operand(draw, names, depth - 1, capturing=False),), optional=True), capture
    )


def _draw_call(draw: st.DrawFn, names: Iterator[str], depth: int) -> Pattern:
    count = draw(st.integers(0, 3))
    operands = tuple(_draw_operand(draw, names, depth, capturing=True) for _ in range(count))
    return Pattern((draw(OPERATOR_NAMES),), operands)


@st.composite
def trees(draw: st.DrawFn) -> Pattern:
    """A pattern tree of at most four levels; at most 81 operands, so 81 names are enough."""
    names = draw(st.lists(NAMES, unique=True, min_size=4, max_size=8))
    spare = (f"spare{index}" for index in range(200))
    return _draw_call(draw, iter([*(name for name in names if not name.startswith("spare")), *spare]), 3)
