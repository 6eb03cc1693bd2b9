"""What a result shows, as data, and its drawings: text through rich for terminals and files, HTML for notebooks."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

import rich
from rich import table
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

__all__ = ["TEXT_WIDTH", "Column", "Line", "Part", "Result", "Table", "View", "line", "number"]

#: Columns of :meth:`Result.to_text`, so that the text does not depend on the terminal.
TEXT_WIDTH = 120

#: Below this many columns, a table that has lines in its place is drawn as these.
_WIDE = 100

#: Words of styles in CSS, in tones that can be read on white and on black; other words are colours.
_CSS = {
    "bold": "font-weight:bold",
    "italic": "font-style:italic",
    "dim": "opacity:0.6",
    "yellow": "color:darkgoldenrod",
    "cyan": "color:darkcyan",
}
_CELL = "text-align:{};vertical-align:top;padding:0 1.5em 0 0"


@dataclass(frozen=True)
class Line:
    """Words in a row, some with a style such as ``"bold red"``; where it is too long, every line is indented."""

    words: tuple[str | tuple[str, str], ...]
    indent: int = 0

    def __str__(self) -> str:
        return "".join(word if isinstance(word, str) else word[0] for word in self.words)

    def __rich__(self) -> RenderableType:
        text = Text.assemble(*self.words)
        return Padding(text, (0, 0, 0, self.indent)) if self.indent else text

    def html(self) -> str:
        """A ``div``; an empty line has its height."""
        spans = [escape(word) if isinstance(word, str) else _span(*word) for word in self.words]
        return f'<div style="margin-left:{self.indent}ch">{"".join(spans) or "<br>"}</div>'


def line(*words: str | tuple[str, str], indent: int = 0) -> Line:
    """A line of words, each alone or with its style."""
    return Line(words, indent)


def data_words(batches: int, rows: int, tokens: int) -> str:
    """How much data something is of."""
    return f"{tokens} tokens in {rows} rows ({batches} batches)"


@dataclass(frozen=True)
class Column:
    """A column of a table: its header, and whether its cells stand at the right and may take several lines."""

    name: str
    right: bool = False
    wraps: bool = True


def number(name: str) -> Column:
    """A column of numbers."""
    return Column(name, right=True, wraps=False)


@dataclass(frozen=True)
class Table:
    """Rows under headers.

    Attributes:
        rows: A cell is plain text, a line, or several lines.
        header: The headers' style; ``None``: they are not shown.
        gap: Blanks between two columns.
        narrow: Lines that say the same in less than 100 columns; where there are none, the table is drawn in any width.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str | Line | tuple[Line, ...], ...], ...]
    header: str | None = "bold"
    gap: int = 2
    narrow: tuple[Line, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.narrow and options.max_width < _WIDE:
            yield from self.narrow
            return
        drawn = table.Table(box=None, pad_edge=False, padding=(0, self.gap, 0, 0), header_style=self.header or "")
        drawn.show_header = self.header is not None
        for each in self.columns:
            drawn.add_column(Text(each.name), justify="right" if each.right else "left", no_wrap=not each.wraps)
            drawn.columns[-1].overflow = "fold" if each.wraps else "ellipsis"
        for row in self.rows:
            drawn.add_row(*(Group(*cell) if isinstance(cell, tuple) else _drawn(cell) for cell in row))
        yield drawn

    def html(self) -> str:
        """A ``table``."""
        head = [_cell("th", each, each.name) for each in self.columns] if self.header is not None else []
        rows = [[_cell("td", *pair) for pair in zip(self.columns, row, strict=True)] for row in self.rows]
        drawn = "".join(f"<tr>{''.join(row)}</tr>" for row in (head, *rows) if row)
        return f'<table style="border-collapse:collapse;margin:0.5em 0">{drawn}</table>'


@dataclass(frozen=True)
class View:
    """A title and what stands under it, in this order: notes, tables, and views of parts.

    Attributes:
        ruled: Whether a rule stands beside the title, which sets it off from what is before it.
    """

    title: Line
    parts: tuple[Part, ...] = ()
    ruled: bool = False

    def __rich__(self) -> RenderableType:
        title = Rule(Text.assemble(*self.title.words), align="left", characters="-") if self.ruled else self.title
        return Group(title, *map(_drawn, self.parts))

    def html(self) -> str:
        """A ``div`` with its styles in it, for any page; whatever the names in it are, they are text there."""
        parts = [line(part).html() if isinstance(part, str) else part.html() for part in (self.title, *self.parts)]
        return f'<div style="white-space:pre-wrap;font-family:monospace">{"".join(parts)}</div>'


#: What a view is made of; plain text is a note.
Part: TypeAlias = str | Line | Table | View


class Result(ABC):
    """What a call found or did. ``print`` shows it as the terminal allows; :meth:`to_text` is always the same."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All of it as plain data; ``schema`` is the version of this form."""

    @abstractmethod
    def _title(self) -> Line: ...

    @abstractmethod
    def _parts(self) -> Iterable[Part]: ...

    def view(self) -> View:
        """What is shown of it, as data."""
        return View(self._title(), tuple(self._parts()))

    def to_text(self, width: int = TEXT_WIDTH) -> str:
        """Plain text without colour or trailing blanks, ``width`` columns at most."""
        return self._draw(Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False))

    def __str__(self) -> str:
        screen = rich.get_console()
        if not screen.is_terminal or screen.no_color or screen.color_system is None:
            return self.to_text(screen.width if screen.is_terminal else TEXT_WIDTH)
        return self._draw(Console(file=io.StringIO(), width=screen.width, force_terminal=True, highlight=False))

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {' '.join(str(self._title()).split())}>"

    def __rich__(self) -> RenderableType:
        return self.view()

    def _repr_html_(self) -> str:
        return self.view().html()

    def _draw(self, console: Console) -> str:
        console.print(self, highlight=False)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(row.rstrip() for row in console.file.getvalue().splitlines())


def _drawn(part: Part) -> RenderableType:
    return Text(part) if isinstance(part, str) else part


def _span(text: str, style: str) -> str:
    css = ";".join(_CSS.get(word, f"color:{word}") for word in style.split())
    return f'<span style="{css}">{escape(text)}</span>'


def _cell(tag: str, column: Column, cell: str | Line | tuple[Line, ...]) -> str:
    lines = cell if isinstance(cell, tuple) else (cell,)
    drawn = "".join(escape(each) if isinstance(each, str) else each.html() for each in lines)
    return f'<{tag} style="{_CELL.format("right" if column.right else "left")}">{drawn}</{tag}>'
