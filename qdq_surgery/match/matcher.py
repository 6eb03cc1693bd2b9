"""Rules x recorded model -> :class:`Plan`. Reads only: nothing here edits a model or a graph.

How a pattern fits a node is in :mod:`~qdq_surgery.match.subgraph`; here is which rule wins, and what it gives. What got
nothing is counted in :mod:`~qdq_surgery.match.coverage`.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.fx import Node
from transformers import PreTrainedModel

from qdq_surgery.errors import MatchError
from qdq_surgery.graph.block_graph import BlockGraph, join_path
from qdq_surgery.graph.operators import is_plain_embedding, is_plain_linear
from qdq_surgery.hf.tied_weights import tied_names
from qdq_surgery.match.coverage import CoverageCount
from qdq_surgery.match.decisions import Decisions, ModulePaths, UnitDecisions, inner_path
from qdq_surgery.match.expectations import check_expectations
from qdq_surgery.match.plan import Plan, Site
from qdq_surgery.match.shared_ranges import share_ranges
from qdq_surgery.match.site_names import LINEAR_NAMES, site_name
from qdq_surgery.match.subgraph import Attempt, Slot, Value, fit, operand_of, place_of
from qdq_surgery.rules.quant_spec import LAST_AXIS, QuantSpec
from qdq_surgery.rules.spec import Rule, RuleSet
from qdq_surgery.trace.attention import QDQ_ATTENTION
from qdq_surgery.trace.units import Survey, Unit

__all__ = ["match"]


def match(model: PreTrainedModel, found: Survey, rules: RuleSet) -> Plan:
    """Decide where quantizers go.

    Args:
        found: The recorded model.

    Raises:
        MatchError: A rule matches nothing, a count is not what the rule expects, or an exclusion excludes nothing.
    """
    paths, decisions = ModulePaths(model), Decisions()
    coverage = CoverageCount(model, paths, decisions, found.linears)
    for unit in found.units:
        if unit.tree is None:
            coverage.add_uncalled(unit, set())
            continue
        for graph in unit.tree.opaque():
            reason = f"{graph.failure}; rules cannot look inside"
            decisions.refuse(join_path(unit.path, graph.path), "block", reason, unit.layer)
        matcher = _UnitMatcher(model, rules, paths, decisions, unit)
        matcher.run(unit.tree)
        coverage.add(unit, unit.tree, matcher.decided)
    _leave_shared_tables(model, decisions)
    names = sorted({site.name for site in decisions.sites.values()})
    check_expectations(rules, decisions.tally, found, model, names)
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    sites = sorted(decisions.sites.values(), key=lambda site: order[site.owner])
    refusals = sorted(decisions.refusals.items(), key=lambda item: order.get(item[0].path, -1))
    return Plan(
        model=type(model).__name__,
        model_type=str(model.config.model_type),
        rules=rules,
        sites=tuple(sites),
        refusals=tuple(replace(refusal, count=count) for refusal, count in refusals),
        matches={rule.name: decisions.matches[rule.name] for rule in rules.rules},
        coverage=coverage.result(),
        layers=sum(unit.layer is not None for unit in found.units),
        attention=QDQ_ATTENTION if any(site.routine == "attention" for site in sites) else None,
        shared=share_ranges(rules, sites),
    )


def _leave_shared_tables(model: PreTrainedModel, decisions: Decisions) -> None:
    """Refuse tables that are the weights of linears, too, if these stay in float.

    A file would hold both, the integers and the float weight, and be larger than without the integers.
    """
    tables = [site for site in decisions.sites.values() if site.operator == "embedding" and site.routine == "module"]
    for site in tables:
        for name in tied_names(model, f"{site.owner}.weight"):
            path = name.rpartition(".")[0]
            quantizer = f"{path}.{LINEAR_NAMES['weight']}"
            if isinstance(model.get_submodule(path), nn.Linear) and quantizer not in decisions.sites:
                reason = (
                    f"its table is the weight of {path}, too, which stays in float: integers would come on top of it"
                )
                decisions.refuse(site.owner, site.operator, reason, site.layer, site.rule, site.source)
                decisions.sites.pop(site.quantizer, None)
                break


class _UnitMatcher:
    """Tries all rules on one unit: a match gives sites, or refusals with their reasons."""

    def __init__(
        self, model: PreTrainedModel, rules: RuleSet, paths: ModulePaths, decisions: Decisions, unit: Unit
    ) -> None:
        self.model, self.rules, self.paths, self.decisions, self.unit = model, rules, paths, decisions, unit
        self.decided = UnitDecisions()

    def run(self, tree: BlockGraph) -> None:
        for rule in self.rules.rules:
            for graph in tree.walk():
                for node in graph.graph.nodes:
                    if Value(graph, node).is_a(rule.pattern.operators[0]):
                        self._try(rule, graph, node)

    def _try(self, rule: Rule, graph: BlockGraph, node: Node) -> None:
        unit, place = self.unit, place_of(graph, node)
        inside = inner_path(unit, graph, node)
        paths = (join_path(unit.path, graph.path), inside)
        if not any(rule.scope.holds(path, unit.layer) for path in paths):
            return
        attempt, value = Attempt(), Value(graph, node)
        if rule.unless is not None and value.is_a(rule.unless.operators[0]) and fit(rule.unless, value, Attempt()):
            return
        if fit(rule.pattern, value, attempt) and self._has_rows(rule, graph, node, attempt):
            self.decisions.tally.fit(rule, unit, (unit.path, place))
            self._apply(rule, attempt.captured)
            return
        reason = f"rule '{rule.name}': {attempt.reason}"
        best = self.decided.near.get(place)
        if best is None or attempt.depth > best[0]:
            self.decided.near[place] = (attempt.depth, reason)
        self.decisions.tally.miss(rule, attempt.depth, f"{reason} at {inside} ({node.meta['source']})")

    def _apply(self, rule: Rule, captured: dict[str, Slot]) -> None:
        free = {capture: slot for capture, slot in captured.items() if slot.key() not in self.decided.claimed}
        wanted = [capture for capture in rule.quantize if capture in free]
        if wanted:
            self.decisions.matches[rule.name] += 1
        for capture in wanted:
            slot = free[capture]
            self.decided.claimed.add(slot.key())
            self.decided.quantized.add(place_of(slot.graph, slot.node))
            self._decide(rule, capture, slot)

    def _decide(self, rule: Rule, capture: str, slot: Slot) -> None:
        """A site for one operand, or a refusal."""
        owner, role = self.paths.of_node(self.unit, slot.graph, slot.node), _role(slot)
        operator, source = str(slot.node.meta["op"]), str(slot.node.meta["source"])
        name = ""
        reason = self._unfit(slot, owner)
        if reason is None:
            name = self._unique_name(rule, capture, slot, owner)
            reason = self._left_out(rule, slot, owner, name)
        if reason is not None:
            self.decisions.refuse(owner, operator, reason, self.unit.layer, rule.name, source)
            return
        place = rule.quantize[capture]
        spec = self.rules.spec(place.spec)
        _check_axis(rule, capture, slot, spec, f"{owner} ({source})")
        site = Site(
            quantizer=f"{owner}.{name}",
            owner=owner,
            routine="module" if slot.of_module else slot.graph.kind,
            origin=slot.node.meta["origin"],
            position=slot.position,
            role=role,
            operator=operator,
            capture=capture,
            rule=rule.name,
            spec=spec,
            layer=self.unit.layer,
            source=source,
        )
        self.decisions.sites[site.quantizer] = site

    def _unfit(self, slot: Slot, owner: str) -> str | None:
        """Why what the operand belongs to cannot take a quantizer."""
        operator = slot.node.meta["op"]
        if not slot.of_module:
            return slot.graph.baked_size
        if operator == "embedding":
            return self._unfit_table(slot, self.model.get_submodule(owner))
        if operator != "linear":
            return f"only linears and embeddings are swapped, and this is a {operator}"
        module = self.model.get_submodule(owner)
        if not is_plain_linear(module):
            return f"{type(module).__name__} is no plain nn.Linear: it has a class, a forward or a weight of its own"
        return next((_RENAME.format("linear", name) for name in LINEAR_NAMES.values() if hasattr(module, name)), None)

    def _unfit_table(self, slot: Slot, module: nn.Module) -> str | None:
        """The same of an embedding's table."""
        if slot.position != "weight":
            return "what an embedding is given are integers already; quantize its table: embedding(_, w)"
        if not is_plain_embedding(module):
            return (
                f"{type(module).__name__} is no plain nn.Embedding: it has a class, a forward, a weight or a max_norm "
                "of its own"
            )
        name = LINEAR_NAMES["weight"]
        return _RENAME.format("embedding", name) if hasattr(module, name) else None

    def _has_rows(self, rule: Rule, graph: BlockGraph, node: Node, attempt: Attempt) -> bool:
        """Whether the table that an embedding looks up has as many rows as the rule asks for."""
        if rule.rows is None:
            return True
        module = (
            self.model.get_submodule(self.paths.of_node(self.unit, graph, node)) if node.op == "call_module" else None
        )
        rows = getattr(module, "num_embeddings", None)
        if rows is not None and rule.rows.holds(rows):
            return True
        found = "no table of its own" if rows is None else f"a table of {rows} rows"
        attempt.reason = f"this embedding has {found}, and the rule is for {rule.rows}"
        return False

    def _unique_name(self, rule: Rule, capture: str, slot: Slot, owner: str) -> str:
        """The quantizer's name, numbered where its block has several of that name."""
        if slot.of_module:
            return LINEAR_NAMES[_role(slot)]
        place, operator = rule.quantize[capture], str(slot.node.meta["op"])
        name = site_name(place, operator, capture)
        self.decided.named[owner, name] += 1
        return site_name(place, operator, capture, self.decided.named[owner, name])

    def _left_out(self, rule: Rule, slot: Slot, owner: str, name: str) -> str | None:
        """Why the quantizer of that name is not to be."""
        if not slot.of_module and hasattr(self.model.get_submodule(owner), name):
            return _RENAME.format("block", name)
        for index, exclude in enumerate(self.rules.exclude):
            if exclude.holds(rule.name, name, owner, self.unit.layer):
                self.decisions.tally.excluded.add(index)
                return f"left in float by {exclude.source or 'an exclude entry'} ({name}): {exclude.why}"
        return None


