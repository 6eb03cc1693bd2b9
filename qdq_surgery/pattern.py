"""Patterns over operators, such as ``add(local=maybe(dropout)(linear(_)), residual)``.

A pattern is a small expression that is read with :func:`ast.parse` and never evaluated:

- ``matmul(a, b)``: the operator, with its tensor operands in order; operands left out at the end may be anything.
- ``_``: anything.
- ``q``: anything, captured as ``q``. ``k=transpose(_)`` captures an operand that must itself fit a pattern. What is
  captured is the *operand*: a quantizer goes between it and the operator around it.
- ``maybe(dropout)(x)``: at most one dropout, then ``x``; ``maybe(mul, div)(x)``: at most one of these.
- ``add`` and ``mul`` fit with their two operands in either order. The sum with a parameter is a ``bias_add``.

Layout operators (view, permute, contiguous, dtype casts...) between two operators are looked through, unless the
pattern names them. ``transpose`` is the matrix transpose: it swaps the last two axes; other swaps are layout.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

from qdq_surgery.errors import RuleFileError

__all__ = ["ACTIVATIONS", "COMMUTATIVE", "LAYOUT", "OPERATORS", "Operand", "Pattern", "operator_fits", "parse_pattern"]

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
        linear conv1d matmul baddbmm einsum sdpa add bias_add sub mul div softmax dropout layer_norm embedding transpose
        gather masked_fill where cat mean sum sqrt pow neg exp clamp sin cos quantizer
        """.split()
    )
    | ACTIVATIONS
    | LAYOUT
)

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
        if self.pattern is None:
            return self.capture or "_"
        return str(self.pattern) if self.capture is None else f"{self.capture}={self.pattern}"


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
        return tuple(self._captures())

    def _captures(self) -> Iterator[str]:
        for operand in self.operands:
            if operand.capture is not None:
                yield operand.capture
            if operand.pattern is not None:
                yield from operand.pattern._captures()

    def __str__(self) -> str:
        head = ", ".join(self.operators)
        return f"{f'maybe({head})' if self.optional else head}({', '.join(map(str, self.operands))})"


class _Refusal(Exception):
    """What is wrong with a pattern and where; column counts bytes of what Python was given, from 0."""

    def __init__(self, found: str, fix: str, column: int = 0) -> None:
        super().__init__(found)
        self.found, self.fix, self.column = found, fix, column


def parse_pattern(text: str) -> Pattern:
    """Read a pattern.

    Raises:
        RuleFileError: The text is no pattern. Its ``column`` is the 1-based column within ``text``.
    """
    try:
        if len(text) > _MAX_TEXT:
            raise _Refusal(f"the pattern has {len(text)} characters", f"write at most {_MAX_TEXT}")
        pattern = _read_call(_parse(text))
        if pattern.optional:
            raise _Refusal(
                "the outermost operator of a pattern cannot be optional", "name an operator around maybe(...)"
            )
        captures = pattern.captures()
        for name in captures:
            if captures.count(name) > 1:
                raise _Refusal(f"'{name}' is captured twice", "use each capture name once")
        return pattern
    except _Refusal as refusal:
        raise RuleFileError(
            f"{refusal.found} in the pattern '{text[:80]}'", refusal.fix, column=_column(text, refusal.column)
        ) from None


