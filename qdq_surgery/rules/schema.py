"""The rule schema, once: the keys of each section, what kind of value each holds, and which must be there.

Three walk it: the reader of rule files (:mod:`~qdq_surgery.rules.yaml_file`), and the reader and the writer of a saved
model's rules (:mod:`~qdq_surgery.rules.json_data`). Defaults and checks are those of the dataclasses that the sections
make. A new key is one line here and one field there; a new kind of value is one method of each reader.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import MISSING, fields
from enum import Enum
from operator import attrgetter
from typing import Any, NamedTuple

from qdq_surgery.rules import spec
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec

__all__ = ["SCHEMA", "SECTIONS", "STORED_TYPES", "Key", "Stored", "default_of", "make"]

#: The version of the format that this release reads and writes.
SCHEMA = 1

#: Kinds of values, and the types that each has in stored rules.
STORED_TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "texts": (list,),
    "flag": (bool,),
    "integer": (int,),
    "integer_or_null": (int, type(None)),
    "number": (int, float),
    "limit": (int, float, type(None)),
    "pattern": (str,),
    "layers": (str, list),
    "count": (int, list, dict),  # a section, or in place of it a number or several
    "extends": (str,),
    "quantize": (list,),
    "section": (dict,),  # one of SECTIONS
    "sections": (list,),  # several
    "mapping": (dict,),  # several, by names of their own
}


class Stored(Enum):
    """Whether stored rules have a key."""

    OTHERWISE = "where it is not the default"
    WRITTEN = "this release writes it, and reads rules without it"
    ALWAYS = "rules without it are damaged"
    ONLY = "always, and a rule file never has it"


class Key(NamedTuple):
    """What a section holds under a key.

    Attributes:
        kind: One of :data:`STORED_TYPES`.
        of: Which section a ``section``, or each of several, is.
        field: The dataclass's field, if it is not called like the key: dotted where it is one of the scope; ``""``
            where the value holds fields itself.
        needed: What to write where a rule file lacks the key; ``""``: it may be left out.
        stored: Whether stored rules have it.
    """

    kind: str
    of: str = ""
    field: str | None = None
    needed: str = ""
    stored: Stored = Stored.OTHERWISE


_WRITTEN, _ALWAYS, _ONLY = Stored.WRITTEN, Stored.ALWAYS, Stored.ONLY
_SCOPE = {"within": Key("texts", field="scope.within"), "layers": Key("layers", field="scope.layers")}
_GLOBS = {"sites": Key("texts"), "rules": Key("texts")}
_SOURCE = {"source": Key("text", stored=_ONLY)}

#: The sections, by what stored rules call them.
SECTIONS: dict[str, dict[str, Key]] = {
    "rules": {
        "schema": Key("integer", needed=f"write schema: {SCHEMA}", stored=_ALWAYS),
        "name": Key("text", needed="write name:", stored=_ALWAYS),
        "why": Key("text", stored=_ALWAYS),
        "specs": Key("mapping", "spec", stored=_ALWAYS),
        "rules": Key("sections", "rule", needed="write rules:", stored=_ALWAYS),
        "calibration": Key("section", "calibration"),
        "extends": Key("extends"),
        "exclude": Key("sections", "exclusion"),
        "share": Key("sections", "share"),
    },
    "spec": {
        "num_bits": Key("integer", stored=_WRITTEN),
        "axis": Key("integer_or_null", stored=_WRITTEN),
        "unsigned": Key("flag", stored=_WRITTEN),
        "narrow_range": Key("flag", stored=_WRITTEN),
        "calibrator": Key("section", "calibrator", stored=_ALWAYS),
        "max_amax": Key("limit", stored=_WRITTEN),
        "learn": Key("flag", stored=_WRITTEN),
        "zero_point": Key("integer"),
    },
    "calibrator": {
        "name": Key("text", needed="write for example name: percentile", stored=_WRITTEN),
        "percentile": Key("number"),
        "num_bins": Key("integer"),
        "threshold": Key("number"),
        "alpha": Key("number"),
    },
    "rule": {
        "name": Key("text", needed="write name:", stored=_ALWAYS),
        "why": Key("text", needed="write why:", stored=_ALWAYS),
        "match": Key("section", "match", field="", needed="write match:", stored=_ALWAYS),
        "quantize": Key("quantize", "place", needed="write quantize:", stored=_ALWAYS),
        **_SOURCE,
        "optional": Key("flag"),
        "expect": Key("section", "expectation"),
    },
    "match": {
        "pattern": Key("pattern", stored=_ALWAYS),
        "unless": Key("pattern"),
        "rows": Key("count", "count"),
        **_SCOPE,
    },
    "place": {
        "operand": Key("text", stored=_ONLY),
        "spec": Key("text", stored=_ALWAYS),
        "as": Key("text", field="name"),
    },
    "expectation": {
        "per_layer": Key("count", "count"),
        "total": Key("count", "count"),
        "model_types": Key("mapping", "count"),
    },
    "count": {"min": Key("integer", field="minimum"), "max": Key("integer", field="maximum")},
    "exclusion": {
        "why": Key("text", needed="say why these stay in float", stored=_ALWAYS),
        **_SCOPE,
        **_GLOBS,
        **_SOURCE,
        "optional": Key("flag"),
    },
    "share": {
        "why": Key("text", needed="say why these have one range", stored=_ALWAYS),
        **_SCOPE,
        **_GLOBS,
        "captures": Key("texts"),
        **_SOURCE,
        "optional": Key("flag", stored=_ALWAYS),
    },
    "calibration": {"dropout": Key("flag", stored=_WRITTEN), "recalibrate_weights": Key("flag", stored=_WRITTEN)},
}

#: What the sections make. (A match is a part of its rule.)
_MAKES: dict[str, type] = {
    "rules": spec.RuleSet,
    "spec": QuantSpec,
    "calibrator": CalibratorSpec,
    "rule": spec.Rule,
    "match": spec.Rule,
    "place": spec.Place,
    "expectation": spec.Expect,
    "count": spec.Count,
    "exclusion": spec.Exclude,
    "share": spec.Share,
    "calibration": spec.CalibrationOptions,
}


def make(section: str, values: Mapping[str, Any]) -> Any:
    """What a section with ``values``, by key, says: an object, or for a match fields of its rule.

    Raises:
        RuleFileError: The values do not go together; it does not know the place.
    """
    made: dict[str, Any] = {}
    scope: dict[str, Any] = {}
    for key, value in values.items():
        field = SECTIONS[section][key].field
        if field == "":
            made.update(value)
        elif field is not None and field.startswith("scope."):
            scope[field.removeprefix("scope.")] = value
        else:
            made[field or key] = value
    if scope:
        made["scope"] = spec.Scope(**scope)
    return made if section == "match" else _MAKES[section](**made)


@functools.cache
def default_of(section: str, key: str) -> Any:
    """What it means that ``key`` is left out; ``MISSING`` if it cannot be."""
    name, _, inner = (SECTIONS[section][key].field or key).partition(".")
    field = next(field for field in fields(_MAKES[section]) if field.name == name)
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return attrgetter(inner)(value) if inner else value