_RENAME = "the {} has an attribute '{}' already; rename it"


def _role(slot: Slot) -> str:
    """Which of the two default descriptors an operand has."""
    if slot.of_module:
        return "weight" if slot.position == "weight" else "input"
    operand = operand_of(slot.node, slot.position)
    return "weight" if isinstance(operand, Node) and operand.meta.get("op") == "parameter" else "input"


def _check_axis(rule: Rule, capture: str, slot: Slot, spec: QuantSpec | None, where: str) -> None:
    """Ranges of a tensor's parts need parts that are the same ones in every call.

    Raises:
        MatchError: The operand has none along the axis of its spec.
    """
    if spec is None or spec.axis is None:
        return
    operand = operand_of(slot.node, slot.position)
    shape = operand.meta.get("shape") if isinstance(operand, Node) else None
    axes = 2 if operand is None else spec.axis + 1 if shape is None else len(shape)  # a module's weight is a matrix
    wrong = f"the tensor has {axes} axes, counted from 0" if spec.axis >= axes else ""
    if _role(slot) == "weight":
        fix = "write axis: 0, a range for each output channel"
        if spec.axis == LAST_AXIS:
            wrong = "that is for activations, and this is a weight"
    else:
        fix = "write axis: null, or axis: -1 for a scale for each channel"
        if spec.axis == 0:
            wrong = "the rows of an activation are others in each batch"
        elif isinstance(operand, Node) and spec.axis in operand.meta.get("open_axes", ()):
            wrong = "the tensor has another size there where texts have another length"
    if wrong:
        place = f"{rule.source + ': ' if rule.source else ''}rule '{rule.name}'"
        raise MatchError(f"{place} gives '{capture}' a spec with axis: {spec.axis} at {where}, but {wrong}; {fix}")
