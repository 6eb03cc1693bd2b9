"""How much a rule set may hold: every text, list and number in one has an end, and no text has hidden characters.

A rule set may come from a stranger. What reading, checking and matching it costs grows with what is counted here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from fnmatch import translate
from functools import lru_cache

from qdq_surgery.errors import RuleFileError

__all__ = [
    "MAX_COUNT",
    "MAX_ENTRIES",
    "MAX_LAYER",
    "MAX_LIST",
    "MAX_NAME",
    "MAX_RULES",
    "MAX_SPECS",
    "MAX_TEXT",
    "MAX_WILDCARDS",
    "check_globs",
    "check_name",
    "check_size",
    "check_text",
    "glob_fits",
    "hidden_character",
    "is_wildcard",
]

#: Rules of a rule set, with those of the files that it extends; the recipe has five.
MAX_RULES = 128
#: Entries under ``exclude``, and under ``share``.
MAX_ENTRIES = 256
#: Specs of a rule set.
MAX_SPECS = 128
#: Entries of any other list or mapping.
MAX_LIST = 1024
#: Different globs with ``*``, ``?`` or ``[`` in a rule set: each is tried on every name, the others are looked up.
MAX_WILDCARDS = 256
#: Characters of a name or a glob.
MAX_NAME = 256
#: Characters of a ``why``.
MAX_TEXT = 4000
#: The largest index of an encoder layer.
MAX_LAYER = 9999
#: The largest number of matches to expect.
MAX_COUNT = 1_000_000

#: Control and format characters (bidirectional and zero-width ones too), halves of characters, separators of lines.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})

_WILD = re.compile(r"[*?\[]")


def hidden_character(text: str, keep: str = "") -> str | None:
    """The first character of ``text`` that does not show when it is printed, or that moves what does."""
    if text.isprintable():
        return None
    return next((letter for letter in text if letter not in keep and unicodedata.category(letter) in _HIDDEN), None)


def check_text(text: str, what: str, most: int = MAX_TEXT, keep: str = "\n") -> None:
    """Refuse a text that is too long or has hidden characters, but those in ``keep``.

    Raises:
        RuleFileError: It is such a text.
    """
    check_size(len(text), what, "characters", most)
    hidden = hidden_character(text, keep)
    if hidden is not None:
        raise RuleFileError(f"{what} has the hidden character U+{ord(hidden):04X}", "remove it")


def check_name(text: str, what: str) -> None:
    """As :func:`check_text`, for what is short and one line."""
    check_text(text, what, MAX_NAME, keep="")


def check_size(size: int, what: str, of: str, most: int) -> None:
    """Refuse what has too many.

    Raises:
        RuleFileError: ``size`` is more than ``most``.
    """
    if size > most:
        raise RuleFileError(f"{what} has {size} {of}", f"write at most {most}")


def check_globs(globs: Iterable[str], what: str) -> None:
    """Refuse globs that are too many, too long or none.

    Raises:
        RuleFileError: They are.
    """
    globs = tuple(globs)
    check_size(len(globs), what, "globs", MAX_LIST)
    for glob in globs:
        check_name(glob, f"a glob of {what}")
        if is_wildcard(glob):
            try:
                _compiled(glob)
            except re.error as error:
                raise RuleFileError(f"'{glob}' of {what} is no glob: {error}", "correct its brackets") from None


def is_wildcard(glob: str) -> bool:
    """Whether ``glob`` may fit other names than itself."""
    return _WILD.search(glob) is not None


def glob_fits(globs: tuple[str, ...], name: str) -> bool:
    """Whether one of ``globs`` fits all of ``name``; capitals count, and ``*`` crosses dots."""
    names, wildcards = _sorted(globs)
    return name in names or any(wildcard.match(name) for wildcard in wildcards)


@lru_cache(maxsize=1024)
def _sorted(globs: tuple[str, ...]) -> tuple[frozenset[str], tuple[re.Pattern[str], ...]]:
    """The globs that are names, and the others compiled: a name is looked up, however many there are."""
    wild = [glob for glob in dict.fromkeys(globs) if is_wildcard(glob)]
    return frozenset(globs) - frozenset(wild), tuple(map(_compiled, wild))


@lru_cache(maxsize=1024)
def _compiled(glob: str) -> re.Pattern[str]:
    return re.compile(translate(glob))
