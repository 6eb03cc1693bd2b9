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

_Form = dict[str, tuple[type, ...]]

_TEXT, _TEXTS, _FLAG, _MAPPING, _LIST = (str,), (list,), (bool,), (dict,), (list,)
_SCOPE: _Form = {"within": _TEXTS, "layers": (str, list)}
_COUNT = (int, list, dict)

#: What there may be, by level, and of which types. A key that nobody reads would be a wish that nobody grants.
_FORMS: dict[str, _Form] = {
    "rules": {
        "schema": (int,),
        "name": _TEXT,
        "why": _TEXT,
        "specs": _MAPPING,
        "rules": _LIST,
        "calibration": _MAPPING,
        "extends": _TEXT,
        "exclude": _LIST,
        "share": _LIST,
    },
    "spec": {
        "num_bits": (int,),
        "axis": (int, type(None)),
        "unsigned": _FLAG,
        "narrow_range": _FLAG,
        "calibrator": _MAPPING,
        "max_amax": (int, float, type(None)),
        "learn": _FLAG,
    },
    "calibrator": {"name": _TEXT, "percentile": (int, float), "num_bins": (int,)},
    "rule": {
        "name": _TEXT,
        "why": _TEXT,
        "match": _MAPPING,
        "quantize": _LIST,
        "source": _TEXT,
        "optional": _FLAG,
        "expect": _MAPPING,
    },
    "match": {"pattern": _TEXT, **_SCOPE},
    "place": {"operand": _TEXT, "spec": _TEXT, "as": _TEXT},
    "expectation": {"per_layer": _COUNT, "total": _COUNT, "model_types": _MAPPING},
    "count": {"min": (int,), "max": (int,)},
    "exclusion": {"why": _TEXT, **_SCOPE, "sites": _TEXTS, "rules": _TEXTS, "source": _TEXT},
    "share": {
        "why": _TEXT,
        **_SCOPE,
        "sites": _TEXTS,
        "rules": _TEXTS,
        "captures": _TEXTS,
        "source": _TEXT,
        "optional": _FLAG,
    },
    "calibration": {"dropout": _FLAG, "recalibrate_weights": _FLAG},
}

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
        data = _checked(data, "rules")
        return RuleSet(
            name=data["name"],
            why=data["why"],
            specs={name: None if spec == DEFAULT_SPEC else _spec_of(spec) for name, spec in data["specs"].items()},
            rules=tuple(_rule_of(_checked(rule, "rule")) for rule in data["rules"]),
            exclude=tuple(
                Exclude(e["why"], _scope_of(e), _tuple(e.get("sites")), _tuple(e.get("rules")), e["source"])
                for e in (_checked(each, "exclusion") for each in data.get("exclude", ()))
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
                for e in (_checked(each, "share") for each in data.get("share", ()))
            ),
            calibration=CalibrationOptions(**_checked(data.get("calibration", {}), "calibration")),
        )
    except RuleFileError:
        raise
    except KeyError as error:
        _refuse(f"the stored rules lack the key {error}", error)
    except (TypeError, ValueError, AttributeError) as error:
        _refuse(f"the stored rules are damaged ({error})", error)


def _refuse(found: str, cause: Exception) -> NoReturn:
    raise RuleFileError(found, _REMEDY) from cause


def _checked(data: Any, what: str) -> Mapping[str, Any]:
    """``data``, which has the form of ``what``.

    Raises:
        RuleFileError: It has not.
    """
    if not isinstance(data, Mapping):
        raise RuleFileError(f"found a {type(data).__name__} in place of a stored {what}", _REMEDY)
    form = _FORMS[what]
    for key, value in data.items():
        if key not in form:
            raise RuleFileError(f"a stored {what} has the unknown key '{key}'", f"known: {', '.join(form)}")
        if type(value) not in form[key]:
            raise RuleFileError(f"'{key}' of a stored {what} is the {type(value).__name__} {value!r}", _REMEDY)
        if form[key] is _TEXTS and not all(isinstance(text, str) for text in value):
            raise RuleFileError(f"'{key}' of a stored {what} is no list of texts: {value!r}", _REMEDY)
    return data


def _spec(spec: QuantSpec) -> dict[str, Any]:
    return {**asdict(spec), "calibrator": {k: v for k, v in asdict(spec.calibrator).items() if v is not None}}


def _spec_of(data: Any) -> QuantSpec:
    spec = _checked(data, "spec")
    return QuantSpec(**{**spec, "calibrator": CalibratorSpec(**_checked(spec["calibrator"], "calibrator"))})


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
    expect = _checked(data.get("expect", {}), "expectation")
    places = [_checked(place, "place") for place in data["quantize"]]
    match = _checked(data["match"], "match")
    return Rule(
        name=data["name"],
        why=data["why"],
        pattern=parse_pattern(match["pattern"]),
        quantize={place["operand"]: Place(place["spec"], place.get("as")) for place in places},
        scope=_scope_of(match),
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
    if isinstance(data, Mapping):
        limits = _checked(data, "count")
        return Count(minimum=limits.get("min"), maximum=limits.get("max"))
    numbers = [data] if isinstance(data, int) else list(data)
    if not all(type(number) is int for number in numbers):
        raise RuleFileError(f"a stored count is no number: {data!r}", _REMEDY)
    return Count(tuple(numbers))


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
