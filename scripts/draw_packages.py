"""Draw the packages and what they import into docs/architecture.md, between its two marks.

    python scripts/draw_packages.py          # writes
    python scripts/draw_packages.py --check  # writes nothing; 1 if the picture is not that of the code

A room is a package, or a file that stands alone at the top level. An arrow goes from a room to one that it imports,
unless a longer way leads there, too: with all of them nobody would see any. The table names all.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qdq_surgery"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by scripts/draw_packages.py -->", "<!-- end of what is drawn -->"

#: A room, and the rooms that it imports.
Rooms = dict[str, set[str]]


def room_of(path: Path) -> str:
    """The room that a file lies in."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def rooms() -> Rooms:
    """All rooms with those that they import, wherever in a file."""
    found: Rooms = {room_of(path): set() for path in sorted(PACKAGE.rglob("*.py"))}
    for path in PACKAGE.rglob("*.py"):
        own = room_of(path)
        found[own] |= {name for name in _imported(ast.parse(path.read_text())) if name in found} - {own}
    return found


def _imported(tree: ast.Module) -> Iterable[str]:
    """First names below the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            package, _, inner = name.partition(".")
            if package == PACKAGE.name:
                yield inner.partition(".")[0] or "__init__"


def from_the_ground(graph: Rooms) -> list[str]:
    """Rooms in an order in which each comes after those that it imports; by name where that leaves a choice.

    Raises:
        ValueError: There is none: they import one another in a circle.
    """
    left, order = dict(graph), list[str]()
    while left:
        ready = [name for name, needs in left.items() if not needs & left.keys()]
        if not ready:
            raise ValueError(f"these rooms import one another in a circle, or stand on one: {', '.join(sorted(left))}")
        order.append(min(ready))
        del left[order[-1]]
    return order


def below(graph: Rooms) -> Rooms:
    """Every room with all that it stands on."""
    found: Rooms = {}
    for name in from_the_ground(graph):
        found[name] = graph[name].union(*(found[other] for other in graph[name]))
    return found


def arrows(graph: Rooms) -> list[tuple[str, str]]:
    """What is drawn: imports that no longer way stands for."""
    deep = below(graph)
    return [
        (name, other)
        for name in reversed(from_the_ground(graph))
        for other in sorted(graph[name])
        if not any(other in deep[between] for between in graph[name])
    ]


def picture(graph: Rooms) -> str:
    """The picture for Mermaid, which GitHub draws, and the table."""
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'  {_node(name)}["{_label(name)}"]' for name in reversed(from_the_ground(graph))]
    lines += [f"  {_node(name)} --> {_node(other)}" for name, other in arrows(graph)]
    lines += ["```", "", "| room, from the ground up | what it is | imports |", "|---|---|---|"]
    for name in from_the_ground(graph):
        shown = ", ".join(sorted(_label(other) for other in graph[name])) or "nothing"
        lines.append(f"| {_label(name)} | {_purpose(name)} | {shown} |")
    return "\n".join(lines)


def _label(name: str) -> str:
    return {"__init__": "qdq_surgery", "__main__": "python -m qdq_surgery"}.get(name, name)


def _node(name: str) -> str:
    return f"{name.strip('_')}_"  # Mermaid keeps words such as "graph" for itself


def _purpose(name: str) -> str:
    """The first line of its docstring."""
    path = PACKAGE / name / "__init__.py"
    text = ast.get_docstring(ast.parse((path if path.is_file() else PACKAGE / f"{name}.py").read_text())) or ""
    return text.splitlines()[0].replace("``", "`").replace("|", "\\|") if text else ""


def drawn(page: str, graph: Mapping[str, set[str]]) -> str:
    """The page with the picture of now."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{PAGE.name} needs the lines {BEGIN} and {END}, once each")
    return re.sub(f"(?s){BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{picture(dict(graph))}\n\n{END}", page)


def main(words: list[str]) -> int:
    """Write the picture, or only look whether it is that of the code."""
    before = PAGE.read_text()
    after = drawn(before, rooms())
    if "--check" not in words:
        PAGE.write_text(after)
        return 0
    if before != after:
        print(f"{PAGE.name} does not show the packages as they are; run python scripts/draw_packages.py")
    return int(before != after)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
