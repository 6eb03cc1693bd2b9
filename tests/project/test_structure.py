"""The layout: packages by stage, imports downwards, libraries in few rooms, files of one idea."""

from __future__ import annotations

import ast
import functools
import graphlib
from pathlib import Path

import pytest
from repository import PACKAGE

#: The rooms from the ground up: a module imports from its own room and from those before it. A file that stands alone
#: at the top level is a room, too: what all use (errors, version), and the assemblers that put the rooms together.
ORDER = [
    "version",
    "errors",
    "safety",
    "text",
    "numerics",
    "rules",
    "hf",
    "texts",
    "graph",
    "trace",
    "padding",
    "match",
    "quantize",
    "integers",
    "surgery",
    "calibration",
    "checkpoint",
    "convert",
    "qdqbert",
    "report",
    "trainer",
    "onnx_file",
    "sensitivity",
    "onnx_graph",
    "targets",
    "tuning",
    "serve",
    "export",
    "prove",
    "freeze",
    "load_frozen",
    "onnx_export",
    "html_report",
    "api",
    "deployment",
    "cli",
    "__init__",
    "__main__",
]

#: Libraries that only these rooms may know.
HOMES = {
    "yaml": {"rules"},
    "onnx": {"prove"},
    "onnx_ir": {"onnx_file", "onnx_graph", "export", "targets", "prove", "onnx_export"},
    "rich": {"text", "cli"},
    "bokeh": {"html_report"},
    "jinja2": {"html_report"},
}

#: Rooms that know neither Hugging Face's models nor their configs.
WITHOUT_TRANSFORMERS = {
    "version",
    "errors",
    "safety",
    "text",
    "numerics",
    "rules",
    "padding",
    "targets",
    "onnx_graph",
}

#: A room has no more files than one looks over at once.
MOST_FILES = 12


@functools.cache
def parsed(path: Path) -> ast.Module:
    """A file of the package, which many tests here look through."""
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """All modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            assert node.module is not None
            # (All public names are those of one module.)
            assert [alias.name for alias in node.names] != ["*"] or node.module == "qdq_surgery.api"
            for alias in node.names:  # a module by its name, or something in one
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return frozenset(found)


def _named(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {_named(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    """The room that a module of the package is in."""
    return module.split(".")[1] if "." in module else "__init__"


def test_every_room_has_its_floor() -> None:
    assert sorted(ORDER) == sorted({room(module) for module in MODULES})


def test_imports_go_downwards() -> None:
    upward = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in sorted(imports(path))
        if other.split(".")[0] == "qdq_surgery"
        and room(other) != room(module)
        and ORDER.index(room(other)) >= ORDER.index(room(module))
    ]
    assert not upward


def test_there_is_no_circle() -> None:
    graph = {module: imports(path) & MODULES.keys() - {module} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("library", HOMES)
def test_libraries_stay_in_their_rooms(library: str) -> None:
    users = {
        room(module)
        for module, path in MODULES.items()
        if any(other == library or other.startswith(library + ".") for other in imports(path))
    }
    assert users <= HOMES[library]
    assert users


def test_rules_and_numbers_know_no_model() -> None:
    users = {
        room(module)
        for module, path in MODULES.items()
        if any(other.split(".")[0] == "transformers" for other in imports(path))
    }
    assert not users & WITHOUT_TRANSFORMERS


def test_rooms_can_be_looked_over() -> None:
    folders = {path.parent for path in MODULES.values()}
    crowded = {str(folder): len(list(folder.glob("*.py"))) for folder in folders}
    assert max(crowded.values()) <= MOST_FILES, crowded


def test_files_hold_one_idea() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in MODULES.values()}
    assert max(lengths.values()) <= 520, max(lengths, key=lambda name: lengths[name])
    assert "utils.py" not in lengths


def test_functions_can_be_looked_over() -> None:
    """60 lines, without what the docstring takes of them."""
    found = {}
    for module, path in MODULES.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                told = node.body[0]
                words = ast.get_docstring(node) is not None and len(node.body) > 1
                spoken = (told.end_lineno or 0) - told.lineno + 1 if words else 0
                found[f"{module}.{node.name}"] = (node.end_lineno or 0) - node.lineno + 1 - spoken
    assert max(found.values()) <= 60, max(found, key=lambda name: found[name])


def test_every_module_says_what_it_is_for() -> None:
    assert not [name for name, path in MODULES.items() if not ast.get_docstring(parsed(path))]


def test_the_test_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "def f():\n    from qdq_surgery.cli import commands\n    from qdq_surgery.cli.commands import main\n"
    )
    assert imports(path) == {"qdq_surgery.cli.commands"}
