"""Rule sets as files: what is written is read as the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qdq_surgery.errors import RuleFileError
from qdq_surgery.rules.pattern import parse_pattern
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec
from qdq_surgery.rules.spec import CalibrationOptions, Count, Exclude, Expect, Place, Rule, RuleSet, Scope, Share
from qdq_surgery.rules.yaml_file import load_rules, rules_of_text, shipped_rules
from qdq_surgery.rules.yaml_writer import rules_text


def content(rules: RuleSet) -> tuple[Any, ...]:
    """Everything but where it was read."""
    entries = (replace(each, source="") for each in (*rules.rules, *rules.exclude, *rules.share))
    return rules.name, rules.why, dict(rules.specs), tuple(entries), rules.calibration


@pytest.mark.parametrize("name", shipped_rules())
def test_shipped_rules_come_back(name: str) -> None:
    rules = load_rules(name)
    read = rules_of_text(rules_text(rules), "copy.yaml")
    assert content(read) == content(rules)
    assert read.extends is None
    assert read.path is None
    assert read.files == ()


@pytest.mark.parametrize("name", [name for name in shipped_rules() if load_rules(name).extends])
def test_they_come_back_by_what_they_add(name: str) -> None:
    rules = load_rules(name)
    assert rules.extends is not None
    text = rules_text(rules, load_rules(rules.extends))
    assert content(rules_of_text(text, "copy.yaml")) == content(rules)
    assert len(text) < len(rules_text(rules))
    assert f"extends: {rules.extends}\n" in text


def everything() -> RuleSet:
    """A rule set with each key that there is."""
    specs: dict[str, QuantSpec | None] = {
        "plain": None,
        "percentile": QuantSpec(4, None, False, True, CalibratorSpec("percentile", 99.5, 512), 10.5, True),
        "scaled": QuantSpec(axis=-1, calibrator=CalibratorSpec("smooth", alpha=0.25)),
        "outliers": QuantSpec(
            axis=-1, unsigned=True, zero_point=32, calibrator=CalibratorSpec("outliers", threshold=3)
        ),
        "weight": QuantSpec(axis=0, calibrator=CalibratorSpec("mse")),
    }
    rules = (
        Rule(
            "first",
            "why: not, # and 'so' on",
            parse_pattern("matmul(a=maybe(dropout)(softmax(_)), v)"),
            {"a": Place("percentile", "matmul_a_input_quantizer"), "v": Place("plain", "matmul_v_input_quantizer")},
            Scope(("*.attention.*", "yes"), (0, 3)),
            Expect(Count((6, 10)), Count(minimum=1, maximum=7), {"bert": Count((6,)), "true": Count(maximum=3)}),
            True,
        ),
        Rule("12", "a number", parse_pattern("linear(x, w)"), {"x": Place("scaled"), "w": Place("weight")}),
    )
    return RuleSet(
        name="everything",
        why="two lines:\nthis one is the second, and longer than what fits in a line of the file that is written of it",
        specs=specs,
        rules=rules,
        exclude=(Exclude("one", Scope(layers=(2,)), ("add_*", "x"), ("first",)), Exclude("two", Scope(layers="all"))),
        share=(Share("three", Scope(within=("*",)), ("*q*",), None, ("a",), True),),
        calibration=CalibrationOptions(True, True),
    )


def test_every_key_comes_back() -> None:
    assert content(rules_of_text(rules_text(everything()), "copy.yaml")) == content(everything())


def test_what_is_written_can_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(rules_text(everything()), encoding="utf-8")
    assert content(load_rules(path)) == content(everything())


def test_a_text_that_is_no_rule_file_is_refused_by_its_name() -> None:
    with pytest.raises(RuleFileError, match=r"own\.yaml:\d+.*the key 'schema' is missing"):
        rules_of_text("name: x\nrules: []\n", "own.yaml")
