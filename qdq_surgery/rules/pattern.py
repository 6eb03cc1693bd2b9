"""Patterns over operators, such as ``add(local=maybe(dropout)(linear(_)), residual)``.

A pattern is a small expression that is read and never evaluated:

- ``matmul(a, b)``: the operator, with its tensor operands in order; operands left out at the end may be anything.
- ``_``: anything.
- ``q``: anything, captured as ``q``. ``k=transpose(_)`` captures an operand that must itself fit a pattern. What is
  captured is the *operand*: a quantizer goes between it and the operator around it.
- ``maybe(dropout)(x)``: at most one dropout, then ``x``; ``maybe(mul, div)(x)``: at most one of these.
- ``add`` and ``mul`` fit with their two operands in either order. The sum with a parameter is a ``bias_add``. A
  ``residual_add`` is an ``add`` of two activations that have the shape of the layer's hidden states.

Layout operators (view, permute, contiguous, dtype casts...) between two operators are looked through, unless the
pattern names them. ``transpose`` is the matrix transpose: it swaps the last two axes; other swaps are layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from qdq_surgery.errors import RuleFileError
from qdq_surgery.rules.pattern_text import PatternRefusal, Span, scan

__all__ = [
    "ACTIVATIONS",
    "COMMUTATIVE",
    "LAYOUT",
    "OPERATORS",
    "RESIDUAL_ADD",
    "Operand",
    "Pattern",
    "operator_fits",
    "parse_pattern",
]

#: Operators that are the members of the pattern operator ``activation``.
ACTIVATIONS = frozenset({"gelu", "relu", "tanh", "silu", "sigmoid", "activation"})

#: Operators that move or cast elements without changing their values; patterns look through them.
LAYOUT = frozenset(
    """
    view reshape permute contiguous expand flatten unflatten squeeze unsqueeze select chunk split unbind cast identity
    clone repeat detach
    """.split()
)

#: Operators whose two operands may stand in either order.
COMMUTATIVE = frozenset({"add", "mul"})

#: Every operator name that a pattern may use.
OPERATORS = (
    frozenset(
        """
        linear conv1d matmul baddbmm einsum sdpa add residual_add bias_add sub mul div softmax dropout layer_norm
        embedding transpose gather masked_fill where cat mean sum sqrt pow neg exp clamp sin cos quantizer
        """.split()
    )
    | ACTIVATIONS
    | LAYOUT
)

#: An ``add`` that is told by its operands' shape.
RESIDUAL_ADD = "residual_add"

_MAX_TEXT = 500


def operator_fits(wanted: str, found: str) -> bool:
    """Whether a node of operator ``found`` serves where a pattern names ``wanted``."""
    return wanted == found or (wanted == "activation" and found in ACTIVATIONS)


@dataclass(frozen=True)
class Operand:
    """One operand of a pattern: what it must be (``None``: anything), and the name to capture it under."""

    pattern: Pattern | None = None
    capture: str | None = None

    def __str__(self) -> str:
        return _text([self])


@dataclass(frozen=True)
class Pattern:
    """An operator with its operands.

    Attributes:
        operators: The operator names that fit; more than one only in an optional pattern.
        optional: Whether the node may be missing; then it has exactly one operand.
    """

    operators: tuple[str, ...]
    operands: tuple[Operand, ...] = field(default=())
    optional: bool = False

    def captures(self) -> tuple[str, ...]:
        """Names captured, in the order in which they are written."""
        found: list[str] = []
        waiting = [*reversed(self.operands)]
        while waiting:
            operand = waiting.pop()
            if operand.capture is not None:
                found.append(operand.capture)
            if operand.pattern is not None:
                waiting += reversed(operand.pattern.operands)
        return tuple(found)

    def __str__(self) -> str:
        return _text([Operand(self)])


def _text(waiting: list[Operand | str]) -> str:
    """The operands and pieces of text in ``waiting``, one after the other."""
    found: list[str] = []
    waiting.reverse()
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            found.append(each)
            continue
        if each.pattern is None:
            found.append(each.capture or "_")
            continue
        head = ", ".join(each.pattern.operators)
        name = "" if each.capture is None else f"{each.capture}="
        found.append(f"{name}maybe({head})(" if each.pattern.optional else f"{name}{head}(")
        commas = [", "] * (2 * len(each.pattern.operands) - 1)
        pieces: list[Operand | str] = [*commas]
        pieces[::2] = each.pattern.operands
        waiting += reversed([*pieces, ")"])
    return "".join(found)


_EXAMPLE = "write an operator with its operands, for example linear(x, w)"
_MAYBE = "write maybe(dropout)(x)"


@lru_cache(maxsize=256)
def parse_pattern(text: str) -> Pattern:
    """Read a pattern; the same text is read once.

    Raises:
        RuleFileError: The text is no pattern. Its ``column`` is the 1-based column within ``text``.
    """
    try:
        if len(text) > _MAX_TEXT:
            raise PatternRefusal(f"the pattern has {len(text)} characters", f"write at most {_MAX_TEXT}")
        pattern = _Reader(text).read()
        if pattern.optional:
            raise PatternRefusal(
                "the outermost operator of a pattern cannot be optional", "name an operator around maybe(...)"
            )
        captures = pattern.captures()
        for name in captures:
            if captures.count(name) > 1:
                raise PatternRefusal(f"'{name}' is captured twice", "use each capture name once")
        return pattern
    except PatternRefusal as refusal:
        raise RuleFileError(
            f"{refusal.found} in the pattern '{text[:80]}'", refusal.fix, column=refusal.column + 1
        ) from None


@dataclass
class _Call:
    """An operator whose operands are being read.

    Attributes:
        start: Where it stands in the text.
        capture: The name under which it is captured.
        left: Operands that are not read yet, the next one last.
    """

    operators: tuple[str, ...]
    optional: bool
    start: int
    capture: str | None
    left: list[Span]
    operands: list[Operand] = field(default_factory=list)

    def close(self) -> Operand:
        if self.optional and len(self.operands) != 1:
            found = f"maybe(...) takes one operand, found {len(self.operands)}"
            raise PatternRefusal(found, _MAYBE, self.start)
        if self.optional and self.operands[0].capture is not None:
            raise PatternRefusal(
                "a capture directly inside maybe(...)(...) has no operator of its own when the node is missing",
                "capture the operand around it: name=maybe(dropout)(_)",
                self.start,
            )
        return Operand(Pattern(self.operators, tuple(self.operands), self.optional), self.capture)


class _Reader:
    """Reads a pattern from its outermost operator inwards, with a list of what is open in place of recursion."""

    def __init__(self, text: str) -> None:
        self.text = text

    def read(self) -> Pattern:
        opened = [self._call(_bare(scan(self.text)), None)]
        while True:
            if opened[-1].left:
                made = self._operand(opened[-1].left.pop())
                if isinstance(made, _Call):
                    opened.append(made)
                else:
                    opened[-1].operands.append(made)
                continue
            closed = opened.pop().close()
            if not opened:
                assert closed.pattern is not None
                return closed.pattern
            opened[-1].operands.append(closed)

    def _operand(self, span: Span) -> Operand | _Call:
        """An operand that holds no other, or the call that it is."""
        span, capture = _bare(span), None
        if len(span) > 2 and span[1].text == "=" and (name := span[0].name()) is not None:
            _check_capture(name, span[0].start)
            span, capture = _bare(span.part(2, len(span))), name
        name = span[0].name() if len(span) == 1 else None
        if name is None:
            return self._call(span, capture)
        if name == "_":
            return Operand(capture=capture)
        if capture is not None:
            raise PatternRefusal(f"'{capture}={name}' names one operand twice", f"write {capture} alone", span[0].start)
        _check_capture(name, span[0].start)
        return Operand(capture=name)

    def _call(self, span: Span, capture: str | None) -> _Call:
        if not span.ends_in_call():
            raise PatternRefusal(f"found {self._quote(span)} where an operator is wanted", _EXAMPLE, span[0].start)
        called, start = span.before(), span[0].start
        if called.ends_in_call():
            return _Call(self._optional(called), True, start, capture, _operands(span))
        name = called[0].name() if len(called) == 1 else None
        if name is None:
            raise PatternRefusal(f"found {self._quote(called)} as an operator", "write its plain name", start)
        if name == "maybe":
            raise PatternRefusal("maybe(...) has no operand", _MAYBE, start)
        return _Call((_operator(name, start),), False, start, capture, _operands(span))

    def _optional(self, span: Span) -> tuple[str, ...]:
        """The operators of ``maybe(...)``."""
        start = span[0].start
        if len(span.before()) != 1 or span[0].name() != "maybe":
            raise PatternRefusal("only maybe(...) may be called twice", _MAYBE, start)
        pieces = _without_double_star(span.inside().pieces(), "write operator names")
        if not pieces:
            raise PatternRefusal("maybe(...) names no operator", _MAYBE, start)
        return tuple(self._optional_operator(_bare(piece)) for piece in pieces)

    def _optional_operator(self, span: Span) -> str:
        name = span[0].name() if len(span) == 1 else None
        if name is None:
            raise PatternRefusal(f"found {self._quote(span)} inside maybe(...)", "write operator names", span[0].start)
        return _operator(name, span[0].start)

    def _quote(self, span: Span) -> str:
        text = self.text[span[0].start : span[-1].end]
        # The pattern itself is quoted beside it: more than some words of it is no help.
        return f"'{text if len(text) <= 40 else text[:37] + '...' if len(text) <= 200 else '...'}'"


def _bare(span: Span) -> Span:
    """``span`` without the brackets around it."""
    while span.is_bracketed():
        span = span.part(1, len(span) - 1)
    return span


def _operands(span: Span) -> list[Span]:
    return _without_double_star(span.inside().pieces(), "write each operand")[::-1]


def _without_double_star(pieces: list[Span], fix: str) -> list[Span]:
    for piece in pieces:
        if piece[0].text == "**":
            raise PatternRefusal("found **", fix, piece[1].start if len(piece) > 1 else piece[0].end)
    return pieces


def _check_capture(name: str, start: int) -> None:
    if name in OPERATORS or name in ("maybe", "_"):
        what = "'_' is no name" if name == "_" else f"'{name}' is an operator, here used as a capture"
        raise PatternRefusal(what, "write another name, or the operator with its operands", start)


def _operator(name: str, start: int) -> str:
    if name not in OPERATORS:
        raise PatternRefusal(f"unknown operator '{name}'", f"known: {', '.join(sorted(OPERATORS))}", start)
    return name
