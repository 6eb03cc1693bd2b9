"""Texts of rule files, good and bad, and how a refusal of one is looked at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qdq_surgery.errors import RuleFileError, printable
from qdq_surgery.rules.yaml_file import load_rules

__all__ = [
    "GOOD",
    "HEAD",
    "MARK",
    "RULES",
    "RULES_WITH",
    "SECOND",
    "TOO_LONG",
    "Cases",
    "check",
    "nodes_made",
    "refusal",
    "with_calibration",
    "with_calibrator",
    "with_count",
    "with_exclude",
    "with_key",
    "with_match",
    "with_pattern",
    "with_quantize",
    "with_rule",
    "with_share",
    "with_spec",
    "write",
    "write_marked",
]

HEAD = "schema: 1\nname: mine\n"

RULES = """\
rules:
  - name: first
    why: it pays
    match: {pattern: "linear(x, w)"}
    quantize: {x: default}
"""

GOOD = HEAD + RULES

#: By name: the file's text with a mark, what the message says was found (a regex), and the remedy (a regex).
Cases = dict[str, tuple[str, ...]]

#: Marks the place that the error must name; it is taken out before the file is written.
MARK = "^"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))  # not write_text: line ends must stay as they are given
    return path


def write_marked(path: Path, text: str) -> tuple[Path, int, int]:
    """Writes the file without the mark; the mark's line and column, counted from 1."""
    before, mark, after = text.partition(MARK)
    assert mark
    assert MARK not in after
    write(path, before + after)
    return path, before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def refusal(path: Path | str) -> RuleFileError:
    with pytest.raises(RuleFileError) as caught:
        load_rules(path)
    return caught.value


def check(error: RuleFileError, path: Path, line: int | None, column: int | None, found: str, fix: str) -> None:
    assert re.search(found, error.found)
    assert re.search(fix, error.fix)
    assert (error.path, error.line, error.column) == (path.resolve(), line, column)
    place = ":".join(str(part) for part in (path.resolve(), line, column) if part is not None)
    assert str(error) == f"{place}: {printable(error.found)}; {printable(error.fix)}"


def with_spec(text: str) -> str:
    return f"{HEAD}specs:\n  s: {text}\n{RULES}"


def with_calibrator(text: str) -> str:
    return with_spec(f"{{calibrator: {text}}}")


def with_rule(text: str) -> str:
    return f"{HEAD}rules:\n  - {text}\n"


def with_match(text: str) -> str:
    return RULES_WITH.format(match=text, quantize="{x: default}")


def with_pattern(text: str) -> str:
    return with_match(f"{{layers: all, pattern: {text}}}")


def with_quantize(text: str) -> str:
    return RULES_WITH.format(match='{pattern: "linear(x, w)"}', quantize=text)


def with_key(text: str) -> str:
    """One more key of the rule."""
    return f"{GOOD}    {text}\n"


def with_count(text: str) -> str:
    return with_key(f"expect: {{per_layer: {text}}}")


def with_exclude(text: str) -> str:
    return f"{GOOD}exclude:\n  - {text}\n"


def with_share(text: str) -> str:
    return f"{GOOD}share:\n  - {text}\n"


def with_calibration(text: str) -> str:
    return f"{GOOD}calibration: {text}\n"


#: One more rule.
SECOND = """\
  - {name: second, why: w, match: {pattern: "gelu(x)"}, quantize: {x: {as: x_quantizer}}}
"""

#: For a file's name, and for a path.
TOO_LONG = [
    pytest.param("a" * 300, id="name"),
    pytest.param("a" * 5000, id="path"),
    pytest.param("a/" * 5000, id="dirs"),
]

RULES_WITH = HEAD + "rules:\n  - name: first\n    why: it pays\n    match: {match}\n    quantize: {quantize}\n"


def nodes_made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Gets an entry for each YAML node that is made from now on."""
    made: list[Any] = []
    compose = yaml.SafeLoader.compose_node

    def counted(self: yaml.SafeLoader, parent: Any, index: Any) -> Any:
        node = compose(self, parent, index)
        made.append(node)
        return node

    monkeypatch.setattr(yaml.SafeLoader, "compose_node", counted)
    return made
