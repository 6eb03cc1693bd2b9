"""A rule set as plain data and back: how a saved model carries its rules, whatever files they came from.

The keys are those of a rule file, but what the files extend is merged in. Whoever wrote the model wrote this: that each
value has its type is checked here, the rest by the classes of :mod:`~qdq_surgery.rules.spec`, as of what stands in a
file.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn, TypeVar

from qdq_surgery.errors import RuleFileError
from qdq_surgery.rules.limits import MAX_LIST
from qdq_surgery.rules.pattern import parse_pattern
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec
from qdq_surgery.rules.spec import (
    DEFAULT_SPEC,
    CalibrationOptions,
    Count,
    Exclude,
    Expect,
    Place,
    Rule,
    RuleSet,
    Scope,
    Share,
)
from qdq_surgery.rules.yaml_file import SCHEMA

__all__ = ["rules_from_data", "rules_to_data"]

_T = TypeVar("_T")

_Form = dict[str, tuple[type, ...]]

#: No number of a rule set is larger; whatever prints or compares them need not fear a number of a megabyte.
_MAX_INTEGER = 10**39

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
        RuleFileError: It is of another schema, or no valid rule set; names the place, such as
            ``rules[3].quantize[0].as``.
    """
    if not isinstance(data, Mapping):
        raise RuleFileError(f"found a {type(data).__name__} in place of the stored rules", _REMEDY)
    schema = data.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        raise RuleFileError(f"the stored rules have schema {_quote(schema)}", f"this release reads {SCHEMA}")
    top = _Part(data, "rules", "")
    specs = {name: _spec_of(top.named("specs", name)) for name in top.names("specs")}
    parts: dict[str, Any] = {
        "rules": tuple(map(_rule_of, top.parts("rules", "rule", needed=True))),
        "exclude": tuple(map(_exclude_of, top.parts("exclude", "exclusion"))),
        "share": tuple(map(_share_of, top.parts("share", "share"))),
    }
    calibration = top.part("calibration", "calibration")
    return _made(
        "",
        lambda: RuleSet(
            name=top.needed("name"),
            why=top.needed("why"),
            specs=specs,
            extends=data.get("extends"),
            calibration=CalibrationOptions(**calibration.data),
            **parts,
        ),
    )


class _Part:
    """A mapping of the stored rules that has the form of ``what``, and the place where it stands.

    Raises:
        RuleFileError: It has another form.
    """

    def __init__(self, data: Any, what: str, place: str) -> None:
        if not isinstance(data, Mapping):
            _refuse(place, f"found a {type(data).__name__} in place of a stored {what}")
        self.data: Mapping[str, Any] = data
        self.what, self.place = what, place
        form = _FORMS[what]
        for key, value in data.items():
            if key not in form:
                known = f"known: {', '.join(form)}"
                raise RuleFileError(f"{_before(place)}a stored {what} has the unknown key '{_key(key)}'", known)
            if type(value) not in form[key]:
                self.refuse(key, f"is the {type(value).__name__} {_quote(value)}")
            self._check_size(key, value)
            if form[key] is _TEXTS and not all(isinstance(text, str) for text in value):
                self.refuse(key, f"is no list of texts: {_quote(value)}")

    def _check_size(self, key: str, value: Any) -> None:
        if type(value) is int and abs(value) > _MAX_INTEGER:
            self.refuse(key, "is a number that is too large")
        if isinstance(value, (list, dict)) and len(value) > MAX_LIST:
            self.refuse(key, f"has {len(value)} entries, more than {MAX_LIST}")

    def at(self, key: str) -> str:
        """The place of what ``key`` holds."""
        return f"{self.place}.{key}" if self.place else key

    def refuse(self, key: str, found: str) -> NoReturn:
        _refuse(self.at(key), f"'{key}' of a stored {self.what} {found}")

    def needed(self, key: str) -> Any:
        if key not in self.data:
            _refuse(self.place, f"the stored rules lack the key '{key}'")
        return self.data[key]

    def part(self, key: str, what: str, needed: bool = False) -> _Part:
        return _Part(self.needed(key) if needed else self.data.get(key, {}), what, self.at(key))

    def parts(self, key: str, what: str, needed: bool = False) -> list[_Part]:
        items = self.needed(key) if needed else self.data.get(key, [])
        return [_Part(item, what, f"{self.at(key)}[{index}]") for index, item in enumerate(items)]

    def names(self, key: str) -> list[str]:
        """The keys of a mapping with names of its own."""
        names = [*(self.needed(key) if key == "specs" else self.data.get(key, {}))]
        for name in names:
            if type(name) is not str:
                self.refuse(key, f"has a key that is the {type(name).__name__} {_quote(name)}")
        return names

    def named(self, key: str, name: str) -> tuple[Any, str]:
        """What a mapping holds under a name of its own, and its place."""
        return self.data[key][name], f"{self.at(key)}.{_key(name)}"

    def texts(self, key: str) -> tuple[str, ...] | None:
        return None if key not in self.data else tuple(self.data[key])


