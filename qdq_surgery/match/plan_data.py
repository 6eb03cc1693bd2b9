"""A plan as compact plain data and back, with the places in the source that its sites have.

Sites that differ only in their layer are one entry, so the plan of a large model is no longer than that of a small one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qdq_surgery.errors import MatchError
from qdq_surgery.match.edits import Origin
from qdq_surgery.match.plan import COVERED, Coverage, Plan, Refusal, Site
from qdq_surgery.match.shared_ranges import share_ranges
from qdq_surgery.match.site_names import LINEAR_NAMES, MODULE_PATH, QUANTIZER_PATH, is_site_name, may_name
from qdq_surgery.rules.pattern import COMMUTATIVE, OPERATORS
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.safety.untrusted import DamagedError, Item, quoted
from qdq_surgery.text.layer_names import by_layers, split_layers, star, unstar
from qdq_surgery.trace.attention import QDQ_ATTENTION

__all__ = ["folded_sites", "known_from_data", "known_to_data", "plan_from_data", "plan_to_data"]

#: No count in a plan is larger, no text longer, no origin nested deeper.
_MOST, _LONGEST, _DEEPEST = 1_000_000, 10_000, 4

_ROUTINES = ("module", "forward", "attention")

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)

#: Operators of two operands.
_BINARY = COMMUTATIVE | {"matmul", "sub", "div"}

#: What :func:`plan_to_data` gives.
_PLAN = ("model", "model_type", "matches", "coverage", "layers", "sites", "refusals")

_SITE = ("routine", "origin", "position", "role", "operator", "capture", "rule", "source")


def plan_to_data(plan: Plan) -> dict[str, Any]:
    """``plan`` as JSON-able data; its rules are not in it."""
    sites = by_layers(
        ((star(site.quantizer, site.layer), *(getattr(site, name) for name in _SITE)), site.layer)
        for site in plan.sites
    )
    return {
        "model": plan.model,
        "model_type": plan.model_type,
        "matches": plan.matches,
        "coverage": {kind: [each.found, each.quantized, each.refused] for kind, each in plan.coverage.items()},
        "layers": plan.layers,
        "sites": [[layers, *key] for key, layers in sites.items()],
        "refusals": [[r.path, r.operator, r.reason, r.rule, r.layer, r.source, r.count] for r in plan.refusals],
    }


def plan_from_data(data: Item, rules: RuleSet, order: Callable[[str], int]) -> Plan:
    """What :func:`plan_to_data` gave.

    Every name, place and count is held against the rules, and what follows from rules and sites is worked out anew:
    the data may come from a stranger.

    Args:
        rules: The plan's rules.
        order: The place of a module in the model; KeyError for a module that it has not.

    Raises:
        DamagedError: The data is no plan, or not one by these rules for this model.
    """
    fields = data.fields(_PLAN)
    sites = [site for entry in fields["sites"].items() for site in _sites(entry, rules, order)]
    sites.sort(key=lambda site: order(site.owner))
    _check_places(sites, rules, data.where)
    counts = fields["matches"].fields([rule.name for rule in rules.rules])
    return Plan(
        model=fields["model"].text(),
        model_type=fields["model_type"].text(),
        rules=rules,
        sites=tuple(sites),
        refusals=tuple(map(_refusal, fields["refusals"].items())),
        matches={name: counts[name].integer(0, _MOST) for name in (rule.name for rule in rules.rules)},
        coverage=_coverage(fields["coverage"]),
        layers=fields["layers"].integer(0, _MOST),
        attention=QDQ_ATTENTION if any(site.routine == "attention" for site in sites) else None,
        shared=_shared(sites, rules, data.where),
    )


def _sites(entry: Item, rules: RuleSet, order: Callable[[str], int]) -> Iterator[Site]:
    """The sites that one entry stands for: one, or one in each of some layers."""
    layers, quantizer, routine, origin, position, role, operator, capture, rule, source = _parts(entry, 10)
    owner, _, name = quantizer.text(pattern=QUANTIZER_PATH, wanted="the path of a quantizer").rpartition(".")
    by = next((each for each in rules.rules if each.name == rule.value), None)
    place = None if by is None or not isinstance(capture.value, str) else by.quantize.get(capture.value)
    if by is None or place is None:
        raise DamagedError(
            f"{entry.where} is by the rule {quoted(rule.value)} on {quoted(capture.value)}, which is not in the rules"
        )
    kind = routine.one_of(_ROUTINES)
    words = {"operator": operator.one_of(OPERATORS), "capture": capture.value, "rule": by.name, "source": source.text()}
    part = role.one_of(tuple(LINEAR_NAMES))
    if kind == "module":
        swapped = {"linear"} | ({"embedding"} if part == "weight" else set())
        fits = name == LINEAR_NAMES[part] and words["operator"] in swapped
    else:
        fits = may_name(name, place, words["operator"], capture.value)
    if not fits or not is_site_name(name):
        quantizer.refuse(f"the name that the rule '{by.name}' gives")
    where, at = _origin(origin), _position(position, kind, part, words["operator"])
    for layer in _layers_of(layers):
        path = unstar(owner, layer)
        try:
            order(path)
        except KeyError:
            raise DamagedError(f"{entry.where} is in the module {quoted(path)}, which the model has not") from None
        yield Site(f"{path}.{name}", path, kind, where, at, part, spec=rules.spec(place.spec), layer=layer, **words)


def _check_places(sites: Sequence[Site], rules: RuleSet, where: str) -> None:
    """Each quantizer once, each operand once, and operands in the order in which the rules' patterns name them."""
    names: set[str] = set()
    places: set[tuple[Any, ...]] = set()
    captured: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        place = (site.owner, site.routine, site.origin)
        if site.quantizer in names or (*place, site.position) in places:
            raise DamagedError(f"{where} has the site {site.quantizer} twice, or another on the same operand")
        names.add(site.quantizer)
        places.add((*place, site.position))
        if site.operator not in COMMUTATIVE:
            captured.setdefault((*place, site.rule), []).append(site)
    for group in captured.values():
        if len(group) > 1:
            captures = rules.rule(group[0].rule).pattern.captures()
            group.sort(key=lambda site: captures.index(site.capture))
            positions = [site.position for site in group]
            if all(isinstance(each, int) for each in positions) and positions != sorted(positions):
                raise DamagedError(f"{where}: {group[0].quantizer} is on the operand of another capture")


