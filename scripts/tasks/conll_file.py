"""CoNLL-2003-style files: a word and its tag in a line, other columns between them, an empty line after a sentence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import TaskFileError
from tasks.text_file import read_text

__all__ = ["Tagged", "read_conll"]

_TAG = re.compile(r"O|[BI]-\S+")


@dataclass(frozen=True)
class Tagged:
    """The words of a sentence and their tags."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


def read_conll(path: Path) -> list[Tagged]:
    """All sentences of a file whose first column is the word and whose last is its tag.

    Raises:
        TaskFileError: A line has another number of columns than the first, or a tag that is none; says in which line.
    """
    sentences: list[Tagged] = []
    rows: list[list[str]] = []
    width = 0
    for number, line in enumerate([*read_text(path).split("\n"), ""], start=1):
        columns = line.split()
        if columns and columns[0] != "-DOCSTART-":
            width = width or len(columns)
            _check(path, number, columns, width)
            rows.append(columns)
        elif rows:
            sentences.append(Tagged(tuple(row[0] for row in rows), tuple(row[-1] for row in rows)))
            rows = []
    if not sentences:
        raise TaskFileError(path, 1, "no sentence in it", "give a file with a word and its tag in each line")
    return sentences


def _check(path: Path, number: int, columns: list[str], width: int) -> None:
    if len(columns) != width or width < 2:
        raise TaskFileError(
            path,
            number,
            f"{len(columns)} columns, where {'a word and a tag are needed' if width < 2 else f'{width} came before'}",
            "give every line the word first, the tag last and the same columns between",
        )
    if not _TAG.fullmatch(columns[-1]):
        raise TaskFileError(path, number, f"the tag '{columns[-1]}'", "write tags as O, B-TYPE or I-TYPE")
