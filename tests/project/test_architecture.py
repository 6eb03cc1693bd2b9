"""The picture of the packages in docs/architecture.md is that of the imports, and can be seen not to be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_structure import MODULES, ORDER, imports, room

import draw_packages
from draw_packages import PAGE, arrows, below, drawn, from_the_ground, rooms

#: Room -> what it imports, by the structure test's own reading.
IMPORTED = {
    name: {
        room(other)
        for module, path in MODULES.items()
        if room(module) == name
        for other in imports(path)
        if other.split(".")[0] == "qdq_surgery"
    }
    - {name}
    for name in ORDER
}


def label(name: str) -> str:
    return {"__init__": "qdq_surgery", "__main__": "python -m qdq_surgery"}.get(name, name)


def test_the_picture_is_drawn() -> None:
    page = PAGE.read_text()
    assert page == drawn(page, rooms()), "run python scripts/draw_packages.py"


def test_the_rooms_of_the_table_are_those_of_the_imports() -> None:
    rows = re.findall(r"^\| ([\w -]+) \| .* \| ([\w, ]+) \|$", PAGE.read_text(), re.MULTILINE)
    found = {name: set(needs.split(", ")) - {"nothing"} for name, needs in rows if not name.startswith("room")}
    assert found == {label(name): {label(other) for other in needs} for name, needs in IMPORTED.items()}


def test_the_arrows_of_the_picture_lead_to_whatever_is_imported() -> None:
    """Each is an import, and along them one comes to all imports."""
    [picture] = re.findall(r"```mermaid\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = dict(re.findall(r'^  (\w+)\["(.+)"\]$', picture, re.MULTILINE))
    assert set(names.values()) == {label(name) for name in ORDER}
    shown: dict[str, set[str]] = {name: set() for name in names.values()}
    for start, end in re.findall(r"^  (\w+) --> (\w+)$", picture, re.MULTILINE):
        shown[names[start]].add(names[end])
    wanted = {label(name): {label(other) for other in needs} for name, needs in IMPORTED.items()}
    assert all(shown[name] <= wanted[name] for name in wanted)
    assert below(shown) == below(wanted)


def test_an_import_that_is_not_drawn_is_seen() -> None:
    page, graph = PAGE.read_text(), rooms()
    assert drawn(page, {**graph, "errors": {"version"}}) != page
    assert drawn(page, {**graph, "prove": graph["prove"] - {"targets"}}) != page


def test_a_longer_way_stands_for_an_arrow() -> None:
    graph = {"a": set[str](), "b": {"a"}, "c": {"a", "b"}}
    assert from_the_ground(graph) == ["a", "b", "c"]
    assert arrows(graph) == [("c", "b"), ("b", "a")]


def test_a_circle_has_no_picture() -> None:
    with pytest.raises(ValueError, match="in a circle, or stand on one: a, b, c"):
        from_the_ground({"a": {"b"}, "b": {"a"}, "c": {"a"}})


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="once each"):
        drawn("no marks", {})


@pytest.mark.parametrize(("words", "code"), [(["--check"], 1), ([], 0)])
def test_the_script_looks_or_writes(
    words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{draw_packages.BEGIN}\nwas here\n{draw_packages.END}\nafter\n")
    monkeypatch.setattr(draw_packages, "PAGE", page)
    assert draw_packages.main(words) == code
    assert ("was here" in page.read_text()) == bool(code)
    assert bool(capsys.readouterr().out) == bool(code)
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
