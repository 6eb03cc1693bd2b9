"""Text on the screen and in files: what rich draws, with or without color, in any width."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod

import rich
from rich.console import Console, RenderableType

__all__ = ["TEXT_WIDTH", "Rendered"]

#: Columns of :meth:`Rendered.to_text`, so that the text does not depend on the terminal.
TEXT_WIDTH = 120


class Rendered(ABC):
    """Something with a rich form. ``print`` shows it as the terminal allows; :meth:`to_text` is always the same."""

    @abstractmethod
    def __rich__(self) -> RenderableType: ...

    def to_text(self, width: int = TEXT_WIDTH) -> str:
        """Plain text without color or trailing blanks, ``width`` columns at most."""
        return _draw(self, Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False))

    def __str__(self) -> str:
        screen = rich.get_console()
        if not screen.is_terminal or screen.no_color or screen.color_system is None:
            return self.to_text(screen.width if screen.is_terminal else TEXT_WIDTH)
        return _draw(self, Console(file=io.StringIO(), width=screen.width, force_terminal=True, highlight=False))


def _draw(renderable: Rendered, console: Console) -> str:
    console.print(renderable, highlight=False)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