def _parse(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's advice on literals that no pattern has
            return ast.parse(_as_python(text), mode="eval").body
    except SyntaxError as error:
        # A SyntaxError counts characters, a node counts bytes.
        before = _as_python(text)[: (error.offset or 1) - 1]
        message = (error.msg or "").replace(":=", "=")
        raise _Refusal(
            f"pattern syntax: {message}",
            "write for example add(local=linear(_), residual)",
            len(before.encode(errors="surrogatepass")),
        ) from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise _Refusal(f"pattern syntax: {error}", "write for example linear(x, w)") from None


def _as_python(text: str) -> str:
    # In Python a positional argument may not follow a named one, in a pattern it may: ``f(a=x, b)`` is read as
    # ``f(a:=x, b)``, which is the same tree in the order in which it is written. A pattern is one line.
    return re.sub(r"[\r\n]", " ", text).replace("=", ":=")


def _column(text: str, offset: int) -> int:
    """The 1-based column within ``text`` of the byte ``offset`` of what Python was given."""
    before = _as_python(text).encode(errors="surrogatepass")[:offset].decode(errors="ignore")
    return len(before) - before.count(":=") + 1


def _read_call(node: ast.expr) -> Pattern:
    if not isinstance(node, ast.Call):
        raise _Refusal(
            f"found {_describe(node)} where an operator is wanted",
            "write an operator with its operands, for example linear(x, w)",
            node.col_offset,
        )
    if isinstance(node.func, ast.Call):
        return _read_maybe(node)
    if not isinstance(node.func, ast.Name):
        raise _Refusal(f"found {_describe(node.func)} as an operator", "write its plain name", node.func.col_offset)
    if node.func.id == "maybe":
        raise _Refusal("maybe(...) has no operand", "write maybe(dropout)(x)", node.col_offset)
    return Pattern((_operator(node.func),), _operands(node))


def _read_maybe(node: ast.Call) -> Pattern:
    maybe = node.func
    assert isinstance(maybe, ast.Call)
    if not (isinstance(maybe.func, ast.Name) and maybe.func.id == "maybe"):
        raise _Refusal("only maybe(...) may be called twice", "write maybe(dropout)(x)", node.col_offset)
    if maybe.keywords:
        raise _Refusal("found **", "write operator names", maybe.keywords[0].value.col_offset)
    if not maybe.args:
        raise _Refusal("maybe(...) names no operator", "write maybe(dropout)(x)", maybe.col_offset)
    names = []
    for argument in maybe.args:
        if not isinstance(argument, ast.Name):
            raise _Refusal(
                f"found {_describe(argument)} inside maybe(...)", "write operator names", argument.col_offset
            )
        names.append(_operator(argument))
    operands = _operands(node)
    if len(operands) != 1:
        raise _Refusal(
            f"maybe(...) takes one operand, found {len(operands)}", "write maybe(dropout)(x)", node.col_offset
        )
    if operands[0].capture is not None:
        raise _Refusal(
            "a capture directly inside maybe(...)(...) has no operator of its own when the node is missing",
            "capture the operand around it: name=maybe(dropout)(_)",
            node.col_offset,
        )
    return Pattern(tuple(names), operands, optional=True)


def _operands(node: ast.Call) -> tuple[Operand, ...]:
    if node.keywords:
        raise _Refusal("found **", "write each operand", node.keywords[0].value.col_offset)
    return tuple(_operand(argument, None) for argument in node.args)


def _operand(node: ast.expr, capture: str | None) -> Operand:
    if isinstance(node, ast.NamedExpr) and capture is None:
        _check_capture(node.target)
        return _operand(node.value, node.target.id)
    if isinstance(node, ast.Name):
        if node.id == "_":
            return Operand(capture=capture)
        if capture is not None:
            raise _Refusal(f"'{capture}={node.id}' names one operand twice", f"write {capture} alone", node.col_offset)
        _check_capture(node)
        return Operand(capture=node.id)
    return Operand(_read_call(node), capture)


def _check_capture(node: ast.Name) -> None:
    if node.id in OPERATORS or node.id in ("maybe", "_"):
        what = "'_' is no name" if node.id == "_" else f"'{node.id}' is an operator, here used as a capture"
        raise _Refusal(what, "write another name, or the operator with its operands", node.col_offset)


def _operator(node: ast.Name) -> str:
    if node.id not in OPERATORS:
        raise _Refusal(f"unknown operator '{node.id}'", f"known: {', '.join(sorted(OPERATORS))}", node.col_offset)
    return node.id


def _describe(node: ast.expr) -> str:
    try:
        text = ast.unparse(node).replace(":=", "=")
    except (RecursionError, ValueError):
        text = "..."
    return f"'{text if len(text) <= 40 else text[:37] + '...'}'"
