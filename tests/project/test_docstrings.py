"""Docstrings: nearly every public name has one, and the public API says what its arguments, results and errors are."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from repository import PACKAGE

import qdq_surgery as qs

#: Share of the public functions, methods and classes of all modules.
LEAST = 0.95

#: Arguments that mean the same everywhere: their names say what they are.
PLAIN = frozenset("model qmodel path name rules layer args kwargs self cls".split())

#: A first line that begins so says what is done, and not what is returned.
VERBS = frozenset("calibrate compare convert export find give keep make open put read run take".split())

#: Python's own for a call that cannot be.
OF_THE_CALL = frozenset({"TypeError", "NotImplementedError"})

Definition = ast.FunctionDef | ast.ClassDef


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """Functions and classes without an underscore, and the methods of those classes; a setter has its getter's."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_") and not is_setter(inner):
                    yield f"{node.name}.{inner.name}", inner


def is_setter(node: ast.FunctionDef) -> bool:
    return any(isinstance(each, ast.Attribute) and each.attr == "setter" for each in node.decorator_list)


def without_docstring(path: Path) -> tuple[int, list[str]]:
    found = dict(public_definitions(ast.parse(path.read_text())))
    return len(found), [f"{path.name}: {name}" for name, node in found.items() if not ast.get_docstring(node)]


def test_public_names_have_docstrings() -> None:
    counts, missing = zip(*map(without_docstring, PACKAGE.rglob("*.py")), strict=True)
    names = [name for each in missing for name in each]
    assert len(names) <= (1 - LEAST) * sum(counts), names


def api() -> Iterator[tuple[str, Any]]:
    """Functions and classes of the public API, and the classes' own public methods."""
    for name in qs.__all__:
        thing = getattr(qs, name)
        if inspect.isclass(thing):
            yield name, thing
            for method, value in vars(thing).items():
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if not method.startswith("_") and inspect.isfunction(function):
                    yield f"{name}.{method}", function
        elif callable(thing):
            yield name, thing


API = dict(api())


def made_by(thing: Any) -> Callable[..., Any]:
    return thing.__init__ if inspect.isclass(thing) else thing  # type: ignore[no-any-return]


def inherited(name: str, thing: Any) -> set[str]:
    """Arguments that the same method of another library's class has: they mean what they mean there."""
    owner = getattr(qs, name.partition(".")[0])
    bases = [base for base in (owner.__mro__ if inspect.isclass(owner) else ()) if base.__module__[:3] != "qdq"]
    method = made_by(thing).__name__
    methods = [getattr(base, method) for base in bases if inspect.isroutine(vars(base).get(method))]
    return {each for function in methods for each in inspect.signature(function).parameters}


@pytest.mark.parametrize("name", API)
def test_the_api_says_what_its_arguments_are(name: str) -> None:
    thing = API[name]
    text = thing.__doc__ or ""
    assert text.strip(), "has no docstring"
    if inspect.isclass(thing) and "__init__" not in vars(thing):
        return
    names = set(inspect.signature(made_by(thing)).parameters) - PLAIN - inherited(name, thing)
    assert not [each for each in names if not re.search(rf"\b{each}s?\b", text, re.IGNORECASE)]


@pytest.mark.parametrize("name", [name for name, thing in API.items() if not inspect.isclass(thing)])
def test_the_api_says_what_it_returns_and_raises(name: str) -> None:
    text = API[name].__doc__ or ""
    result = inspect.signature(API[name]).return_annotation
    if text.split()[0].lower() in VERBS and result not in ("None", inspect.Signature.empty):
        assert "Returns:" in text
    if raised(inspect.unwrap(API[name])) - OF_THE_CALL:
        assert "Raises:" in text


def raised(function: Callable[..., Any]) -> set[str]:
    """Names of the errors that the function's own lines raise."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    errors = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    return {ast.unparse(error.func if isinstance(error, ast.Call) else error) for error in errors}


def test_the_test_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text('def one():\n    """Says."""\n\n\ndef two(): ...\n\n\ndef _three(): ...\n\n\nclass Four: ...\n')
    assert without_docstring(path) == (3, ["module.py: two", "module.py: Four"])
    assert raised(qs.explain) == {"ModelError"}
