"""The table of the rule format agrees with the dataclasses, and each reader can read all that it names."""

from __future__ import annotations

from dataclasses import MISSING, fields

import pytest

from qdq_surgery.rules import schema
from qdq_surgery.rules.json_data import rules_from_data, rules_to_data
from qdq_surgery.rules.schema import SECTIONS, STORED_TYPES, Key, Stored, default_of
from qdq_surgery.rules.yaml_file import _File, load_rules

#: Keys that are no fields of what their section makes: the version, and the name under which a place stands.
BESIDE = {("rules", "schema"), ("place", "operand")}
#: Fields that no key says: where a rule set was read, and the numbers of a count in its short form.
UNSAID = {"rules": {"path", "text", "files"}, "count": {"allowed"}}

KEYS = [
    pytest.param(section, name, key, id=f"{section}-{name}")
    for section, keys in SECTIONS.items()
    for name, key in keys.items()
]


@pytest.mark.parametrize("key", [pytest.param(case.values[2], id=case.id) for case in KEYS])
def test_a_key_can_be_read(key: Key) -> None:
    assert key.kind in STORED_TYPES
    assert (key.of in SECTIONS) == (key.kind in ("section", "sections", "mapping", "count", "quantize"))
    if not key.of and key.stored is not Stored.ONLY:
        assert callable(getattr(_File, key.kind))


@pytest.mark.parametrize(("section", "name", "key"), KEYS)
def test_what_may_be_left_out_has_a_default(section: str, name: str, key: Key) -> None:
    if (section, name) in BESIDE or key.field == "" or name in ("rules", "specs", "why", "pattern"):
        return  # a file that extends another may leave these out, and a match without a pattern has an error of its own
    optional = not key.needed and key.stored is not Stored.ONLY
    assert not optional or default_of(section, name) is not MISSING


@pytest.mark.parametrize("section", [name for name in SECTIONS if name != "match"])
def test_every_field_has_a_key(section: str) -> None:
    said = {(key.field or name).partition(".")[0] for name, key in SECTIONS[section].items() if key.field != ""}
    if section == "rule":
        said |= {"scope", "pattern", "unless", "rows"}  # what its match says
    beside = {name for of, name in BESIDE if of == section}
    made = {field.name for field in fields(schema._MAKES[section])}
    assert said - beside | UNSAID.get(section, set()) == made


def test_a_new_key_is_read_and_written_by_its_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rules of an exclusion, say, under another name: neither reader nor writer knows of it.
    monkeypatch.setitem(SECTIONS["exclusion"], "unless", Key("texts", field="rules"))
    data = rules_to_data(load_rules("linear-only"))
    data["exclude"] = [{"why": "w", "sites": ["*"], "unless": ["encoder-linear"], "source": ""}]
    rules = rules_from_data(data)
    assert rules.exclude[0].rules == ("encoder-linear",)
    assert rules_to_data(rules)["exclude"][0]["unless"] == ["encoder-linear"]
