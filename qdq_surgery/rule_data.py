"""A rule set as plain data and back: how a saved model carries its rules, whatever files they came from.

The keys are those of a rule file, but what the files extend is merged in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NoReturn

from qdq_surgery.errors import RuleFileError
from qdq_surgery.pattern import parse_pattern
from qdq_surgery.rule_file import SCHEMA
from qdq_surgery.spec import (
    DEFAULT_SPEC,
    CalibrationOptions,
    CalibratorSpec,
    Count,
    Exclude,
    Expect,
    Place,
    QuantSpec,
    Rule,
    RuleSet,
    Scope,
    Share,
)

__all__ = ["rules_from_data", "rules_to_data"]

_REMEDY = "save the model again with this release, or give the rules anew: QDQConfig(rules=...)"


def rules_to_data(rules: RuleSet) -> dict[str, Any]:
    """``rules`` as JSON-able data."""
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "name": rules.name,
        "why": rules.why,
        "specs": {name: DEFAULT_SPEC if spec is None else _spec(spec) for name, spec in rules.specs.items()},
        "rules": [_rule(rule) for rule in rules.rules],
    }
    if rules.calibration != CalibrationOptions():
        data["calibration"] = asdict(rules.calibration)
    if rules.extends is not None:
        data["extends"] = rules.extends
    if rules.exclude:
        data["exclude"] = [_entry(entry, "sites", "rules") for entry in rules.exclude]
    if rules.share:
        data["share"] = [
            {**_entry(entry, "sites", "rules", "captures"), "optional": entry.optional} for entry in rules.share
        ]
    return data


def rules_from_data(data: Mapping[str, Any]) -> RuleSet:
    """What :func:`rules_to_data` gave.

    Raises:
        RuleFileError: It is of another schema, or no valid rule set.
    """
    if not isinstance(data, Mapping):
        raise RuleFileError(f"found a {type(data).__name__} in place of the stored rules", _REMEDY)
    if data.get("schema") != SCHEMA:
        raise RuleFileError(f"the stored rules have schema {data.get('schema')!r}", f"this release reads {SCHEMA}")
    try:
        return RuleSet(
            name=data["name"],
            why=data["why"],
            specs={
                name: None if spec == DEFAULT_SPEC else QuantSpec(**{**spec, "calibrator": _calibrator(spec)})
                for name, spec in data["specs"].items()
            },
            rules=tuple(_rule_of(rule) for rule in data["rules"]),
            exclude=tuple(
                Exclude(e["why"], _scope_of(e), _tuple(e.get("sites")), _tuple(e.get("rules")), e["source"])
                for e in data.get("exclude", ())
            ),
            extends=data.get("extends"),
            share=tuple(
                Share(
                    e["why"],
                    _scope_of(e),
                    _tuple(e.get("sites")),
                    _tuple(e.get("rules")),
                    _tuple(e.get("captures")),
                    e["optional"],
                    e["source"],
                )
                for e in data.get("share", ())
            ),
            calibration=CalibrationOptions(**data.get("calibration", {})),
        )
    except RuleFileError:
        raise
    except KeyError as error:
        _refuse(f"the stored rules lack the key {error}", error)
    except (TypeError, ValueError, AttributeError) as error:
        _refuse(f"the stored rules are damaged ({error})", error)


def _refuse(found: str, cause: Exception) -> NoReturn:
    raise RuleFileError(found, _REMEDY) from cause


def _spec(spec: QuantSpec) -> dict[str, Any]:
    return {**asdict(spec), "calibrator": {k: v for k, v in asdict(spec.calibrator).items() if v is not None}}


def _calibrator(spec: Mapping[str, Any]) -> CalibratorSpec:
    return CalibratorSpec(**spec["calibrator"])


def _rule(rule: Rule) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": rule.name,
        "why": rule.why,
        "match": {"pattern": str(rule.pattern), **_scope(rule.scope)},
        # A list: JSON objects may come back in another order, and the order of the quantizers is this one.
        "quantize": [
            {"operand": capture, "spec": place.spec, **({} if place.name is None else {"as": place.name})}
            for capture, place in rule.quantize.items()
        ],
        "source": rule.source,
    }
    if rule.optional:
        data["optional"] = True
    expect: dict[str, Any] = {
        key: _count(count)
        for key, count in (("per_layer", rule.expect.per_layer), ("total", rule.expect.total))
        if count is not None
    }
    if rule.expect.model_types:
        expect["model_types"] = {name: _count(each) for name, each in rule.expect.model_types.items()}
    if expect:
        data["expect"] = expect
    return data


def _rule_of(data: Mapping[str, Any]) -> Rule:
    expect = data.get("expect", {})
    return Rule(
        name=data["name"],
        why=data["why"],
        pattern=parse_pattern(data["match"]["pattern"]),
        quantize={place["operand"]: Place(place["spec"], place.get("as")) for place in data["quantize"]},
        scope=_scope_of(data["match"]),
        expect=Expect(
            per_layer=_count_of(expect["per_layer"]) if "per_layer" in expect else None,
            total=_count_of(expect["total"]) if "total" in expect else None,
            model_types={name: _count_of(each) for name, each in expect.get("model_types", {}).items()},
        ),
        optional=data.get("optional", False),
        source=data["source"],
    )


def _count(count: Count) -> int | list[int] | dict[str, int]:
    if len(count.allowed) == 1:
        return count.allowed[0]
    if count.allowed:
        return list(count.allowed)
    limits = {"min": count.minimum, "max": count.maximum}
    return {name: limit for name, limit in limits.items() if limit is not None}


def _count_of(data: int | list[int] | Mapping[str, int]) -> Count:
    if isinstance(data, int):
        return Count((data,))
    return Count(minimum=data.get("min"), maximum=data.get("max")) if isinstance(data, Mapping) else Count(tuple(data))


def _entry(entry: Exclude | Share, *names: str) -> dict[str, Any]:
    globs = {name: list(value) for name in names if (value := getattr(entry, name)) is not None}
    return {"why": entry.why, **_scope(entry.scope), **globs, "source": entry.source}


def _scope(scope: Scope) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if scope.within is not None:
        data["within"] = list(scope.within)
    if scope.layers is not None:
        data["layers"] = scope.layers if isinstance(scope.layers, str) else list(scope.layers)
    return data


def _scope_of(data: Mapping[str, Any]) -> Scope:
    layers = data.get("layers")
    return Scope(_tuple(data.get("within")), layers if layers is None or isinstance(layers, str) else tuple(layers))


def _tuple(values: list[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)
