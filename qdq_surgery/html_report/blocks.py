"""The diff as a tree of blocks, whose lines know their quantizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qdq_surgery.graph.block_graph import join_path
from qdq_surgery.html_report.cards import Card
from qdq_surgery.report.diff import BlockDiff, Diff
from qdq_surgery.text.view import Line, Table

__all__ = ["Block", "Row", "tree_of"]


@dataclass(frozen=True)
class Row:
    """One line of a block.

    Attributes:
        mark: ``+``, ``-``, ``~`` or a space.
        before, after, reason: The cells of the diff's own table.
        cards: Which quantizers it stands for, one for each block, as places among all.
    """

    mark: str
    before: Line
    after: Line
    reason: Line
    cards: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A type of block.

    Attributes:
        name: Its class.
        where: Its path, and in how many layers it is.
        inside: The types of blocks that are called in it.
    """

    name: str
    where: str
    changed: bool
    rows: tuple[Row, ...]
    inside: list[Block] = field(default_factory=list)

    @property
    def opened(self) -> bool:
        """Whether anything in it is changed, at any depth."""
        return self.changed or any(each.opened for each in self.inside)

    @property
    def quantizers(self) -> int:
        """How many quantizers stand in its own lines, in one block."""
        return sum(bool(row.cards) for row in self.rows)


def tree_of(diff: Diff, cards: Sequence[Card]) -> list[Block]:
    """The types of blocks that are in no other one; in them those that they call."""
    places = {name: at for at, card in enumerate(cards) for name in (card.planned, card.name)}
    roots: list[Block] = []
    above: list[tuple[str, Block]] = []
    for each in diff.blocks:
        path, block = each.paths[0], _block(each, places)
        holders = [(home, one) for home, one in above if path == home or path.startswith(f"{home}.")]
        (max(holders, key=lambda holder: len(holder[0]))[1].inside if holders else roots).append(block)
        if not any(home == path for home, _ in above):
            above.append((path, block))
    return roots


def _block(diff: BlockDiff, places: Mapping[str, int]) -> Block:
    [table] = [part for part in diff.view().parts if isinstance(part, Table)]
    rows = []
    for row, cells in zip(diff.rows, table.rows, strict=True):
        before, mark, after, reason = (cell for cell in cells if isinstance(cell, Line))
        inner = None if row.after is None else row.after.quantizer
        names = [] if inner is None else [join_path(path, inner) for path in diff.paths]
        found = tuple(places[name] for name in names if name in places)
        rows.append(Row(str(mark).strip() or " ", before, after, reason, found))
    return Block(diff.block, diff.where(), diff.changed, tuple(rows))
