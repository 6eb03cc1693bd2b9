"""Rules as plain data: what comes back is what was given, and whatever is damaged is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pattern_trees import NAMES, PROPERTY, trees

from qdq_surgery.errors import RuleFileError
from qdq_surgery.rules.json_data import rules_from_data, rules_to_data
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
from qdq_surgery.rules.yaml_file import load_rules, shipped_rules

EVERYTHING = """\
schema: 1
name: mine
why: all that a file can say
extends: qdqbert
specs:
  activation: {num_bits: 8, calibrator: {name: percentile, percentile: 99.99, num_bins: 4096}}
  weight: {num_bits: 4, axis: 0, narrow_range: true, calibrator: mse}
  wide: {num_bits: 16, unsigned: true, calibrator: best, max_amax: 10, learn: true}
rules:
  - name: after-gelu
    why: the range after GELU is lopsided
    match: {layers: [0, 2], within: ["*.output", "*.ffn"], pattern: "linear(x=gelu(_), w)"}
    quantize: {x: {spec: wide, as: gelu_quantizer}, w: default}
    expect: {per_layer: {min: 0, max: 2}, total: [1, 2, 3], model_types: {bert: 1, albert: [1, 2]}}
    optional: true
exclude:
  - {layers: [0], sites: "add_*", why: the first costs most}
  - {rules: ["attention-*"], within: "*.self", why: it may}
share:
  - {rules: residual-add, why: one scale}
  - {rules: encoder-linear, captures: x, layers: all, sites: "_input*", optional: true, why: one more}