def _shared(sites: Sequence[Site], rules: RuleSet, where: str) -> tuple[tuple[str, ...], ...]:
    try:
        return share_ranges(rules, sites)
    except MatchError as error:
        raise DamagedError(f"{where} has sites that the rules do not fit: {error}") from None


def _coverage(item: Item) -> dict[str, Coverage]:
    kinds = item.fields(COVERED)
    return {kind: Coverage(*(each.integer(0, _MOST) for each in _parts(kinds[kind], 3))) for kind in COVERED}


def _refusal(entry: Item) -> Refusal:
    path, operator, reason, rule, layer, source, count = _parts(entry, 7)
    said = [each.text(_LONGEST) if each.value is not None else None for each in (rule, source)]
    return Refusal(
        path.text(),
        operator.text(),
        reason.lines(_LONGEST),
        said[0],
        None if layer.value is None else layer.integer(0, _MOST),
        said[1] or "",
        count.integer(0, _MOST),
    )


def _parts(entry: Item, number: int) -> list[Item]:
    parts = entry.items()
    if len(parts) != number:
        entry.refuse(f"a list of {number} entries")
    return parts


def _position(item: Item, kind: str, role: str, operator: str) -> int | str:
    if kind == "module":
        return item.one_of(("weight",)) if role == "weight" else item.one_of((0, "input"))  # type: ignore[no-any-return]
    if isinstance(item.value, str):
        return item.text(pattern=_IDENTIFIER, wanted="the name of an argument")
    return item.integer(0, 1 if operator in _BINARY else 15)


def _layers_of(item: Item) -> list[Any]:
    if item.value is None:
        return [None]
    try:
        return split_layers(item.text())
    except ValueError:
        item.refuse("layers such as 0-11")


def _origin(item: Item, depth: int = 0) -> tuple[Any, ...]:
    """The identity of a call within the source: file names, functions, places in their code, nested a little."""
    if depth > _DEEPEST:
        item.refuse("nested less")
    return tuple(
        _origin(each, depth + 1) if isinstance(each.value, list) else _part_of_origin(each) for each in item.items(100)
    )


def _part_of_origin(item: Item) -> str | int:
    return item.text() if isinstance(item.value, str) else item.integer(-1, _MOST)


def folded_sites(data: Item) -> dict[str, str | None]:
    """The names of the sites in what :func:`plan_to_data` gave, folded as in :mod:`~qdq_surgery.text.layer_names`."""
    entries = (_parts(entry, 10)[:2] for entry in data.fields(_PLAN)["sites"].items())
    return by_layers((name.text(), layer) for layers, name in entries for layer in _layers_of(layers))


def known_to_data(known: Mapping[tuple[str, str], frozenset[Origin]], layers: Mapping[str, int | None]) -> list[Any]:
    """Origins by block and kind, as JSON-able data.

    Args:
        layers: The encoder layer of each block.
    """
    found = by_layers(
        ((star(owner, layers.get(owner)), kind, tuple(sorted(origins, key=repr))), layers.get(owner))
        for (owner, kind), origins in known.items()
    )
    return [[where, *key] for key, where in found.items()]


def known_from_data(data: Item) -> dict[tuple[str, str], frozenset[Origin]]:
    """What :func:`known_to_data` gave.

    Raises:
        DamagedError: The data is none.
    """
    known: dict[tuple[str, str], frozenset[Origin]] = {}
    for entry in data.items():
        layers, owner, kind, origins = _parts(entry, 4)
        found = frozenset(map(_origin, origins.items(1000)))
        path = owner.text(pattern=MODULE_PATH, wanted="the path of a module")
        which = kind.one_of(("forward", "attention"))
        known.update({(unstar(path, layer), which): found for layer in _layers_of(layers)})
    return known
