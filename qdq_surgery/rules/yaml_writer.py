"""A rule set as the text of a rule file, by the same table that the readers walk."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import yaml

from qdq_surgery.rules.schema import SCHEMA, SECTIONS, Stored, default_of
from qdq_surgery.rules.spec import DEFAULT_SPEC, Count, Rule, RuleSet

__all__ = ["rules_text"]

_WIDTH = 110

#: Where a section begins, which an empty line makes easier to see.
_SECTION = re.compile(r"^((?:specs|rules|exclude|share|calibration):)", re.MULTILINE)


def rules_text(rules: RuleSet, base: RuleSet | None = None) -> str:
    """What a rule file says that is read as ``rules``.

    Args:
        base: A shipped rule set that it is to extend: of its entries only those that differ are written. Left out, the
            file stands on its own.
    """
    own = _section_form(rules, "rules")
    own.pop("extends", None)
    if base is not None:
        own = {**own, "extends": base.name}
        own["specs"] = _mapping_form(
            {name: spec for name, spec in rules.specs.items() if name not in base.specs or base.specs[name] != spec},
            "spec",
        )
        own["rules"] = [_rule_form(rule) for rule in rules.rules if rule not in base.rules]
        own["exclude"] = [_section_form(each, "exclusion") for each in _added(rules.exclude, base.exclude)]
        own["share"] = [_section_form(each, "share") for each in _added(rules.share, base.share)]
    first = {name: own[name] for name in ("schema", "name", "extends", "why") if own.get(name)}
    data = {**first, **{name: value for name, value in own.items() if name not in first and value}}
    # Braces around the innermost only, and a file that has nothing but its head is not the innermost.
    style = None if len(data) > len(first) else False
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=_WIDTH, default_flow_style=style)
    return _SECTION.sub(r"\n\1", text)


def _added(entries: Sequence[Any], base: Sequence[Any]) -> Sequence[Any]:
    """Those behind the base's own, which stand first."""
    return entries[len(base) :]


def _section_form(made: Any, section: str) -> dict[str, Any]:
    """What ``made`` says, by the keys that a rule file has; what means its default is left out."""
    data: dict[str, Any] = {}
    for name, key in SECTIONS[section].items():
        if key.stored is Stored.ONLY:
            continue
        if name == "schema":
            data[name] = SCHEMA
            continue
        value = made if key.field == "" else attrgetter(key.field or name)(made)
        if key.needed or value != default_of(section, name):
            data[name] = _FORMS[key.kind](value, key.of) if key.kind in _FORMS else value
    return data


def _rule_form(rule: Rule) -> dict[str, Any]:
    return _section_form(rule, "rule")


def _part_form(made: Any, section: str) -> Any:
    """A section, or the word or number that may stand in its place."""
    if isinstance(made, Count) and made.allowed:
        return _texts_form(made.allowed)
    if made is None:
        return DEFAULT_SPEC
    data = _section_form(made, section)
    short = {"calibrator": "name", "place": "spec"}.get(section)
    if short is not None and set(data) <= {short}:
        return data.get(short, attrgetter(short)(made))
    return data


def _texts_form(items: Sequence[Any]) -> Any:
    return items[0] if len(items) == 1 else list(items)


def _mapping_form(items: Mapping[str, Any], of: str) -> dict[str, Any]:
    return {name: _part_form(item, of) for name, item in items.items()}


_FORMS: dict[str, Callable[[Any, str], Any]] = {
    "texts": lambda texts, _: _texts_form(texts),
    "layers": lambda layers, _: layers if isinstance(layers, str) else _texts_form(layers),
    "pattern": lambda pattern, _: str(pattern),
    "count": _part_form,
    "quantize": _mapping_form,
    "section": _part_form,
    "sections": lambda items, of: [_part_form(item, of) for item in items],
    "mapping": _mapping_form,
}