calibration: {recalibrate_weights: true, dropout: true}
"""


def through_json(rules: RuleSet) -> RuleSet:
    """As ``config.json`` is written and read: keys in another order."""
    return rules_from_data(json.loads(json.dumps(rules_to_data(rules), sort_keys=True)))


def content(rules: RuleSet) -> RuleSet:
    """Rules without the files that they came from, which a saved model does not have."""
    return dataclasses.replace(rules, path=None, text="", files=())


def assert_same(found: RuleSet, wanted: RuleSet) -> None:
    assert found == content(wanted)
    # Equal dicts may differ in their order, which is the order of the quantizers.
    for rule, other in zip(found.rules, wanted.rules, strict=True):
        assert list(rule.quantize) == list(other.quantize)


@pytest.mark.parametrize("name", shipped_rules())
def test_shipped_rules_come_back(name: str) -> None:
    rules = load_rules(name)
    assert_same(through_json(rules), rules)
    assert rules_to_data(through_json(rules)) == rules_to_data(rules)


def test_every_option_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(EVERYTHING)
    rules = load_rules(path)
    assert_same(through_json(rules), rules)
    path.unlink()
    assert_same(through_json(through_json(rules)), rules)


def test_rules_that_were_changed_in_python_come_back() -> None:
    rules = load_rules("qdqbert")
    changed = dataclasses.replace(rules, rules=rules.rules[:2], exclude=(Exclude("so", Scope(layers=(1,))),))
    assert_same(through_json(changed), changed)
    assert through_json(changed) != content(rules)


TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), max_size=12)
SOURCES = st.just("") | st.from_regex(r"[a-zß ]{1,9}:[0-9]{1,4}", fullmatch=True)
GLOBS = st.none() | st.lists(TEXTS, min_size=1, max_size=3).map(tuple)
LAYERS = st.none() | st.just("all") | st.lists(st.integers(0, 40), min_size=1, max_size=4).map(tuple)
SCOPES = st.builds(Scope, GLOBS, LAYERS)
COUNTS = st.lists(st.integers(0, 99), min_size=1, max_size=3).map(lambda numbers: Count(tuple(numbers))) | st.tuples(
    st.integers(0, 9), st.none() | st.integers(9, 99)
).map(lambda limits: Count(minimum=limits[0], maximum=limits[1]))
EXPECTATIONS = st.builds(Expect, st.none() | COUNTS, st.none() | COUNTS, st.dictionaries(TEXTS, COUNTS, max_size=2))
CALIBRATORS = st.sampled_from(
    [CalibratorSpec(), CalibratorSpec("entropy"), CalibratorSpec("percentile", 99.9), CalibratorSpec("mse", None, 512)]
)


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    calibrator = draw(CALIBRATORS)
    axis = draw(st.none() | st.integers(0, 3)) if calibrator == CalibratorSpec() else None
    unsigned, narrow = draw(st.sampled_from([(False, False), (True, False), (False, True)]))
    limit = draw(st.none() | st.floats(0.1, 1e6))
    return QuantSpec(draw(st.integers(2, 16)), axis, unsigned, narrow, calibrator, limit, draw(st.booleans()))


@st.composite
def rule_sets(draw: st.DrawFn) -> RuleSet:
    named = draw(st.dictionaries(TEXTS.filter(lambda name: name != DEFAULT_SPEC), specs(), max_size=3))
    rules: list[Rule] = []
    for index in range(draw(st.integers(1, 3))):
        pattern = draw(trees())
        captures = pattern.captures()
        assume(captures and len(str(pattern)) <= 500)
        spec = st.sampled_from([DEFAULT_SPEC, *named])
        quantize = {
            name: Place(draw(spec), draw(st.none() | st.just(f"r{index}_{place}_quantizer")))
            for place, name in enumerate(captures)
        }
        rules.append(
            Rule(
                f"{index}{draw(NAMES)}",
                draw(TEXTS),
                pattern,
                quantize,
                draw(SCOPES),
                draw(EXPECTATIONS),
                draw(st.booleans()),
                draw(SOURCES),
            )
        )
    names = st.none() | st.lists(st.sampled_from([rule.name for rule in rules]), min_size=1, max_size=2).map(tuple)
    return RuleSet(
        draw(TEXTS),
        draw(TEXTS),
        named,
        tuple(rules),
        tuple(draw(st.lists(st.builds(Exclude, TEXTS, SCOPES, GLOBS, names, SOURCES), max_size=2))),
        draw(st.none() | TEXTS),
        share=tuple(draw(st.lists(st.builds(Share, TEXTS, SCOPES, GLOBS, names, GLOBS, st.booleans()), max_size=2))),
        calibration=draw(st.builds(CalibrationOptions, st.booleans(), st.booleans())),
    )


@settings(PROPERTY, max_examples=50)  # 40 ms each
@given(rules=rule_sets())
def test_any_rules_come_back(rules: RuleSet) -> None:
    assert_same(through_json(rules), rules)


# Damage --------------------------------------------------------------------------------------------------------------


def everything(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "mine.yaml").write_text(EVERYTHING)
    return json.loads(json.dumps(rules_to_data(load_rules(tmp_path / "mine.yaml"))))  # type: ignore[no-any-return]


def put(*path: Any) -> Callable[[Any], None]:
    """Sets the last of ``path`` at the place that the others lead to."""
    *way, key, value = path

    def change(data: Any) -> None:
        for step in way:
            data = data[step]
        data[key] = value

    return change


def drop(*path: Any) -> Callable[[Any], None]:
    *way, key = path

    def change(data: Any) -> None:
        for step in way:
            data = data[step]
        del data[key]

    return change


RULE = ("rules", 0)
DAMAGE: dict[str, tuple[Callable[[Any], None], str]] = {
    "schema-of-another-release": (put("schema", 2), "the stored rules have schema 2; this release reads 1"),
    "no-schema": (drop("schema"), "schema None"),
    "no-name": (drop("name"), "the stored rules lack the key 'name'"),
    "no-rules": (drop("rules"), "lack the key 'rules'"),
    "unknown-key": (put("layers", "all"), "a stored rules has the unknown key 'layers'; known: schema, name, why"),
    "name-no-text": (put("name", 5), "'name' of a stored rules is the int 5"),
    "rules-no-list": (put("rules", {}), "'rules' of a stored rules is the dict {}"),
    "rule-no-mapping": (put("rules", 0, "linear"), "found a str in place of a stored rule"),
    "spec-no-mapping": (put("specs", "wide", "int8"), "found a str in place of a stored spec"),
    "spec-unknown-key": (put("specs", "wide", "bits", 4), "a stored spec has the unknown key 'bits'"),
    "spec-without-calibrator": (drop("specs", "wide", "calibrator"), "lack the key 'calibrator'"),
    "bits-no-int": (put("specs", "wide", "num_bits", 8.0), "'num_bits' of a stored spec is the float 8.0"),
    "bits-true": (put("specs", "wide", "num_bits", True), "'num_bits' of a stored spec is the bool True"),
    "bits-too-many": (put("specs", "wide", "num_bits", 99), "num_bits 99 is outside 2 to 16"),
    "flag-no-flag": (put("specs", "wide", "unsigned", "no"), "'unsigned' of a stored spec is the str 'no'"),
    "calibrator-unknown": (put("specs", "wide", "calibrator", "name", "magic"), "magic"),
    "calibrator-typo": (put("specs", "wide", "calibrator", "percentil", 9), "a stored calibrator has the unknown key"),
    "rule-without-why": (drop(*RULE, "why"), "lack the key 'why'"),
    "rule-without-match": (drop(*RULE, "match"), "lack the key 'match'"),
    "key-at-the-wrong-level": (put(*RULE, "layers", [0]), "a stored rule has the unknown key 'layers'"),
    "pattern-no-text": (put(*RULE, "match", "pattern", None), "'pattern' of a stored match is the NoneType None"),
    "pattern-wrong": (put(*RULE, "match", "pattern", "lnear(x, w)"), "lnear"),
    "pattern-of-code": (put(*RULE, "match", "pattern", "__import__('os')"), "__import__"),
    "within-a-text": (put(*RULE, "match", "within", "*.output"), "'within' of a stored match is the str '"),
    "within-of-numbers": (put(*RULE, "match", "within", [1]), "'within' of a stored match is no list of texts"),
    "layers-negative": (put(*RULE, "match", "layers", [-1]), "layer -1 does not exist"),
    "layers-of-texts": (put(*RULE, "match", "layers", ["0"]), "the stored rules are damaged"),
    "place-unknown-spec": (put(*RULE, "quantize", 0, "spec", "none"), "uses the spec 'none', which is not defined"),
    "place-unknown-capture": (put(*RULE, "quantize", 0, "operand", "z"), "quantizes 'z', which its pattern"),
    "place-bad-name": (put(*RULE, "quantize", 0, "as", "Q"), "'Q' is no quantizer name"),
    "place-unknown-key": (put(*RULE, "quantize", 0, "name", "q"), "a stored place has the unknown key 'name'"),
    "quantize-a-mapping": (put(*RULE, "quantize", {"x": "wide"}), "'quantize' of a stored rule is the dict"),
    "expect-unknown-key": (put(*RULE, "expect", "per_block", 1), "a stored expectation has the unknown key"),
    "count-a-text": (put(*RULE, "expect", "per_layer", "1"), "'per_layer' of a stored expectation is the str '1'"),
    "count-of-texts": (put(*RULE, "expect", "per_layer", ["1"]), r"a stored count is no number: \['1'\]"),
    "count-of-a-type": (put(*RULE, "expect", "model_types", "bert", "1"), "a stored count is no number"),
    "count-empty": (put(*RULE, "expect", "per_layer", {}), "a count allows no number"),
    "count-typo": (put(*RULE, "expect", "per_layer", {"mini": 1}), "a stored count has the unknown key 'mini'"),
    "rule-twice": (lambda data: data["rules"].append(data["rules"][0]), "two rules are called 'after-gelu'"),
    "exclude-unknown-rule": (put("exclude", 0, "rules", ["nobody"]), "names the rule 'nobody', which does not"),
    "exclude-unknown-key": (put("exclude", 0, "site", "x"), "a stored exclusion has the unknown key 'site'"),
    "exclude-no-why": (drop("exclude", 0, "why"), "lack the key 'why'"),
    "share-no-optional": (drop("share", 0, "optional"), "lack the key 'optional'"),
    "share-a-mapping": (put("share", {}), "'share' of a stored rules is the dict"),
    "calibration-unknown-key": (put("calibration", "drop_out", True), "a stored calibration has the unknown key"),
    "calibration-no-flag": (put("calibration", "dropout", 1), "'dropout' of a stored calibration is the int 1"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name: str, tmp_path: Path) -> None:
    data = everything(tmp_path)
    rules_from_data(copy.deepcopy(data))
    change, message = DAMAGE[name]
    change(data)
    with pytest.raises(RuleFileError, match=message) as caught:
        rules_from_data(data)
    assert caught.value.fix
    assert caught.value.path is None


HUGE = 10**5000
PLACES: dict[str, tuple[Callable[[Any], None], str]] = {
    "quantizer": (put(*RULE, "quantize", 0, "as", "x"), r"^rules\[0\]\.quantize\[0\]\.as: 'x' is no quantizer name"),
    "quantizer-of-512-letters": (put(*RULE, "quantize", 0, "as", "x" * 512 + "_quantizer"), r"^rules\[0\]\.quantize"),
    "operand-twice": (
        lambda data: data["rules"][0]["quantize"].append(data["rules"][0]["quantize"][0]),
        r"^rules\[0\]\.quantize\[2\]\.operand: 'x' is quantized twice",
    ),
    "bits": (put("specs", "wide", "num_bits", 99), r"^specs\.wide: num_bits 99"),
    "bits-huge": (put("specs", "wide", "num_bits", HUGE), r"^specs\.wide\.num_bits: .* too large"),
    "percentile-nan": (
        put("specs", "activation", "calibrator", "percentile", float("nan")),
        r"^specs\.activation\.calibrator: percentile nan",
    ),
    "percentile-huge": (
        put("specs", "activation", "calibrator", "percentile", HUGE),
        r"^specs\.activation\.calibrator\.percentile: .* too large",
    ),
    "limit-too-small": (put("specs", "wide", "max_amax", 1e-60), r"^specs\.wide: max_amax 1e-60 is outside"),
    "limit-infinite-in-float32": (put("specs", "wide", "max_amax", 1e39), r"^specs\.wide: max_amax 1e\+39 is outside"),
    "name-of-a-spec": (put("specs", "a\x1bb", "default"), r"the name of a spec has the hidden character U\+001B"),
    "name-of-a-spec-no-text": (put("specs", 5, "default"), r"^specs: .*has a key that is the int 5"),
    "name-of-a-rule": (put(*RULE, "name", "a\nb"), r"^rules\[0\]: the name of a rule has the hidden character U\+000A"),
    "name-too-long": (put("name", "x" * 257), "^the name has 257 characters; write at most 256"),
    "why-turned-around": (put(*RULE, "why", "a\u202eb"), r"^rules\[0\]: why has the hidden character U\+202E"),
    "pattern-too-long": (put(*RULE, "match", "pattern", "x" * 501), r"^rules\[0\]\.match\.pattern: .*501 characters"),
    "layer-of-too-many": (put(*RULE, "match", "layers", [10**6]), r"^rules\[0\]\.match: layer 1000000 does not exist"),
    "layer-huge": (put(*RULE, "match", "layers", [HUGE]), r"^rules\[0\]\.match\.layers: "),
    "layer-true": (put(*RULE, "match", "layers", [True]), r"^rules\[0\]\.match\.layers: "),
    "layers-nested": (put(*RULE, "match", "layers", [[[[[[0]]]]]]), r"^rules\[0\]\.match\.layers: "),
    "layers-a-word": (put(*RULE, "match", "layers", "some"), r"^rules\[0\]\.match: layers is 'some'"),
    "count-huge": (put(*RULE, "expect", "total", HUGE), r"^rules\[0\]\.expect\.total: .* too large"),
    "count-huge-in-a-list": (put(*RULE, "expect", "total", [HUGE]), r"^rules\[0\]\.expect\.total: .* too large"),
    "count-true": (put(*RULE, "expect", "total", [True]), r"^rules\[0\]\.expect\.total: a stored count is no number"),
    "count-negative": (put(*RULE, "expect", "model_types", "bert", -1), r"^rules\[0\]\.expect\.model_types\.bert: "),
    "model-type-no-text": (put(*RULE, "expect", "model_types", 5, 1), r"^rules\[0\]\.expect\.model_types: .*the int 5"),
    "glob": (put("exclude", 0, "sites", ["a\0"]), r"^exclude\[0\]: a glob of sites has the hidden character U\+0000"),
    "globs": (put("exclude", 0, "sites", ["a"] * 1025), r"^exclude\[0\]\.sites: .*has 1025 entries"),
    "source": (put("share", 0, "source", "a file"), r"^share\[0\]: the source 'a file' is none"),
    "source-forged": (put("share", 0, "source", "a\nb:1"), r"^share\[0\]: source has the hidden character U\+000A"),
    "source-long": (put("share", 0, "source", "a" * 5000 + ":1"), r"^share\[0\]: source has 5002 characters"),
    "schema-true": (put("schema", True), "the stored rules have schema True"),
    "schema-list": (put("schema", [1] * 10**6), "the stored rules have schema "),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_has_no_bounds_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    data = everything(tmp_path)
    change, message = PLACES[name]
    change(data)
    with pytest.raises(RuleFileError, match=message) as caught:
        rules_from_data(data)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1300


def deep() -> Any:
    data: Any = []
    for _ in range(100_000):
        data = [data]
    return data


@pytest.mark.parametrize(
    "place",
    [
        ("name",),
        ("specs",),
        ("specs", "wide"),
        ("specs", "wide", "num_bits"),
        (*RULE, "expect", "total"),
        (*RULE, "match", "layers"),
        (*RULE, "match", "within"),
        (*RULE, "quantize"),
        ("exclude",),
    ],
    ids=lambda place: str(place[-1]),
)
def test_what_is_nested_without_end_is_refused(place: tuple[Any, ...], tmp_path: Path) -> None:
    data = everything(tmp_path)
    put(*place, deep())(data)
    with pytest.raises(RuleFileError):
        rules_from_data(data)


@pytest.mark.parametrize("data", [None, [], "qdqbert", 1])
def test_what_is_no_mapping_is_refused(data: Any) -> None:
    with pytest.raises(RuleFileError, match=r"found a .* in place of the stored rules"):
        rules_from_data(data)
