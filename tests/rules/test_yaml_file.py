"""Rule files: what is written is what is loaded."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from rule_texts import (
    GOOD,
    HEAD,
    RULES,
    refusal,
    with_key,
    with_spec,
    write,
)

from qdq_surgery.errors import RuleFileError
from qdq_surgery.rules import yaml_file
from qdq_surgery.rules.pattern import parse_pattern
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec
from qdq_surgery.rules.spec import CalibrationOptions, Count, Exclude, Expect, Place, Rule, RuleSet, Scope, Share
from qdq_surgery.rules.yaml_file import load_rules, shipped_rules

# -- what is loaded is what was written ------------------------------------------------------------------------------

FULL = """\
schema: 1
name: mine
why: to try everything once
specs:
  plain: default
  eight: {}
  four: {num_bits: 4, axis: 0, narrow_range: true}
  positive: {num_bits: 8, unsigned: true, narrow_range: false, axis: null, calibrator: entropy}
  tail:
    calibrator: {name: percentile, percentile: 99.99, num_bins: 2048}
  gelu: {calibrator: best, max_amax: 10, learn: true}
rules:
  - name: product
    why: |
      two
      lines
    match:
      within: "*.attention.*"
      layers: [0, 11]
      pattern: "matmul(q, k=transpose(_))"
    quantize:
      k: {spec: tail, as: k_input_quantizer}
      q: {spec: positive}
    expect: {per_layer: 1, total: {min: 1, max: 2}, model_types: {bert: [6, 10], deberta-v2: {max: 3}}}
    optional: true
  - name: linear
    why: it pays
    match: {within: [a, b], layers: all, pattern: "linear(x, w)"}
    quantize: {x: {as: x_quantizer}, w: four}
    # it promises nothing
    optional: false
exclude:
  - {why: too sensitive, within: ['*.0.*', '*.1.*'], layers: 0, sites: x_quantizer, rules: [product, 'lin*']}
  - why: not yet
    layers: [1, 2]
share:
  - {why: one GEMM, within: '*.self', layers: all, sites: [q_*, k_*], rules: product, captures: [q, k], optional: true}
  - why: one input
    captures: x
