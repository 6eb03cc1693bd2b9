"""GLUE-style tables: a header, tabs between columns, one or two sentences and a label in every row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tasks.errors import TaskFileError
from tasks.text_file import read_text

__all__ = ["Row", "read_table"]

#: Names that GLUE's own files and common exports give to these columns; the first that the header has counts.
_LABELS = ("label", "gold_label", "Quality", "is_duplicate")
_SENTENCES = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("text_a", "text_b"),
    ("#1 String", "#2 String"),
    ("sentence",),
    ("text",),
)


@dataclass(frozen=True)
class Row:
    """One or two sentences and the label's name."""

    sentences: tuple[str, ...]
    label: str


def read_table(path: Path) -> list[Row]:
    """All rows of a tab-separated file with a header. Quotation marks are text, as in GLUE.

    Raises:
        TaskFileError: A column is missing, or a row is not as wide as the header; says in which line.
    """
    lines = read_text(path).split("\n")
    header = lines[0].split("\t")
    sentences, label = _columns(path, header)
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != len(header):
            raise TaskFileError(
                path,
                number,
                f"{len(cells)} columns where the header has {len(header)}",
                "put exactly one tab between two columns, and none into a sentence",
            )
        row = Row(tuple(cells[column].strip() for column in sentences), cells[label].strip())
        if not all((*row.sentences, row.label)):
            raise TaskFileError(path, number, "an empty sentence or label", "fill it in or leave the row out")
        rows.append(row)
    if not rows:
        raise TaskFileError(path, 1, "no row below the header", "give a file with sentences and labels")
    return rows


def _columns(path: Path, header: list[str]) -> tuple[list[int], int]:
    label = next((name for name in _LABELS if name in header), None)
    sentences = next((names for names in _SENTENCES if set(names) <= set(header)), None)
    if label is None or sentences is None:
        raise TaskFileError(
            path,
            1,
            f"the header names the columns {', '.join(repr(name) for name in header)[:300]}",
            "separate the columns by tabs and name them 'sentence' or 'sentence1' and 'sentence2', and 'label'",
        )
    return [header.index(name) for name in sentences], header.index(label)