def _made(place: str, make: Callable[[], _T]) -> _T:
    """What ``make`` builds, with ``place`` in its error."""
    try:
        return make()
    except RuleFileError as error:
        raise RuleFileError(f"{_before(place)}{error.found}", error.fix) from None


def _refuse(place: str, found: str) -> NoReturn:
    raise RuleFileError(f"{_before(place)}{found}", _REMEDY)


def _before(place: str) -> str:
    return f"{place}: " if place else ""


def _key(key: Any) -> str:
    return key[:60] if isinstance(key, str) else _quote(key)


def _quote(value: Any) -> str:
    """``value`` in short, however long or deep it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "..."


def _spec(spec: QuantSpec) -> dict[str, Any]:
    return {**asdict(spec), "calibrator": {k: v for k, v in asdict(spec.calibrator).items() if v is not None}}


def _spec_of(given: tuple[Any, str]) -> QuantSpec | None:
    data, place = given
    if isinstance(data, str) and data == DEFAULT_SPEC:
        return None
    spec = _Part(data, "spec", place)
    options = spec.part("calibrator", "calibrator", needed=True)
    calibrator = _made(options.place, lambda: CalibratorSpec(**options.data))
    return _made(place, lambda: QuantSpec(**{**spec.data, "calibrator": calibrator}))


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


def _rule_of(part: _Part) -> Rule:
    expect, match = part.part("expect", "expectation"), part.part("match", "match", needed=True)
    pattern = _made(match.at("pattern"), lambda: parse_pattern(match.needed("pattern")))
    counts = {key: _count_of(expect.data[key], expect.at(key)) for key in ("per_layer", "total") if key in expect.data}
    by_type = {name: _count_of(*expect.named("model_types", name)) for name in expect.names("model_types")}
    scope, quantize = _scope_of(match), _quantize_of(part)
    return _made(
        part.place,
        lambda: Rule(
            name=part.needed("name"),
            why=part.needed("why"),
            pattern=pattern,
            quantize=quantize,
            scope=scope,
            expect=_made(expect.place, lambda: Expect(**counts, model_types=by_type)),
            optional=part.data.get("optional", False),
            source=part.needed("source"),
        ),
    )


def _quantize_of(part: _Part) -> dict[str, Place]:
    found: dict[str, Place] = {}
    for place in part.parts("quantize", "place", needed=True):
        operand = place.needed("operand")
        if operand in found:
            _refuse(place.at("operand"), f"'{_key(operand)}' is quantized twice")
        name = place.data.get("as")
        where = place.place if name is None else place.at("as")
        found[operand] = _made(where, partial(Place, place.needed("spec"), name))
    return found


def _count(count: Count) -> int | list[int] | dict[str, int]:
    if len(count.allowed) == 1:
        return count.allowed[0]
    if count.allowed:
        return list(count.allowed)
    limits = {"min": count.minimum, "max": count.maximum}
    return {name: limit for name, limit in limits.items() if limit is not None}


def _count_of(data: Any, place: str) -> Count:
    if isinstance(data, Mapping):
        limits = _Part(data, "count", place).data
        return _made(place, lambda: Count(minimum=limits.get("min"), maximum=limits.get("max")))
    numbers = data if isinstance(data, list) else [data]
    if not all(type(number) is int for number in numbers):
        _refuse(place, f"a stored count is no number: {_quote(data)}")
    if not all(abs(number) <= _MAX_INTEGER for number in numbers):
        _refuse(place, "a stored count is too large")
    return _made(place, lambda: Count(tuple(numbers)))


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


def _scope_of(part: _Part) -> Scope:
    layers = part.data.get("layers")
    if isinstance(layers, list):
        if not all(type(layer) is int and abs(layer) <= _MAX_INTEGER for layer in layers):
            _refuse(part.at("layers"), f"the stored rules are damaged: no list of layers: {_quote(layers)}")
        layers = tuple(layers)
    return _made(part.place, lambda: Scope(part.texts("within"), layers))


def _exclude_of(part: _Part) -> Exclude:
    scope = _scope_of(part)
    return _made(
        part.place,
        lambda: Exclude(
            part.needed("why"), scope, part.texts("sites"), part.texts("rules"), source=part.needed("source")
        ),
    )


def _share_of(part: _Part) -> Share:
    scope = _scope_of(part)
    return _made(
        part.place,
        lambda: Share(
            part.needed("why"),
            scope,
            part.texts("sites"),
            part.texts("rules"),
            part.texts("captures"),
            optional=part.needed("optional"),
            source=part.needed("source"),
        ),
    )