calibration: {dropout: true, recalibrate_weights: true}
"""


def test_what_is_loaded_is_what_was_written(tmp_path: Path) -> None:
    path = write(tmp_path / "everything.yaml", FULL)
    assert load_rules(path) == RuleSet(
        name="mine",
        why="to try everything once",
        specs={
            "plain": None,
            "eight": QuantSpec(),
            "four": QuantSpec(4, 0, narrow_range=True),
            "positive": QuantSpec(8, None, unsigned=True, calibrator=CalibratorSpec("entropy")),
            "tail": QuantSpec(calibrator=CalibratorSpec("percentile", 99.99, 2048)),
            "gelu": QuantSpec(calibrator=CalibratorSpec("best"), max_amax=10.0, learn=True),
        },
        rules=(
            Rule(
                name="product",
                why="two\nlines\n",
                pattern=parse_pattern("matmul(q, k=transpose(_))"),
                quantize={"k": Place("tail", "k_input_quantizer"), "q": Place("positive")},
                scope=Scope(within=("*.attention.*",), layers=(0, 11)),
                expect=Expect(
                    per_layer=Count((1,)),
                    total=Count(minimum=1, maximum=2),
                    model_types={"bert": Count((6, 10)), "deberta-v2": Count(maximum=3)},
                ),
                optional=True,
                source="everything.yaml:13",
            ),
            Rule(
                name="linear",
                why="it pays",
                pattern=parse_pattern("linear(x, w)"),
                quantize={"x": Place("default", "x_quantizer"), "w": Place("four")},
                scope=Scope(within=("a", "b"), layers="all"),
                source="everything.yaml:26",
            ),
        ),
        exclude=(
            Exclude(
                "too sensitive",
                Scope(("*.0.*", "*.1.*"), (0,)),
                sites=("x_quantizer",),
                rules=("product", "lin*"),
                source="everything.yaml:33",
            ),
            Exclude("not yet", Scope(layers=(1, 2)), source="everything.yaml:34"),
        ),
        extends=None,
        path=path.resolve(),
        text=FULL,
        files=(path.resolve(),),
        share=(
            Share(
                "one GEMM",
                Scope(("*.self",), "all"),
                sites=("q_*", "k_*"),
                rules=("product",),
                captures=("q", "k"),
                optional=True,
                source="everything.yaml:37",
            ),
            Share("one input", captures=("x",), source="everything.yaml:38"),
        ),
        calibration=CalibrationOptions(dropout=True, recalibrate_weights=True),
    )


def test_what_is_loaded_is_frozen(tmp_path: Path) -> None:
    rules = load_rules(write(tmp_path / "mine.yaml", FULL))
    for value, name in [(rules, "name"), (rules.rules[0], "why"), (rules.exclude[0], "sites"), (rules, "rules")]:
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, None)
    assert rules == load_rules(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "count", "words"),
    [
        pytest.param("6", Count((6,)), "6", id="one"),
        pytest.param("0", Count((0,)), "0", id="zero"),
        pytest.param("[6]", Count((6,)), "6", id="list-of-one"),
        pytest.param("[6, 10]", Count((6, 10)), "6 or 10", id="list"),
        pytest.param("{min: 1}", Count(minimum=1), "at least 1", id="min"),
        pytest.param("{max: 2}", Count(maximum=2), "at most 2", id="max"),
        pytest.param("{max: 2, min: 1}", Count(minimum=1, maximum=2), "1 to 2", id="range"),
    ],
)
@pytest.mark.parametrize("key", ["per_layer: {}", "total: {}", "model_types: {{bert: {}}}"])
def test_counts(key: str, text: str, count: Count, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", with_key(f"expect: {{{key.format(text)}}}"))
    expect = load_rules(path).rules[0].expect
    (read,) = [one for one in (expect.per_layer, expect.total, expect.model_types.get("bert")) if one is not None]
    assert read == count
    assert str(read) == words


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        pytest.param("default", None, id="default"),
        pytest.param("{}", QuantSpec(), id="nothing-said"),
        pytest.param("{num_bits: +4}", QuantSpec(4), id="plus"),
        pytest.param("{axis: 1}", QuantSpec(axis=1), id="axis"),
        pytest.param("{axis: null}", QuantSpec(), id="null-axis"),
        pytest.param("{calibrator: mse}", QuantSpec(calibrator=CalibratorSpec("mse")), id="short"),
        pytest.param("{calibrator: {name: mse}}", QuantSpec(calibrator=CalibratorSpec("mse")), id="long"),
        pytest.param("{calibrator: 'max'}", QuantSpec(), id="quoted"),
        pytest.param(
            "{calibrator: {name: percentile, percentile: 99}}",
            QuantSpec(calibrator=CalibratorSpec("percentile", 99.0)),
            id="whole-percentile",
        ),
        pytest.param("{calibrator: best}", QuantSpec(calibrator=CalibratorSpec("best")), id="best"),
        pytest.param(
            "{axis: 0, calibrator: mse}", QuantSpec(axis=0, calibrator=CalibratorSpec("mse")), id="channels-by-mse"
        ),
        pytest.param("{max_amax: 10}", QuantSpec(max_amax=10.0), id="whole-limit"),
        pytest.param("{max_amax: 0.5}", QuantSpec(max_amax=0.5), id="limit"),
        pytest.param("{learn: true}", QuantSpec(learn=True), id="learned"),
        pytest.param("{learn: false}", QuantSpec(), id="not-learned"),
    ],
)
def test_specs(text: str, spec: QuantSpec | None, tmp_path: Path) -> None:
    rules = load_rules(write(tmp_path / "mine.yaml", with_spec(text)))
    assert rules.specs == {"s": spec}
    assert rules.spec("s") == spec


def test_words_that_look_like_something_else_can_be_quoted(tmp_path: Path) -> None:
    text = GOOD.replace("name: mine", "name: 'no'").replace("name: first", 'name: "3"').replace("it pays", "'null'")
    rules = load_rules(write(tmp_path / "mine.yaml", text))
    assert (rules.name, rules.rules[0].name, rules.rules[0].why) == ("no", "3", "null")


def test_unicode_in_words(tmp_path: Path) -> None:
    assert load_rules(write(tmp_path / "mine.yaml", f"{HEAD}why: größer → 😀\n{RULES}")).why == "größer → 😀"


# -- where rules come from -------------------------------------------------------------------------------------------


def test_a_rule_set_is_returned_as_it_is() -> None:
    rules = load_rules("qdqbert")
    assert load_rules(rules) is rules


def test_a_path_may_be_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "mine.yaml", GOOD)
    monkeypatch.chdir(tmp_path)
    assert load_rules(str(path)) == load_rules(path) == load_rules("mine.yaml") == load_rules(Path("mine.yaml"))
    assert load_rules("mine.yaml").path == path.resolve()


def test_a_shipped_name_goes_before_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "qdqbert", GOOD)
    monkeypatch.chdir(tmp_path)
    assert load_rules("qdqbert").name == "qdqbert"
    assert load_rules("./qdqbert").name == "mine"
    assert load_rules(Path("qdqbert")).name == "mine"


#: The shipped rule files, each with the one that it extends.
SHIPPED = {
    "fuse-qkv": "qdqbert",
    "linear-only": None,
    "onnxruntime": "qdqbert-scaled",
    "openvino": "qdqbert-scaled",
    "pytorch": "linear-only",
    "qdqbert": None,
    "qdqbert-scaled": "qdqbert",
    "tensorrt": "qdqbert-scaled",
    "tensorrt-both": "qdqbert-scaled",
    "tensorrt-none": "qdqbert-scaled",
}


def test_which_rule_files_are_shipped() -> None:
    assert set(shipped_rules()) == set(SHIPPED)


@pytest.mark.parametrize("name", sorted(shipped_rules()))
def test_a_shipped_file_loads(name: str) -> None:
    path = shipped_rules()[name]
    rules = load_rules(name)
    assert rules == load_rules(path)
    assert rules.name == name == path.stem
    base = SHIPPED[name]
    files = (path.resolve(), *(() if base is None else load_rules(base).files))
    assert (rules.path, rules.files, rules.extends) == (path.resolve(), files, base)
    assert rules.text == path.read_text(encoding="utf-8")
    assert rules.why
    inherited = () if base is None else load_rules(base).rules
    names = {rule.name for rule in rules.rules}
    assert names >= {rule.name for rule in inherited}  # some are replaced
    own = [rule for rule in rules.rules if rule not in inherited]
    assert own or base is not None  # what extends another may only exclude
    assert all(rule.why and rule.source.startswith(f"{path.name}:") for rule in own)


def test_whoever_loads_a_shipped_file_has_rules_of_his_own() -> None:
    first, wanted = load_rules("onnxruntime"), load_rules("onnxruntime")
    assert first.specs is not wanted.specs
    first.specs.clear()  # type: ignore[attr-defined]
    assert load_rules("onnxruntime") == wanted


def test_a_shipped_file_that_changes_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("qdqbert", "qdqbert-scaled", "onnxruntime"):
        (tmp_path / f"{name}.yaml").write_text(shipped_rules()[name].read_text())
    monkeypatch.setattr(yaml_file, "shipped_rules", lambda: {path.stem: path for path in tmp_path.glob("*.yaml")})
    before = load_rules("onnxruntime")
    base = tmp_path / "qdqbert.yaml"
    base.write_text(base.read_text().replace("name: encoder-linear\n", "name: linears\n"))
    load_rules("qdqbert")  # by itself; what extends it is not to be taken for new
    after = load_rules("onnxruntime")
    named = [{rule.name for rule in each.rules} & {"encoder-linear", "linears"} for each in (before, after)]
    assert named == [{"encoder-linear"}, {"linears"}]
    base.write_text("schema: 1\n")
    with pytest.raises(RuleFileError, match="is missing"):
        load_rules("onnxruntime")


def test_what_shipped_files_hold_counts_for_those_that_extend_them(tmp_path: Path) -> None:
    """Read before or not."""
    globs = ", ".join(['"*"'] * 950)
    entries = "exclude:\n" + f"  - {{why: w, rules: [{globs}]}}\n" * 3
    write(tmp_path / "many.yaml", f"{GOOD}{entries}")
    assert len(load_rules(tmp_path / "many.yaml").exclude) == 3
    write(tmp_path / "more.yaml", f"{HEAD}extends: onnxruntime\n{entries}")
    load_rules("onnxruntime")
    assert "too many values" in refusal(tmp_path / "more.yaml").found


def test_what_the_shipped_files_hold() -> None:
    assert [rule.name for rule in load_rules("linear-only").rules] == ["encoder-linear"]
    # The order is the precedence: a product that feeds a gather also fits the scores' pattern, so it must come first.
    assert [rule.name for rule in load_rules("qdqbert").rules] == [
        "encoder-linear",
        "attention-context",
        "relative-position-scores",
        "attention-scores",
        "residual-add",
        "other-residual-add",
    ]
    for name in ("linear-only", "qdqbert"):
        rules = load_rules(name)
        assert rules.specs == {"activation": None, "weight": None}
        assert (rules.share, rules.calibration) == ((), CalibrationOptions())


def test_fuse_qkv_is_qdqbert_with_two_shared_ranges() -> None:
    base, rules = load_rules("qdqbert"), load_rules("fuse-qkv")
    assert rules.specs == {**base.specs, "fused-weight": QuantSpec()}
    # The weights' rules come first: for each operand the first match wins, and encoder-linear would match too.
    assert [rule.name for rule in rules.rules] == [
        "position-weights",
        "query-key-weights",
        "value-weights",
        *(rule.name for rule in base.rules),
    ]
    outputs, weights = rules.share
    assert outputs.sites == ("matmul_q_input_quantizer", "matmul_k_input_quantizer", "matmul_v_input_quantizer")
    assert weights.rules == ("query-key-weights", "value-weights")
    # A model with one fused projection has one weight, but every attention has these three outputs.
    assert (outputs.optional, weights.optional) == (False, True)
    assert (rules.exclude, rules.calibration) == ((), CalibrationOptions())


USER = """\
schema: 1
name: mine
extends: qdqbert
specs: {activation: {calibrator: mse}, weight: {num_bits: 4, axis: 0}}
exclude: [{why: the first layer is sensitive, layers: 0}]
rules:
  - name: pooler
    why: it is a linear too
    match: {within: "*.pooler.*", pattern: "linear(x, w)"}
    quantize: {x: activation, w: weight}
