"""What a conversion would do, as data: sites, refusals, counts. Nothing here decides or edits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qdq_surgery.match.edits import Edit, InsertQuantizer, Origin
from qdq_surgery.rules.quant_spec import QuantSpec
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.text.layer_names import star
from qdq_surgery.text.view import Column, Line, Part, Result, Table, line, number

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
        rule: The rule that asks for it.
        spec: ``None``: the default descriptor.
        layer: Index of the encoder layer; ``None`` outside the layers.
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
        """The site as plain data."""
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
        layer: Index of the encoder layer; ``None`` outside the layers.
        source: Where the operator stands in the modelling file; empty where nothing was recorded.
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
        """The refusal as plain data."""
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


@dataclass(frozen=True, repr=False)
class Plan(Result):
    """What :func:`qdq_surgery.convert` would do to a model.

    Attributes:
        model: Name of the model's class.
        model_type: ``config.model_type``.
        sites: The quantizers, in the order of the model's modules.
        refusals: What gets none, and why.
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

    def _title(self) -> Line:
        count, layers = f": {self.counted()} by rule set ", f" in {self.layers} layers"
        return line((self.model, "bold"), count, (self.rules.name, "bold"), layers)

    def _parts(self) -> Iterable[Part]:
        if self.attention is not None:
            yield f"attention implementation becomes {self.attention}"
        if self.shared:
            yield f"{sum(map(len, self.shared))} quantizers share {len(self.shared)} ranges"
        yield from self.summary()

    def summary(self) -> list[Table]:
        """Tables: quantizers by rule, coverage of the encoder layers, refusals."""
        counts = self.quantizers_by_rule().items()
        rules = tuple((name, str(self.matches[name]), str(count), self.rules.rule(name).why) for name, count in counts)
        covered = tuple((kind, *map(str, vars(coverage).values())) for kind, coverage in self.coverage.items())
        refused = tuple((where, str(count), why) for (where, why), count in self._refusals_by_reason().items())
        where = Column("in the encoder layers", wraps=False)
        tables = [
            Table((Column("rule", wraps=False), number("matches"), number("quantizers"), Column("what")), rules),
            Table((where, number("found"), number("quantized"), number("refused")), covered),
            Table((Column("left in float"), number("places"), Column("reason")), refused),
        ]
        return tables if refused else tables[:2]

    def _refusals_by_reason(self) -> dict[tuple[str, str], int]:
        """Refusals that differ only in the layer's number count as one."""
        groups: dict[tuple[str, str], int] = {}
        for refusal in self.refusals:
            where = star(refusal.path, refusal.layer)
            key = (where, refusal.reason)
            groups[key] = groups.get(key, 0) + refusal.count
        return groups
