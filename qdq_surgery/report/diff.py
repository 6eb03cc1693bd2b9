"""What a conversion changed: each block type's graph before and after, side by side, with the rule behind each line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.rule import Rule as Line_
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from qdq_surgery.errors import ModelError
from qdq_surgery.graph.block_graph import BlockGraph, join_path
from qdq_surgery.hf.example_inputs import SHAPES, checked_examples, make_examples
from qdq_surgery.match.plan import Plan
from qdq_surgery.report.graph_listing import Line, list_routine
from qdq_surgery.surgery.model_state import plan_of
from qdq_surgery.text.render import Rendered
from qdq_surgery.trace.units import Alone, Survey, survey

__all__ = ["BlockDiff", "Diff", "Row", "diff"]

#: Below this many columns the two sides stand under each other.
_WIDE = 100


@dataclass(frozen=True)
class Row:
    """One line before, one after; one of them is missing where the other was put in or taken out."""

    before: Line | None
    after: Line | None

    @property
    def mark(self) -> str:
        if self.before is None:
            return "+"
        if self.after is None:
            return "-"
        return " " if self.before.text == self.after.text else "~"


@dataclass(frozen=True)
class BlockDiff:
    """One block type.

    Attributes:
        block: The class, and for attention functions the function.
        paths: Every block that this stands for.
        layers: The encoder layers that they are in.
    """

    block: str
    paths: tuple[str, ...]
    layers: tuple[int, ...]
    rows: tuple[Row, ...] = field(repr=False)

    @property
    def changed(self) -> bool:
        return any(row.mark != " " for row in self.rows)

    def where(self) -> str:
        """Such as ``encoder.layer.0.output, in 12 layers``."""
        count = len(self.layers)
        if not count:
            return self.paths[0]
        blocks = f", {len(self.paths)} blocks" if len(self.paths) != count else ""
        return f"{self.paths[0]}, in {count} layer{'s' if count > 1 else ''}{blocks}"


@dataclass(frozen=True)
class Diff(Rendered):
    """Before and after of a whole model."""

    plan: Plan
    blocks: tuple[BlockDiff, ...]

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [
            Text.assemble(
                (self.plan.model, "bold"),
                f": {self.plan.counted()} by rule set ",
                (self.plan.rules.name, "bold"),
            )
        ]
        parts += [_BlockView(block) for block in self.blocks if block.changed]
        unchanged = list(dict.fromkeys(block.block for block in self.blocks if not block.changed))
        if unchanged:
            parts.append(Text(f"\nunchanged: {', '.join(unchanged)}\n"))
        if self.plan.attention is not None:
            parts.append(Text(f"attention implementation: {self.plan.attention}\n"))
        for table in self.plan.summary():
            parts += [table, Text()]
        return Group(*parts[:-1])

    def to_json(self) -> dict[str, Any]:
        """The diff as plain data; ``schema`` is the version of this form."""
        blocks = [
            {
                "block": block.block,
                "paths": list(block.paths),
                "layers": list(block.layers),
                "changed": block.changed,
                "rows": [_row_json(row) for row in block.rows],
            }
            for block in self.blocks
        ]
        return {"schema": 1, "blocks": blocks, "plan": self.plan.to_json()}


def diff(before: PreTrainedModel, after: PreTrainedModel, *, example_inputs: dict[str, Any] | None = None) -> Diff:
    """Compare a float model with its conversion. Both are run on a tiny example; neither is changed.

    Args:
        before: The float model.
        after: What :func:`qdq_surgery.convert` made of it, or of a model like it.
        example_inputs: As for :func:`qdq_surgery.convert`.

    Raises:
        ModelError: ``after`` is not converted, ``before`` is, or they are different models.
    """
    made = plan_of(after)
    if "_qdq_plan" in vars(before):
        raise ModelError(
            f"the first {type(before).__name__} is converted; diff(before, after) wants the float model first"
        )
    weights, kept = before.state_dict(), after.state_dict()
    added = {name for name in kept if not name.endswith("_quantizer._amax")} - set(weights)
    same = all(name in kept and kept[name].shape == value.shape for name, value in weights.items())
    if type(before) is not type(after) or added or not same:
        raise ModelError(
            f"the second model ({type(after).__name__}) is no conversion of the first ({type(before).__name__}): "
            "they differ in class or weights"
        )
    inputs = make_examples(before, SHAPES[0]) if example_inputs is None else checked_examples(before, example_inputs)
    return Diff(made, tuple(_compare(survey(before, inputs), survey(after, inputs))))


def _compare(before: Survey, after: Survey) -> Iterator[BlockDiff]:
    """One entry per block type, in the order in which the model comes to them."""
    listings: dict[int, tuple[Line, ...]] = {}

    def lines(routine: BlockGraph) -> tuple[Line, ...]:
        if id(routine) not in listings:
            listings[id(routine)] = () if routine.failure is not None else tuple(list_routine(routine))
        return listings[id(routine)]

    groups: dict[tuple[Any, ...], tuple[list[str], list[int]]] = {}
    for one, other in zip(before.units, after.units, strict=True):
        if one.tree is None or other.tree is None:
            continue
        for routine, twin in zip(one.tree.walk(), other.tree.walk(), strict=False):
            path = join_path(one.path, routine.path)
            owner = routine.owner.leaf if isinstance(routine.owner, Alone) else routine.owner
            name = type(owner).__name__
            if routine.kind == "attention":
                name += f": {routine.function}"
            if routine.failure is not None:
                name += " (no graph)"
            paths, layers = groups.setdefault((name, lines(routine), lines(twin)), ([], []))
            paths.append(path)
            if one.layer is not None and one.layer not in layers:
                layers.append(one.layer)
    for (name, left, right), (paths, layers) in groups.items():
        yield BlockDiff(name, tuple(dict.fromkeys(paths)), tuple(layers), tuple(_align(left, right)))


def _align(before: tuple[Line, ...], after: tuple[Line, ...]) -> Iterator[Row]:
    matcher = SequenceMatcher(None, [line.key for line in before], [line.key for line in after], autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == "equal":
            yield from (Row(before[i], after[j]) for i, j in zip(range(i1, i2), range(j1, j2), strict=True))
            continue
        yield from (Row(before[i], None) for i in range(i1, i2))
        yield from (Row(None, after[j]) for j in range(j1, j2))


def _row_json(row: Row) -> dict[str, Any]:
    made: dict[str, Any] = {
        "mark": row.mark,
        "before": None if row.before is None else row.before.text,
        "after": None if row.after is None else row.after.text,
    }
    if row.after is not None and row.after.quantizer is not None:
        made["quantizer"] = row.after.quantizer
        if row.after.provenance is not None:
            made["provenance"] = row.after.provenance._asdict()
    return made


@dataclass(frozen=True)
class _BlockView:
    """Draws one block type: in two columns where there is room, else one line under the other."""

    block: BlockDiff

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text()
        yield Line_(Text.assemble((self.block.block, "bold"), f"  {self.block.where()}"), align="left", characters="-")
        yield self._two_columns() if options.max_width >= _WIDE else self._one_column()

    def _two_columns(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), expand=False, header_style="dim")
        table.add_column("before", ratio=4, overflow="fold")
        table.add_column("", width=1)
        table.add_column("after", ratio=5, overflow="fold")
        table.add_column("rule: descriptor", ratio=3, overflow="fold")
        for row in self.block.rows:
            style = _STYLES[row.mark]
            table.add_row(
                Text("" if row.before is None else row.before.text, style="red" if row.mark == "-" else ""),
                Text(row.mark, style=style),
                Text("" if row.after is None else row.after.text, style=style),
                Text(_reason(row.after), style=style),
            )
        return table

    def _one_column(self) -> Text:
        text = Text()
        for row in self.block.rows:
            if row.mark in ("-", "~") and row.before is not None:
                text.append(f"- {row.before.text}\n", style="red")
            if row.after is not None:
                mark = "+" if row.mark in ("+", "~") else " "
                text.append(f"{mark} {row.after.text}\n", style=_STYLES[mark])
                if reason := _reason(row.after):
                    text.append(f"    {reason}\n", style="dim green")
        text.rstrip()
        return text


_STYLES = {" ": "", "+": "green", "-": "red", "~": "yellow"}


def _reason(line: Line | None) -> str:
    if line is None or line.provenance is None:
        return ""
    return f"{line.provenance.rule}: {line.provenance.descriptor}"