"""


def test_ten_lines_change_bits_exclude_a_layer_and_add_a_rule(tmp_path: Path) -> None:
    assert len(USER.splitlines()) == 10
    base, mine = load_rules("qdqbert"), load_rules(write(tmp_path / "mine.yaml", USER))
    assert str(mine.spec(mine.rule("encoder-linear").quantize["w"].spec)) == "int4 axis 0 max"
    assert str(mine.spec(mine.rule("attention-scores").quantize["q"].spec)) == "int8 per-tensor mse"
    assert [exclude.holds("encoder-linear", "input_quantizer", "bert.x", 0) for exclude in mine.exclude] == [True]
    assert [exclude.holds("encoder-linear", "input_quantizer", "bert.x", 1) for exclude in mine.exclude] == [False]
    assert mine.rules[0].name == "pooler"
    assert mine.rules[0].scope.holds("bert.pooler.dense", None)
    assert mine.rules[1:] == base.rules


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{why: w, layers: []}", "layers names no layer"),
        ("{why: w, within: []}", "within names no module"),
        ("{why: w, sites: []}", "sites names nothing"),
        ("{why: w, rules: []}", "rules names nothing"),
    ],
)
def test_an_exclude_entry_that_names_nothing_has_a_place(entry: str, message: str, tmp_path: Path) -> None:
    error = refusal(write(tmp_path / "mine.yaml", f"{HEAD}{RULES}exclude:\n  - {entry}\n"))
    assert error.path is not None
    assert error.line == (HEAD + RULES).count("\n") + 2
    assert message in error.found


@pytest.mark.parametrize("number", ["010", "0_1", "1_0"])
def test_numbers_are_decimal(number: str, tmp_path: Path) -> None:
    text = f"{HEAD}specs: {{x: {{num_bits: {number}}}}}\n{RULES}"
    assert "not a decimal whole number" in refusal(write(tmp_path / "mine.yaml", text)).found


@pytest.mark.parametrize("rules", [None, 5, {"name": "mine"}, ["qdqbert"]])
def test_what_is_no_rule_set_at_all(rules: object) -> None:
    with pytest.raises(RuleFileError, match=rf"^rules: found a {type(rules).__name__}; give the name of a shipped set"):
        load_rules(rules)  # type: ignore[arg-type]
