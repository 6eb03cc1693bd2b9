"""What a conversion would do, as data: sites, refusals, counts. Nothing here decides or edits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qdq_surgery.match.edits import Edit, InsertQuantizer, Origin
from qdq_surgery.rules.quant_spec import QuantSpec
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.text.layer_names import star
from qdq_surgery.text.render import Rendered

__all__ = ["COVERED", "Coverage", "Plan", "Refusal", "Site"]

#: What the coverage table counts. A residual add is an add of two activations of the hidden states' shape.
COVERED = ("linear", "matmul", "residual add")


@dataclass(frozen=True)
class Site:
    """One operand of one node that gets a quantizer.

    Attributes:
        quantizer: Qualified name of the quantizer in the model.
        owner: Path of the module that gets it: the linear itself, or the block whose graph holds the node.
        routine: ``"module"`` for a linear, which is swapped; ``"forward"`` or ``"attention"``: which graph is edited.
        origin: Identity of the node within the source.
        position: Which argument of the node, as index or keyword.
        role: ``"input"`` or ``"weight"``: which default descriptor stands for ``default``.
        operator, capture: What is quantized, in the words of the rule's pattern.
        spec: ``None``: the default descriptor.
        source: Where the operator stands in the modeling file.
    """

    quantizer: str
    owner: str
    routine: str
    origin: Origin = field(repr=False)
    position: int | str
    role: str
    operator: str
    capture: str
    rule: str
    spec: QuantSpec | None
    layer: int | None
    source: str

    @property
    def name(self) -> str:
        """The quantizer's attribute name."""
        return self.quantizer.rpartition(".")[2]

    @property
    def edit(self) -> InsertQuantizer:
        """What the site does to the graph of its block, or to its linear."""
        return InsertQuantizer(self.origin, self.position, self.name, self.operator)

    def to_json(self) -> dict[str, Any]:
        return {
            "quantizer": self.quantizer,
            "rule": self.rule,
            "operand": f"{self.operator}({self.capture})",
            "spec": "default" if self.spec is None else str(self.spec),
            "layer": self.layer,
            "source": self.source,
        }


@dataclass(frozen=True)
class Refusal:
    """An operand or operator that gets no quantizer, with the reason.

    Attributes:
        path: The module that it belongs to.
        operator: The operator, or ``"block"`` for a block without a graph.
        reason: Why, and what would change it.
        rule: The rule concerned, if one is.
        count: How many such places the module has.
    """

    path: str
    operator: str
    reason: str
    rule: str | None = None
    layer: int | None = None
    source: str = ""
    count: int = 1

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "operator": self.operator,
            "rule": self.rule,
            "reason": self.reason,
            "layer": self.layer,
            "source": self.source,
            "count": self.count,
        }


@dataclass(frozen=True)
class Coverage:
    """How many operators of one kind the encoder layers have, and how many are quantized."""

    found: int
    quantized: int
    refused: int


@dataclass(frozen=True)
class Plan(Rendered):
    """What :func:`qdq_surgery.convert` would do to a model.

    Attributes:
        model: Name of the model's class.
        model_type: ``config.model_type``.
        matches: Matches by rule, before exclusions.
        coverage: By kind of operator, see :data:`COVERED`.
        layers: Number of encoder layers; shared layers count once.
        attention: The attention implementation that the model would be switched to; ``None`` if it stays.
        shared: Groups of quantizers that get one range.
    """

    model: str
    model_type: str
    rules: RuleSet
    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
    matches: dict[str, int]
    coverage: dict[str, Coverage]
    layers: int
    attention: str | None
    shared: tuple[tuple[str, ...], ...] = ()

    def quantizers_by_rule(self) -> dict[str, int]:
        """Number of quantizers that each rule puts in, in the order of the rules."""
        return {rule.name: sum(site.rule == rule.name for site in self.sites) for rule in self.rules.rules}

    def edits(self) -> dict[tuple[str, str], tuple[Edit, ...]]:
        """What is done to each linear and to each graph, by the path of its module and the sites' ``routine``."""
        found: dict[tuple[str, str], list[Edit]] = {}
        for site in self.sites:
            found.setdefault((site.owner, site.routine), []).append(site.edit)
        return {key: tuple(edits) for key, edits in found.items()}

    def counted(self) -> str:
        """How many edits of each kind there are, in words."""
        kinds = Counter({InsertQuantizer.counted: 0})
        kinds.update(edit.counted for edits in self.edits().values() for edit in edits)
        return ", ".join(f"{count} {kind}" for kind, count in kinds.items())

    def under(self, path: str) -> Iterator[Site | Refusal]:
        """Sites and refusals at or below the module ``path``, or of the quantizer ``path``."""
        items: list[Site | Refusal] = [*self.sites, *self.refusals]
        for item in items:
            where = item.quantizer if isinstance(item, Site) else item.path
            if not path or where == path or where.startswith(path + "."):
                yield item

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data; ``schema`` is the version of this form."""
        return {
            "schema": 1,
            "model": self.model,
            "model_type": self.model_type,
            "rules": self.rules.name,
            "layers": self.layers,
            "attention": self.attention,
            "matches": self.matches,
            "quantizers": self.quantizers_by_rule(),
            "coverage": {kind: vars(coverage) for kind, coverage in self.coverage.items()},
            "sites": [site.to_json() for site in self.sites],
            "refusals": [refusal.to_json() for refusal in self.refusals],
            "shared": [list(group) for group in self.shared],
        }

    def __rich__(self) -> RenderableType:
        title = Text.assemble(
            (self.model, "bold"),
            f": {self.counted()} by rule set ",
            (self.rules.name, "bold"),
            f" in {self.layers} layers",
        )
        parts: list[RenderableType] = [title]
        if self.attention is not None:
            parts.append(Text(f"attention implementation becomes {self.attention}"))
        if self.shared:
            parts.append(Text(f"{sum(map(len, self.shared))} quantizers share {len(self.shared)} ranges"))
        return Group(*parts, *self.summary())

    def summary(self) -> list[RenderableType]:
        """Tables: quantizers by rule, coverage of the encoder layers, refusals."""
        rules = _table("rule", "matches", "quantizers", "what")
        for name, count in self.quantizers_by_rule().items():
            rules.add_row(name, str(self.matches[name]), str(count), self.rules.rule(name).why)
        covered = _table("in the encoder layers", "found", "quantized", "refused")
        for kind, coverage in self.coverage.items():
            covered.add_row(kind, str(coverage.found), str(coverage.quantized), str(coverage.refused))
        refused = _table("left in float", "places", "reason")
        for (where, reason), count in self._refusals_by_reason().items():
            refused.add_row(where, str(count), reason)
        return [rules, covered, refused] if refused.row_count else [rules, covered]

    def _refusals_by_reason(self) -> dict[tuple[str, str], int]:
        """Refusals that differ only in the layer's number count as one."""
        groups: dict[tuple[str, str], int] = {}
        for refusal in self.refusals:
            where = star(refusal.path, refusal.layer)
            key = (where, refusal.reason)
            groups[key] = groups.get(key, 0) + refusal.count
        return groups


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        number = column in ("matches", "quantizers", "places", "found", "quantized", "refused")
        table.add_column(
            column,
            justify="right" if number else "left",
            overflow="fold",
            no_wrap=number or (index == 0 and len(columns) == 4),
        )
    return table
