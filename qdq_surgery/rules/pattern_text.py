"""The text of a pattern, cut into words, signs and brackets that are paired: what its reader walks over.

Nothing here or in the reader calls itself, and nothing is Python's own parser: whether a text is a pattern must not
depend on how deep the stack is, on the version of Python or on the filters of its warnings.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from keyword import iskeyword

__all__ = ["MAX_DEPTH", "PatternRefusal", "Span", "Token", "scan"]

#: How deep brackets may be nested.
MAX_DEPTH = 64

_CLOSING = {"(": ")", "[": "]", "{": "}"}

_TOKEN = re.compile(
    r"""
    (?P<blank>[ \t\f\r\n]+)
    |(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    |(?P<number>[0-9][\w.]*)
    |(?P<word>\w+)
    |(?P<sign>\*\*|==|[-+*/%@&|^~<>=.,:])
    |(?P<open>[(\[{])
    |(?P<close>[)\]}])
    """,
    re.VERBOSE | re.DOTALL,
)

_EXAMPLE = "write for example add(local=linear(_), residual)"


class PatternRefusal(Exception):
    """What is wrong with a pattern and where; ``column`` counts characters from 0."""

    def __init__(self, found: str, fix: str, column: int = 0) -> None:
        super().__init__(found)
        self.found, self.fix, self.column = found, fix, column


@dataclass
class Token:
    """A piece of the text from ``start`` to ``end``.

    Attributes:
        kind: ``word``, ``number``, ``string``, ``sign``, ``open`` or ``close``.
        partner: Of a bracket, the index of the one that belongs to it.
    """

    kind: str
    text: str
    start: int
    end: int
    partner: int = -1

    def name(self) -> str | None:
        """The name that this is, if it is one."""
        if self.kind != "word" or not self.text.isidentifier() or iskeyword(self.text):
            return None
        # As Python has names; they become attributes.
        return unicodedata.normalize("NFKC", self.text)


@dataclass(frozen=True)
class Span:
    """The tokens from ``first`` up to, without, ``last``."""

    tokens: list[Token]
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> Token:
        return self.tokens[self.last + index if index < 0 else self.first + index]

    def part(self, first: int, last: int) -> Span:
        """Those from ``first`` to ``last``, counted from the beginning of this span."""
        return Span(self.tokens, self.first + first, self.first + last)

    def inside(self) -> Span:
        """What stands in the brackets that end this span."""
        return Span(self.tokens, self.tokens[self.last - 1].partner + 1, self.last - 1)

    def before(self) -> Span:
        """What stands before the brackets that end this span."""
        return Span(self.tokens, self.first, self.tokens[self.last - 1].partner)

    def ends_in_call(self) -> bool:
        """Whether this is a name, with anything that may follow one in Python, called."""
        return len(self) > 1 and self[-1].text == ")" and self._is_chain()

    def is_bracketed(self) -> bool:
        """Whether round brackets stand around all of this."""
        return len(self) > 2 and self[0].text == "(" and self[0].partner == self.last - 1

    def _is_chain(self) -> bool:
        index = self.first + 1 if self[0].kind != "open" else self[0].partner + 1
        while index < self.last:
            token = self.tokens[index]
            if token.text in ("(", "["):
                index = token.partner + 1
            elif token.text == "." and index + 1 < self.last and self.tokens[index + 1].kind == "word":
                index += 2
            else:
                return False
        return self[0].kind in ("word", "string", "open")

    def pieces(self) -> list[Span]:
        """What the commas of this span part; a comma at the end parts nothing.

        Raises:
            PatternRefusal: There is nothing before a comma.
        """
        found: list[Span] = []
        begin = index = self.first
        while index < self.last:
            token = self.tokens[index]
            if token.text == ",":
                if index == begin:
                    raise PatternRefusal("pattern syntax: nothing stands before ','", _EXAMPLE, token.start)
                found.append(Span(self.tokens, begin, index))
                begin = index + 1
            index = token.partner + 1 if token.kind == "open" else index + 1
        return [*found, Span(self.tokens, begin, self.last)] if begin < self.last else found


def scan(text: str) -> Span:
    """The tokens of ``text``.

    Raises:
        PatternRefusal: It is empty, holds what no pattern can hold, or its brackets do not fit.
    """
    if "\0" in text:
        raise PatternRefusal("pattern syntax: a null character", "write for example linear(x, w)")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PatternRefusal("pattern syntax: half a character (a surrogate)", "write for example linear(x, w)")
    tokens: list[Token] = []
    opened: list[int] = []
    place = 0
    while place < len(text):
        token = _token(text, place)
        place = token.end
        if token.kind == "blank":
            continue
        if token.kind == "open":
            if len(opened) == MAX_DEPTH:
                fix = "a pattern needs five"
                raise PatternRefusal(f"pattern syntax: nested deeper than {MAX_DEPTH} levels", fix, token.start)
            opened.append(len(tokens))
        elif token.kind == "close":
            _close(token, tokens, opened)
        tokens.append(token)
    if opened:
        left = tokens[opened[-1]]
        raise PatternRefusal(f"pattern syntax: '{left.text}' was never closed", _EXAMPLE, left.start)
    if not tokens:
        raise PatternRefusal("pattern syntax: the pattern is empty", _EXAMPLE)
    return Span(tokens, 0, len(tokens))


def _token(text: str, place: int) -> Token:
    match = _TOKEN.match(text, place)
    if match is None:
        what = "a string that does not end" if text[place] in "'\"" else f"invalid character '{text[place]}'"
        raise PatternRefusal(f"pattern syntax: {what}", _EXAMPLE, place)
    assert match.lastgroup is not None
    return Token(match.lastgroup, match.group(), match.start(), match.end())


def _close(token: Token, tokens: list[Token], opened: list[int]) -> None:
    """Pair a closing bracket with the one that was opened last."""
    if not opened:
        raise PatternRefusal(f"pattern syntax: unmatched '{token.text}'", _EXAMPLE, token.start)
    token.partner = opened.pop()
    partner = tokens[token.partner]
    partner.partner = len(tokens)
    if _CLOSING[partner.text] != token.text:
        found = f"pattern syntax: '{token.text}' does not match '{partner.text}'"
        raise PatternRefusal(found, _EXAMPLE, token.start)
