"""English that comes with Python: the docstrings of its standard library."""

from __future__ import annotations

import ast
import functools
import random
import re
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path

__all__ = ["standard_library_texts"]


def standard_library_texts(count: int) -> list[str]:
    """The first ``count`` of the English docstrings of Python's standard library, in a fixed shuffled order.

    Only a docstring's first paragraph, if it is 40 to 400 characters of prose.
    """
    found = list(_prose())
    random.Random(0).shuffle(found)
    return found[:count]


@functools.cache
def _prose() -> tuple[str, ...]:
    home = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, None] = {}
    for file in sorted((*home.glob("*.py"), *home.glob("[a-z]*/*.py"))):
        if file.parent.name in ("test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in _with_docstrings(tree):
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if 40 <= len(text) <= 400 and re.match(r"[A-Z][a-z]* [a-z]", text) and ">>>" not in text:
                texts[text] = None
    return tuple(texts)


def _with_docstrings(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """In the order of ``ast.walk``, which also goes through all expressions, for most of the time."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, name, ()))
