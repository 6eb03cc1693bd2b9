"""A tool's numbers against ours: how far apart, whether that is the runtime's rounding, and all of it as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Comparison", "Rows", "compared", "page_table", "printed"]

#: Of the largest number: what float32 rounds in another order, in the mean over the tokens and the norm. A value that
#: goes the other way at one tie moves an embedding by a hundred times as much.
_ROUNDING = 2e-6

#: Where the tool has another version of the runtime, values may go the other way at ties.
_TIES = 0.99

_COLUMNS = ("tool", "version", "runtime", "file", "gives", "largest difference", "smallest cosine")


@dataclass(frozen=True)
class Rows:
    """What a tool makes of the texts.

    Attributes:
        file: The model file that it loaded, in the deployed folder.
        versions: Of its packages, the tool's own first.
        runtime: Name and version of what ran the file.
        rows: (texts, numbers).
    """

    file: str
    versions: Mapping[str, str]
    runtime: tuple[str, str]
    rows: NDArray[np.float32]

    @classmethod
    def read(cls, path: Path) -> Rows:
        """What a program wrote."""
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        name, version = found["runtime"]
        return cls(found["file"], found["versions"], (name, version), np.array(found["rows"], dtype=np.float32))


@dataclass(frozen=True)
class Comparison:
    """A row of the table.

    Attributes:
        tool: Its name.
        gives: What it was asked for.
        found: What it gave; or why there is nothing, in a line.
        difference: The largest, over the largest magnitude of our numbers.
        cosine: The smallest of a text.
        same: Whether it ran the version of the runtime that we did.
    """

    tool: str
    gives: str
    found: Rows | str
    difference: float = float("nan")
    cosine: float = float("nan")
    same: bool = True

    @property
    def right(self) -> bool:
        """Whether the numbers are ours, to the runtime's rounding."""
        if isinstance(self.found, str):
            return False
        return bool(self.difference <= _ROUNDING or (not self.same and self.cosine >= _TIES))

    def cells(self) -> tuple[str, ...]:
        """What stands in the table."""
        if isinstance(self.found, str):
            return (self.tool, "-", "-", "-", self.gives, "-", "-")
        version = next(iter(self.found.versions.values()))
        shown = "0" if self.difference == 0 else f"{self.difference:.0e}"
        runtime = " ".join(self.found.runtime)
        return (self.tool, version, runtime, self.found.file, self.gives, shown, f"{self.cosine:.6f}")


def compared(tool: str, gives: str, ours: Rows, found: Rows | str) -> Comparison:
    """A tool's numbers against ours.

    Args:
        ours: Of the same texts, from the file that the folder is for.
        found: What the tool gave; or why there is nothing.
    """
    if isinstance(found, str):
        return Comparison(tool, gives, found)
    if found.rows.shape != ours.rows.shape:
        return Comparison(tool, gives, f"gives {found.rows.shape} numbers in the place of {ours.rows.shape}")
    difference = np.abs(found.rows - ours.rows).max() / np.abs(ours.rows).max()
    norms = np.linalg.norm(found.rows, axis=1) * np.linalg.norm(ours.rows, axis=1)
    cosine = ((found.rows * ours.rows).sum(1) / norms).min()
    return Comparison(tool, gives, found, float(difference), float(cosine), found.runtime == ours.runtime)


def printed(comparisons: Sequence[Comparison]) -> str:
    """The table in columns, then what is not right, each in a line."""
    lines = [_COLUMNS, *(each.cells() for each in comparisons)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(
        [*table, *(f"{each.tool}, {each.gives}: {_wrong(each)}" for each in comparisons if not each.right)]
    )


def page_table(comparisons: Sequence[Comparison]) -> str:
    """The table in Markdown."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---|---|---|---|---|--:|--:|"]
    for each in comparisons:
        tool, version, runtime, file, *figures = each.cells()
        lines.append("| " + " | ".join((tool, version, runtime, f"`{file}`", *figures)) + " |")
    return "\n".join(lines) + "\n"


def _wrong(each: Comparison) -> str:
    if isinstance(each.found, str):
        return each.found
    limit = f"{_ROUNDING:.0e} of the numbers is rounding" if each.same else f"another runtime may have {_TIES} or more"
    return f"differs by {each.difference:.1e}, smallest cosine {each.cosine:.6f}; {limit}"
