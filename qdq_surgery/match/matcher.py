"""Rules x recorded model -> :class:`Plan`. Reads only: nothing here edits a model or a graph.

How a pattern fits a node is in :mod:`~qdq_surgery.match.subgraph`; here is which rule wins, and what is left out or
missed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import nn
from torch.fx import Node
from transformers import PreTrainedModel

from qdq_surgery.graph.block_graph import BlockGraph, join_path
from qdq_surgery.graph.operators import is_plain_linear
from qdq_surgery.match.expectations import Tally, check_expectations
from qdq_surgery.match.plan import COVERED, Coverage, Plan, Refusal, Site
from qdq_surgery.match.shared_ranges import share_ranges
from qdq_surgery.match.site_names import LINEAR_NAMES, site_name
from qdq_surgery.match.subgraph import Attempt, Slot, Value, fit, operand_of, place_of
from qdq_surgery.rules.pattern import operator_fits
from qdq_surgery.rules.spec import Rule, RuleSet
from qdq_surgery.trace.attention import QDQ_ATTENTION
from qdq_surgery.trace.units import Survey, Unit

__all__ = ["match"]

#: Matrix products that are no plain matmul; the recipe has no rule for them, so they are listed.
_OTHER_PRODUCTS = frozenset({"baddbmm", "einsum", "sdpa", "conv1d"})


@dataclass(frozen=True)
class _Match:
    """A rule whose pattern fits, and what it captured."""

    rule: Rule
    captured: dict[str, Slot]


@dataclass
class _State:
    """What is decided about one unit so far.

    Attributes:
        claimed: Operands that a rule took: the first match wins.
        quantized: Operators with such an operand.
        near: By operator, the rule that came nearest to fitting, how far it came and why it failed.
        taken: How often each quantizer name was used in each block.
    """

    claimed: set[tuple[Hashable, int | str]] = field(default_factory=set)
    quantized: set[Hashable] = field(default_factory=set)
    near: dict[Hashable, tuple[int, str]] = field(default_factory=dict)
    taken: dict[tuple[str, str], int] = field(default_factory=dict)


def match(model: PreTrainedModel, found: Survey, rules: RuleSet) -> Plan:
    """Decide where quantizers go.

    Args:
        found: The recorded model.

    Raises:
        MatchError: A rule matches nothing, a count is not what the rule expects, or an exclusion excludes nothing.
    """
    matcher = _Matcher(model, found, rules)
    matcher.run()
    return matcher.plan()


class _Matcher:
    def __init__(self, model: PreTrainedModel, found: Survey, rules: RuleSet) -> None:
        self.model, self.found, self.rules = model, found, rules
        self.sites: dict[str, Site] = {}
        self.refusals: Counter[Refusal] = Counter()
        self.matches: Counter[str] = Counter()
        self.tally = Tally()
        first: dict[int, str] = {}
        #: A module that hangs in several places has one name: the first.
        self.names = {
            path: first.setdefault(id(module), path) for path, module in model.named_modules(remove_duplicate=False)
        }
        self.covered: dict[str, Counter[str]] = {kind: Counter() for kind in COVERED}

    # -- the walk ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        for unit in self.found.units:
            if unit.tree is None:
                self._uncalled(unit, set())
                continue
            for routine in unit.tree.opaque():
                reason = f"{routine.failure}; rules cannot look inside"
                self._refuse(join_path(unit.path, routine.path), "block", reason, unit.layer)
            self._unit(unit, unit.tree)
        sites = sorted({site.name for site in self.sites.values()})
        check_expectations(self.rules, self.tally, self.found, type(self.model).__name__, self._model_type(), sites)

    def _unit(self, unit: Unit, tree: BlockGraph) -> None:
        state = _State()
        for rule in self.rules.rules:
            for routine in tree.walk():
                path = join_path(unit.path, routine.path)
                for node in routine.graph.nodes:
                    if not operator_fits(rule.pattern.operators[0], node.meta.get("op", "")):
                        continue
                    inside = _leaf_path(unit, path, str(node.target)) if node.op == "call_module" else path
                    if not (rule.scope.holds(path, unit.layer) or rule.scope.holds(inside, unit.layer)):
                        continue
                    attempt = Attempt()
                    if not fit(rule.pattern, Value(routine, node), attempt):
                        reason = f"rule '{rule.name}': {attempt.reason}"
                        best = state.near.get(place_of(routine, node))
                        if best is None or attempt.depth > best[0]:
                            state.near[place_of(routine, node)] = (attempt.depth, reason)
                        self.tally.miss(rule, attempt.depth, f"{reason} at {inside} ({node.meta['source']})")
                        continue
                    self.tally.fit(rule, unit, (unit.path, place_of(routine, node)))
                    self._apply(_Match(rule, attempt.captured), unit, state)
        self._cover(unit, tree, state)

    def _apply(self, found: _Match, unit: Unit, state: _State) -> None:
        rule = found.rule
        free = {capture: slot for capture, slot in found.captured.items() if slot.key() not in state.claimed}
        wanted = [capture for capture in rule.quantize if capture in free]
        if not wanted:
            return
        self.matches[rule.name] += 1
        for capture in wanted:
            slot = free[capture]
            state.claimed.add(slot.key())
            state.quantized.add(place_of(slot.routine, slot.node))
            self._site(found, capture, slot, unit, state)

    def _site(self, found: _Match, capture: str, slot: Slot, unit: Unit, state: _State) -> None:
        rule, node, routine = found.rule, slot.node, slot.routine
        place = rule.quantize[capture]
        path = join_path(unit.path, routine.path)
        op = str(node.meta["op"])
        source = str(node.meta["source"])
        if node.op == "call_module":
            owner = self.names[_leaf_path(unit, path, str(node.target))]
            if op != "linear":
                self._refuse(owner, op, f"only linears are swapped, and this is a {op}", unit.layer, rule.name, source)
                return
            module = self.model.get_submodule(owner)
            if not is_plain_linear(module):
                reason = (
                    f"{type(module).__name__} is no plain nn.Linear: it has a class, a forward or a weight of its own"
                )
                self._refuse(owner, op, reason, unit.layer, rule.name, source)
                return
            taken = [name for name in LINEAR_NAMES.values() if hasattr(module, name)]
            if taken:
                reason = f"the linear has an attribute '{taken[0]}' already; rename it"
                self._refuse(owner, op, reason, unit.layer, rule.name, source)
                return
            role = "weight" if slot.position == "weight" else "input"
            name, kind = LINEAR_NAMES[role], "module"
        else:
            owner, kind = self.names[path], routine.kind
            if routine.baked_size is not None:
                self._refuse(owner, op, routine.baked_size, unit.layer, rule.name, source)
                return
            operand = operand_of(node, slot.position)
            role = "weight" if isinstance(operand, Node) and operand.meta.get("op") == "parameter" else "input"
            name = site_name(place, op, capture)
            number = state.taken[owner, name] = state.taken.get((owner, name), 0) + 1
            name = site_name(place, op, capture, number)
            if hasattr(self.model.get_submodule(owner), name):
                self._refuse(
                    owner, op, f"the block has an attribute '{name}' already; rename it", unit.layer, rule.name, source
                )
                return
        for index, exclude in enumerate(self.rules.exclude):
            if exclude.holds(rule.name, name, owner, unit.layer):
                self.tally.excluded.add(index)
                reason = f"left in float by {exclude.source or 'an exclude entry'} ({name}): {exclude.why}"
                self._refuse(owner, op, reason, unit.layer, rule.name, source)
                return
        site = Site(
            quantizer=f"{owner}.{name}",
            owner=owner,
            routine=kind,
            origin=node.meta["origin"],
            position=slot.position,
            role=role,
            operator=op,
            capture=capture,
            rule=rule.name,
            spec=self.rules.spec(place.spec),
            layer=unit.layer,
            source=source,
        )
        self.sites[site.quantizer] = site

    # -- what got nothing --------------------------------------------------------------------------------------

    def _cover(self, unit: Unit, tree: BlockGraph, state: _State) -> None:
        counted: set[Hashable] = set()
        called = {
            self.names[_leaf_path(unit, join_path(unit.path, routine.path), str(node.target))]
            for routine in tree.walk()
            for node in routine.graph.nodes
            if node.op == "call_module"
        }
        self._uncalled(unit, called)
        for routine in tree.walk():
            path = join_path(unit.path, routine.path)
            for node in routine.graph.nodes:
                kind = self._kind(routine, node, state)
                if kind is None:
                    continue
                where = self.names[path]
                if node.op == "call_module":
                    where = self.names[_leaf_path(unit, path, str(node.target))]
                place = where if node.op == "call_module" else place_of(routine, node)
                if place in counted:
                    continue
                counted.add(place)
                self._count(kind, unit, routine, node, where, state)

    def _count(self, kind: str, unit: Unit, routine: BlockGraph, node: Node, where: str, state: _State) -> None:
        counts = self.covered[kind if kind in self.covered else "matmul"]
        if unit.layer is None:
            # Embeddings, pooler and heads: the table is about the encoder layers, but what stays in float is said.
            counts = Counter()
            if kind == "residual add":
                return
        counts["found"] += 1
        source = str(node.meta["source"])
        sites = [s for s in self.sites.values() if s.origin == node.meta["origin"] and s.owner == where]
        if sites:
            counts["quantized"] += 1
            return
        counts["refused"] += 1
        if place_of(routine, node) in state.quantized:
            return  # refused already, with its own reason
        best = state.near.get(place_of(routine, node))
        where_rules = "outside the encoder layers" if unit.layer is None else "here"
        reason = f"no rule is about a {kind} {where_rules}" if best is None else best[1]
        self._refuse(where, kind, reason, unit.layer, None, source)

    def _kind(self, routine: BlockGraph, node: Node, state: _State) -> str | None:
        op = str(node.meta.get("op"))
        if op in ("linear", "matmul") or op in _OTHER_PRODUCTS:
            return op
        if op == "add" and (place_of(routine, node) in state.quantized or self._is_residual(node)):
            return "residual add"
        return None

    def _is_residual(self, node: Node) -> bool:
        shapes = [operand.meta.get("shape") for operand in node.args if isinstance(operand, Node)]
        return (
            len(shapes) == 2
            and shapes[0] is not None
            and shapes[0] == shapes[1]
            and len(shapes[0]) == 3
            and tuple(shapes[0][:2]) == self.found.shape
        )

    def _uncalled(self, unit: Unit, called: set[str]) -> None:
        """Linears of the unit that the example never came to: cross-attention without encoder states, for one."""
        used = {
            join_path(unit.path, routine.path, str(node.target)).rpartition(".")[0]
            for routine in (unit.tree.walk() if unit.tree is not None else ())
            for node in routine.graph.nodes
            if node.op == "get_attr"
        }
        opaque = [join_path(unit.path, r.path) for r in unit.tree.opaque()] if unit.tree is not None else []
        for name, module in self.model.get_submodule(unit.path).named_modules():
            path = self.names[join_path(unit.path, name)]
            # (MobileBERT's head multiplies with the weights of linears that it never calls: that product is listed.)
            if not isinstance(module, nn.Linear) or path in called or path in used:
                continue
            if any(path.startswith(block + ".") for block in opaque):
                reason = "it lies in a block that has no graph"
            else:
                reason = "the example inputs never reach it; pass example_inputs= that do"
            self._refuse(path, "linear", reason, unit.layer)
            if unit.layer is not None:
                self.covered["linear"].update(found=1, refused=1)

    def _refuse(
        self, path: str, op: str, reason: str, layer: int | None, rule: str | None = None, source: str = ""
    ) -> None:
        self.refusals[Refusal(path, op, reason, rule, layer, source)] += 1

    def _model_type(self) -> str:
        return str(self.model.config.model_type)

    # -- the result --------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        order = {name: index for index, (name, _) in enumerate(self.model.named_modules())}
        sites = sorted(self.sites.values(), key=lambda site: order[site.owner])
        refusals = [
            Refusal(r.path, r.operator, r.reason, r.rule, r.layer, r.source, count)
            for r, count in sorted(self.refusals.items(), key=lambda item: order.get(item[0].path, -1))
        ]
        switched = any(site.routine == "attention" for site in sites)
        return Plan(
            model=type(self.model).__name__,
            model_type=self._model_type(),
            rules=self.rules,
            sites=tuple(sites),
            refusals=tuple(refusals),
            matches={rule.name: self.matches[rule.name] for rule in self.rules.rules},
            coverage={kind: Coverage(c["found"], c["quantized"], c["refused"]) for kind, c in self.covered.items()},
            layers=sum(unit.layer is not None for unit in self.found.units),
            attention=QDQ_ATTENTION if switched else None,
            shared=share_ranges(self.rules, sites),
        )


def _leaf_path(unit: Unit, path: str, target: str) -> str:
    # A unit that is a leaf itself was recorded inside a routine made for it.
    return path if unit.tree is not None and type(unit.tree.owner).__name__ == "_Alone" else join_path(path, target)
