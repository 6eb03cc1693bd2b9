"""A rule set as plain data and back: how a saved model carries its rules, whatever files they came from.

The keys are those of :mod:`~qdq_surgery.rules.schema`, and what the files extend is merged in. Whoever wrote the model
wrote this: that each value has its type is checked here, the rest by the classes of :mod:`~qdq_surgery.rules.spec`, as
of what stands in a file.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any, NoReturn, TypeVar

from qdq_surgery.errors import RuleFileError
from qdq_surgery.rules.limits import MAX_LIST
from qdq_surgery.rules.pattern import parse_pattern
from qdq_surgery.rules.schema import SCHEMA, SECTIONS, STORED_TYPES, Stored, default_of, make
from qdq_surgery.rules.spec import DEFAULT_SPEC, Count, Place, RuleSet

__all__ = ["rules_from_data", "rules_to_data"]

_T = TypeVar("_T")

#: No number of a rule set is larger; whatever prints or compares them need not fear a number of a megabyte.
_MAX_INTEGER = 10**39

_REMEDY = "save the model again with this release, or give the rules anew: QDQConfig(rules=...)"


# -- to data -----------------------------------------------------------------------------------------------------------


def rules_to_data(rules: RuleSet) -> dict[str, Any]:
    """``rules`` as JSON-able data."""
    return {"schema": SCHEMA, **_written("rules", rules)}


def _written(section: str, made: Any) -> dict[str, Any]:
    """What ``made`` says, by the keys of its section; what is left out where it is the default, is left out."""
    data: dict[str, Any] = {}
    for name, key in SECTIONS[section].items():
        if name in ("schema", "operand"):  # said by the whole: they are no fields
            continue
        value = made if key.field == "" else attrgetter(key.field or name)(made)
        if key.stored is not Stored.OTHERWISE or value != default_of(section, name):
            data[name] = _WRITERS[key.kind](value, key.of) if key.kind in _WRITERS else value
    return data


def _section_written(made: Any, section: str) -> Any:
    if isinstance(made, Count) and made.allowed:
        return made.allowed[0] if len(made.allowed) == 1 else list(made.allowed)
    return DEFAULT_SPEC if made is None else _written(section, made)


_WRITERS: dict[str, Callable[[Any, str], Any]] = {
    "texts": lambda texts, _: list(texts),
    "layers": lambda layers, _: layers if isinstance(layers, str) else list(layers),
    "pattern": lambda pattern, _: str(pattern),
    "count": _section_written,
    # A list: JSON objects may come back in another order, and the order of the quantizers is this one.
    "quantize": lambda places, of: [{"operand": name, **_written(of, place)} for name, place in places.items()],
    "section": _section_written,
    "sections": lambda items, of: [_section_written(item, of) for item in items],
    "mapping": lambda items, of: {name: _section_written(item, of) for name, item in items.items()},
}


# -- from data ---------------------------------------------------------------------------------------------------------


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
    values = _Part(data, "rules", "").values()
    del values["schema"]
    made: RuleSet = _made("", lambda: make("rules", values))
    return made


class _Part:
    """A mapping of the stored rules that has the form of ``section``, and the place where it stands.

    Raises:
        RuleFileError: It has another form.
    """

    def __init__(self, data: Any, section: str, place: str) -> None:
        if not isinstance(data, Mapping):
            _refuse(place, f"found a {type(data).__name__} in place of a stored {section}")
        self.data: Mapping[str, Any] = data
        self.section, self.form, self.place = section, SECTIONS[section], place
        for key, value in data.items():
            if key not in self.form:
                known = f"known: {', '.join(self.form)}"
                raise RuleFileError(f"{_before(place)}a stored {section} has the unknown key '{_key(key)}'", known)
            self._check(key, value)
        for name, wanted in self.form.items():
            if wanted.stored in (Stored.ALWAYS, Stored.ONLY) and name not in data:
                _refuse(place, f"the stored rules lack the key '{name}'")

    def _check(self, key: str, value: Any) -> None:
        if type(value) not in STORED_TYPES[self.form[key].kind]:
            self.refuse(key, f"is the {type(value).__name__} {_quote(value)}")
        if type(value) is int and abs(value) > _MAX_INTEGER:
            self.refuse(key, "is a number that is too large")
        if isinstance(value, (list, dict)) and len(value) > MAX_LIST:
            self.refuse(key, f"has {len(value)} entries, more than {MAX_LIST}")
        if self.form[key].kind == "texts" and not all(isinstance(text, str) for text in value):
            self.refuse(key, f"is no list of texts: {_quote(value)}")
        for name in value if self.form[key].kind == "mapping" else ():
            if type(name) is not str:
                self.refuse(key, f"has a key that is the {type(name).__name__} {_quote(name)}")

    def at(self, key: str) -> str:
        """The place of what ``key`` holds."""
        return f"{self.place}.{key}" if self.place else key

    def refuse(self, key: str, found: str) -> NoReturn:
        _refuse(self.at(key), f"'{key}' of a stored {self.section} {found}")

    def values(self) -> dict[str, Any]:
        """What the part holds, read, by key."""
        return {name: self._read(name, key.kind, key.of) for name, key in self.form.items() if name in self.data}

    def _read(self, name: str, kind: str, of: str) -> Any:
        value, place = self.data[name], self.at(name)
        if kind in ("section", "count"):
            return _section(value, of, place)
        if kind == "sections":
            return tuple(_section(item, of, f"{place}[{index}]") for index, item in enumerate(value))
        if kind == "mapping":
            return {key: _section(item, of, f"{place}.{_key(key)}") for key, item in value.items()}
        return _READERS[kind](value, place) if kind in _READERS else value


def _section(data: Any, section: str, place: str) -> Any:
    """What a section says: an object, or fields of the one around it."""
    if section == "spec" and isinstance(data, str) and data == DEFAULT_SPEC:
        return None
    if section == "count" and not isinstance(data, Mapping):
        return _plain_count(data, place)
    values = _Part(data, section, place).values()
    return _made(place, lambda: make(section, values))


def _quantize(data: list[Any], where: str) -> dict[str, Place]:
    found: dict[str, Place] = {}
    for index, item in enumerate(data):
        part = _Part(item, "place", f"{where}[{index}]")
        values = part.values()
        operand = values.pop("operand")
        if operand in found:
            _refuse(part.at("operand"), f"'{_key(operand)}' is quantized twice")
        found[operand] = _made(part.at("as") if "as" in values else part.place, partial(make, "place", values))
    return found


def _plain_count(data: Any, place: str) -> Count:
    """A count that is a number, or a list of numbers."""
    numbers = data if isinstance(data, list) else [data]
    if not all(type(number) is int for number in numbers):
        _refuse(place, f"a stored count is no number: {_quote(data)}")
    if not all(abs(number) <= _MAX_INTEGER for number in numbers):
        _refuse(place, "a stored count is too large")
    return _made(place, lambda: Count(tuple(numbers)))


def _layers(layers: str | list[Any], place: str) -> str | tuple[int, ...]:
    if isinstance(layers, str):
        return layers
    if not all(type(layer) is int and abs(layer) <= _MAX_INTEGER for layer in layers):
        _refuse(place, f"the stored rules are damaged: no list of layers: {_quote(layers)}")
    return tuple(layers)


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "texts": lambda texts, _: tuple(texts),
    "pattern": lambda text, place: _made(place, lambda: parse_pattern(text)),
    "layers": _layers,
    "quantize": _quantize,
}


def _made(place: str, build: Callable[[], _T]) -> _T:
    """What ``build`` builds, with ``place`` in its error."""
    try:
        return build()
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
