"""What a conversion changed: each block type's graph before and after, side by side, with the rule behind each line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from transformers import PreTrainedModel

from qdq_surgery.errors import ModelError
from qdq_surgery.graph.block_graph import BlockGraph, join_path
from qdq_surgery.hf.example_inputs import SHAPES, checked_examples, make_examples
from qdq_surgery.match.plan import Plan
from qdq_surgery.match.site_names import STATE_SUFFIXES
from qdq_surgery.report.graph_listing import Line, list_routine
from qdq_surgery.surgery.model_state import is_converted, plan_of
from qdq_surgery.text.view import Column, Part, Result, Table, View, line
from qdq_surgery.text.view import Line as Words
from qdq_surgery.trace.units import LoneLeaf, Survey, survey

__all__ = ["BlockDiff", "Diff", "Row", "diff"]

_STYLES = {" ": "", "+": "green", "-": "red", "~": "yellow"}


@dataclass(frozen=True)
class Row:
    """One line before, one after; one of them is missing where the other was put in or taken out."""

    before: Line | None
    after: Line | None

    @property
    def mark(self) -> str:
        """``+`` put in, ``-`` taken out, ``~`` another one, a space for the same."""
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
        """Whether any line is another one."""
        return any(row.mark != " " for row in self.rows)

    def where(self) -> str:
        """Such as ``encoder.layer.0.output, in 12 layers``."""
        count = len(self.layers)
        if not count:
            return self.paths[0]
        blocks = f", {len(self.paths)} blocks" if len(self.paths) != count else ""
        return f"{self.paths[0]}, in {count} layer{'s' if count > 1 else ''}{blocks}"

    def view(self) -> View:
        """Both sides beside each other, or one line under the other where there is no room."""
        names = ("before", "", "after", "rule: descriptor")
        columns = tuple(Column(name, wraps=bool(name)) for name in names)
        rows = tuple(_cells(row) for row in self.rows)
        narrow = tuple(each for row in self.rows for each in _lines(row))
        table = Table(columns, rows, header="dim", gap=1, narrow=narrow)
        return View(line((self.block, "bold"), f"  {self.where()}"), (table,), ruled=True)


@dataclass(frozen=True, repr=False)
class Diff(Result):
    """Before and after of a whole model.

    Attributes:
        plan: What the model was converted by.
        blocks: One for each type of block, in the order in which the model comes to them.
    """

    plan: Plan
    blocks: tuple[BlockDiff, ...]

    def _title(self) -> Words:
        count = f": {self.plan.counted()} by rule set "
        return line((self.plan.model, "bold"), count, (self.plan.rules.name, "bold"))

    def _parts(self) -> Iterable[Part]:
        for block in self.blocks:
            if block.changed:
                yield from ("", block.view())
        unchanged = list(dict.fromkeys(block.block for block in self.blocks if not block.changed))
        if unchanged:
            yield from ("", f"unchanged: {', '.join(unchanged)}", "")
        if self.plan.attention is not None:
            yield from (f"attention implementation: {self.plan.attention}", "")
        first, *others = self.plan.summary()
        yield first
        for table in others:
            yield from ("", table)

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

    Returns:
        By type of block the operators of both, line by line, with the rule that each quantizer comes from.

    Raises:
        ModelError: ``after`` is not converted, ``before`` is, or they are different models.
    """
    made = plan_of(after)
    if not isinstance(before, PreTrainedModel):
        raise ModelError(
            f"the first is a {type(before).__name__}; diff(before, after) wants the float model, a Hugging Face "
            "PreTrainedModel, first"
        )
    if is_converted(before):
        raise ModelError(
            f"the first {type(before).__name__} is converted; diff(before, after) wants the float model first"
        )
    weights, kept = before.state_dict(), after.state_dict()
    added = {name for name in kept if not name.endswith(STATE_SUFFIXES)} - set(weights)
    same = all(name in kept and kept[name].shape == value.shape for name, value in weights.items())
    if type(before) is not type(after) or added or not same:
        raise ModelError(
            f"the second model ({type(after).__name__}) is no conversion of the first ({type(before).__name__}): "
            "they differ in class or weights"
        )
    inputs = make_examples(before, SHAPES[0]) if example_inputs is None else checked_examples(before, example_inputs)
    surveys = survey(before, inputs), survey(after, inputs)
    for seen in surveys:
        seen.drop_examples()
    return Diff(made, tuple(_compare(*surveys)))


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
            name = type(routine.owner.leaf if isinstance(routine.owner, LoneLeaf) else routine.owner).__name__
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
    before, after = (None if side is None else side.text for side in (row.before, row.after))
    made: dict[str, Any] = {"mark": row.mark, "before": before, "after": after}
    if row.after is not None and row.after.quantizer is not None:
        made["quantizer"] = row.after.quantizer
        if row.after.provenance is not None:
            made["provenance"] = row.after.provenance._asdict()
    return made


def _cells(row: Row) -> tuple[Words, ...]:
    style, before = _STYLES[row.mark], "" if row.before is None else row.before.text
    after = (row.mark, "" if row.after is None else row.after.text, _reason(row.after))
    return line((before, "red" if row.mark == "-" else "")), *(line((text, style)) for text in after)


def _lines(row: Row) -> Iterator[Words]:
    if row.mark in ("-", "~") and row.before is not None:
        yield line((f"- {row.before.text}", "red"))
    if row.after is not None:
        mark = "+" if row.mark in ("+", "~") else " "
        yield line((f"{mark} {row.after.text}", _STYLES[mark]))
        if reason := _reason(row.after):
            yield line((f"    {reason}", "dim green"))


def _reason(line: Line | None) -> str:
    if line is None or line.provenance is None:
        return ""
    return f"{line.provenance.rule}: {line.provenance.descriptor}"
