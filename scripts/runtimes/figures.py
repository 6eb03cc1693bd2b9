"""What was measured of one model, as numbers, as tables."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

__all__ = ["BASE", "Figures", "Measured"]

#: The contender that all others are compared with.
BASE = "ort-fp32"


@dataclass
class Measured:
    """One contender.

    Attributes:
        words: What tables call it.
        megabytes: Size of its files; None if it has none.
        cosine: Of its logits to those of the float model in PyTorch: whether it computes the same at all.
        seconds: Of every round, by shape.
    """

    words: str
    megabytes: float | None = None
    cosine: float | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def milliseconds(self, shape: str) -> float | None:
        """The median."""
        return 1e3 * statistics.median(self.seconds[shape]) if self.seconds.get(shape) else None


@dataclass
class Figures:
    """One model: contenders in the order of the table, and who is not in it, with the reason.

    Attributes:
        others: By shape, the share of the cores' time that other processes took in the most disturbed round.
    """

    words: str
    shapes: list[str]
    contenders: dict[str, Measured] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)

    def times(self, name: str, shape: str, than: str = BASE) -> float | None:
        """How many times as fast as another one."""
        own, other = (
            self.contenders[each].milliseconds(shape) if each in self.contenders else None for each in (name, than)
        )
        return None if own is None or other is None else other / own

    def size(self, name: str, than: str = BASE) -> float | None:
        """Size of its files, as a share of another one's."""
        own, other = (self.contenders[each].megabytes if each in self.contenders else None for each in (name, than))
        return None if own is None or other is None else own / other

    def cells(self, name: str) -> list[str]:
        """For each shape the time and the speed, then the size and the cosine."""
        measured, cells = self.contenders[name], []
        for shape in self.shapes:
            time, times = measured.milliseconds(shape), self.times(name, shape)
            speed = "" if times is None else f", {times:.2f} x"
            cells.append("" if time is None else f"{time:.{0 if time >= 100 else 1}f} ms{speed}")
        cells.append("" if measured.megabytes is None else f"{measured.megabytes:.0f} MB")
        cells.append("" if measured.cosine is None else f"{measured.cosine:.3f}")
        return cells

    def table(self) -> Table:
        """For a terminal."""
        made = Table(title=f"{self.words}: medians, and times as fast as {BASE}", title_justify="left", box=None)
        made.add_column("contender")
        for column in (*self.shapes, "file", "cosine"):
            made.add_column(column, justify="right")
        for name in self.contenders:
            made.add_row(name, *self.cells(name))
        return made

    def markdown(self) -> str:
        """For docs/benchmarks.md: without the cosines."""
        shapes = [shape.replace("x", " x ") for shape in self.shapes]
        lines = [f"| {self.words} | " + " | ".join([*shapes, "file"]) + " |", "|---|" + "--:|" * (len(shapes) + 1)]
        for name, measured in self.contenders.items():
            lines.append(f"| {measured.words} | " + " | ".join(self.cells(name)[:-1]) + " |")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        contenders = {
            name: {
                "milliseconds": {shape: measured.milliseconds(shape) for shape in self.shapes},
                "times_as_fast": {shape: self.times(name, shape) for shape in self.shapes},
                "megabytes": measured.megabytes,
                "cosine": measured.cosine,
                "seconds": measured.seconds,
            }
            for name, measured in self.contenders.items()
        }
        return {
            "base": BASE,
            "contenders": contenders,
            "skipped": self.skipped,
            "failed": self.failed,
            "others": self.others,
        }
