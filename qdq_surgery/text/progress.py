"""A progress bar for what takes longer than two seconds, on standard error, and nothing for what does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Timer
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["PATIENCE", "Steps", "steps", "track"]

#: Seconds before a bar appears.
PATIENCE = 2.0

_T = TypeVar("_T")


class Steps:
    """A known number of named steps, one after the other."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)
        self._done = -1

    def next(self, name: str) -> None:
        """The step before this one is done; ``name`` is what happens from now on."""
        self._done += 1
        self._progress.update(self._task, description=name, completed=self._done)


@contextmanager
def _bar() -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    timer = Timer(PATIENCE, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield progress
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


@contextmanager
def steps(total: int) -> Iterator[Steps]:
    """A bar over ``total`` named steps."""
    with _bar() as progress:
        yield Steps(progress, total)


def track(items: Iterable[_T], name: str, total: int | None) -> Iterator[_T]:
    """The items, with a bar that counts them; ``total`` is ``None`` where nobody knows it."""
    with _bar() as progress:
        task = progress.add_task(name, total=total)
        for item in items:
            yield item
            progress.advance(task)
