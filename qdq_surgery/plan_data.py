"""A plan as compact plain data and back, with the places in the source that its sites have.

Sites that differ only in their layer are one entry, so the plan of a large model is no longer than that of a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qdq_surgery.layered import join_layers, split_layers, star, unstar
from qdq_surgery.plan import Coverage, Plan, Refusal, Site
from qdq_surgery.spec import RuleSet

__all__ = ["folded_sites", "known_from_data", "known_to_data", "plan_from_data", "plan_to_data"]

Origin = tuple[Any, ...]

_SITE = ("routine", "origin", "position", "role", "operator", "capture", "rule", "source")


def plan_to_data(plan: Plan) -> dict[str, Any]:
    """``plan`` as JSON-able data; its rules are not in it."""
    sites: dict[tuple[Any, ...], list[int | None]] = {}
    for site in plan.sites:
        key = (star(site.quantizer, site.layer), *(getattr(site, name) for name in _SITE))
        sites.setdefault(key, []).append(site.layer)
    places = {site.quantizer: site.layer for site in plan.sites}
    shared: dict[tuple[str, ...], list[int | None]] = {}
    for group in plan.shared:
        layers = {places[name] for name in group}
        layer = layers.pop() if len(layers) == 1 else None
        shared.setdefault(tuple(star(name, layer) for name in group), []).append(layer)
    return {
        "model": plan.model,
        "model_type": plan.model_type,
        "matches": plan.matches,
        "coverage": {kind: [each.found, each.quantized, each.refused] for kind, each in plan.coverage.items()},
        "layers": plan.layers,
        "attention": plan.attention,
        "sites": [[_layers(layers), *key] for key, layers in sites.items()],
        "refusals": [[r.path, r.operator, r.reason, r.rule, r.layer, r.source, r.count] for r in plan.refusals],
        "shared": [[_layers(layers), list(names)] for names, layers in shared.items()],
    }


def plan_from_data(data: Mapping[str, Any], rules: RuleSet, order: Callable[[str], int]) -> Plan:
    """What :func:`plan_to_data` gave.

    Args:
        rules: The plan's rules.
        order: The place of a module in the model.

    Raises:
        ValueError, KeyError, TypeError: The data is no plan, or not one by these rules.
    """
    specs = {
        (rule.name, capture): rules.spec(place.spec) for rule in rules.rules for capture, place in rule.quantize.items()
    }
    sites: list[Site] = []
    for layers, quantizer, routine, origin, position, role, operator, capture, rule, source in data["sites"]:
        place = _tuples(origin)
        spec = specs[rule, capture]
        for layer in _each(layers):
            name = unstar(quantizer, layer)
            owner = name.rpartition(".")[0]
            sites.append(
                Site(name, owner, routine, place, position, role, operator, capture, rule, spec, layer, source)
            )
    sites.sort(key=lambda site: order(site.owner))
    return Plan(
        model=data["model"],
        model_type=data["model_type"],
        rules=rules,
        sites=tuple(sites),
        refusals=tuple(Refusal(*refusal) for refusal in data["refusals"]),
        matches=dict(data["matches"]),
        coverage={kind: Coverage(*counts) for kind, counts in data["coverage"].items()},
        layers=data["layers"],
        attention=data["attention"],
        shared=tuple(
            tuple(unstar(name, layer) for name in names) for layers, names in data["shared"] for layer in _each(layers)
        ),
    )


def folded_sites(data: Mapping[str, Any]) -> dict[str, str | None]:
    """The names of the sites in what :func:`plan_to_data` gave, as :func:`~qdq_surgery.layered.fold` folds them."""
    found: dict[str, list[int]] = {}
    for layers, name, *_ in data["sites"]:
        found.setdefault(name, []).extend(_each(layers) if layers is not None else [])
    return {name: join_layers(layers) if layers else None for name, layers in found.items()}


def known_to_data(known: Mapping[tuple[str, str], frozenset[Origin]], layers: Mapping[str, int | None]) -> list[Any]:
    """Origins by block and kind, as JSON-able data.

    Args:
        layers: The encoder layer of each block.
    """
    folded: dict[tuple[str, str, tuple[Origin, ...]], list[int | None]] = {}
    for (owner, kind), origins in known.items():
        layer = layers.get(owner)
        folded.setdefault((star(owner, layer), kind, tuple(sorted(origins, key=repr))), []).append(layer)
    return [[_layers(found), *key] for key, found in folded.items()]


def known_from_data(data: list[Any]) -> dict[tuple[str, str], frozenset[Origin]]:
    """What :func:`known_to_data` gave.

    Raises:
        ValueError, TypeError: The data is none.
    """
    known: dict[tuple[str, str], frozenset[Origin]] = {}
    for layers, owner, kind, origins in data:
        found = frozenset(map(_tuples, origins))
        known.update({(unstar(owner, layer), kind): found for layer in _each(layers)})
    return known


def _layers(layers: list[int | None]) -> str | None:
    return None if layers[0] is None else join_layers(layer for layer in layers if layer is not None)


def _each(layers: str | None) -> list[Any]:
    return [None] if layers is None else split_layers(layers)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
