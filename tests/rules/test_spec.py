"""Rules as data: every class checks itself and says in words what it holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch

from qdq_surgery.errors import RuleFileError, printable
from qdq_surgery.numerics.channel_scales import SCALE_METHODS
from qdq_surgery.numerics.fake_quant import fake_quant
from qdq_surgery.numerics.grid import Grid
from qdq_surgery.rules.pattern import parse_pattern
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec, calibrator_names
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
    is_quantizer_name,
)


def a_rule(name: str = "first", **keys: Any) -> Rule:
    given = {"why": "it pays", "pattern": parse_pattern("linear(x, w)"), "quantize": {"x": Place("default")}}
    return Rule(name=name, **{**given, **keys})


def a_rule_set(*rules: Rule, **keys: Any) -> RuleSet:
    return RuleSet(name="mine", why="", rules=rules, **{"specs": {}, **keys})


# -- what is refused -------------------------------------------------------------------------------------------------

REFUSED: list[Any] = [
    pytest.param(lambda: CalibratorSpec("foo"), "unknown calibrator 'foo'", "max, histogram, percentile", id="name"),
    pytest.param(lambda: CalibratorSpec("Max"), "unknown calibrator 'Max'", "write one of", id="name-in-capitals"),
    pytest.param(lambda: CalibratorSpec(""), "unknown calibrator ''", "write one of", id="name-empty"),
    *(
        pytest.param(
            lambda name=name: CalibratorSpec(name, percentile=99.0),
            f"calibrator '{name}' takes no percentile",
            "name: percentile",
            id=f"percentile-of-{name}",
        )
        for name in calibrator_names()
        if name != "percentile"
    ),
    *(
        pytest.param(
            lambda value=value: CalibratorSpec("percentile", percentile=value),
            r"percentile .* is outside \(0, 100\]",
            "99.99",
            id=f"percentile-{value}",
        )
        for value in (0, -1.0, 100.0001, float("inf"), float("nan"))
    ),
    *(
        pytest.param(
            lambda value=value: CalibratorSpec("percentile", percentile=value),
            f"percentile {value} would cut off",
            f"did you mean {meant}",
            id=f"percentile-{value}",
        )
        for value, meant in ((0.01, "99.99"), (0.999, "99.9"), (49, "51"))
    ),
    pytest.param(lambda: CalibratorSpec("max", num_bins=2048), "'max' keeps no histogram", "remove", id="bins-of-max"),
    *(
        pytest.param(
            lambda bins=bins: CalibratorSpec("entropy", num_bins=bins),
            f"num_bins {bins} is outside 128 to 1048576",
            "2048",
            id=f"bins-{bins}",
        )
        for bins in (-1, 0, 127, 1048577)
    ),
    *(
        pytest.param(
            lambda bits=bits: QuantSpec(num_bits=bits),
            f"num_bits {bits} is outside 2 to 16",
            "for example 8",
            id=f"bits-{bits}",
        )
        for bits in (-8, 0, 1, 17)
    ),
    *(
        pytest.param(
            lambda axis=axis: QuantSpec(axis=axis), f"axis {axis} is outside -1 to 3", "or null", id=f"axis-{axis}"
        )
        for axis in (-4, -2, 4)
    ),
    *(
        pytest.param(
            lambda name=name: QuantSpec(axis=0, calibrator=CalibratorSpec(name)),
            f"calibrator '{name}' needs one range per tensor, but axis is 0",
            r"axis: null, or calibrator: max \(for weights also mse\)$",
            id=f"axis-with-{name}",
        )
        for name in calibrator_names()
        if name not in ("max", "mse", *SCALE_METHODS)
    ),
    *(
        pytest.param(
            lambda name=name, axis=axis: QuantSpec(axis=axis, calibrator=CalibratorSpec(name)),
            f"calibrator '{name}' finds a scale for each channel, but axis is {'null' if axis is None else axis}",
            "^write axis: -1$",
            id=f"axis-{axis}-with-{name}",
        )
        for name in SCALE_METHODS
        if name != "max"
        for axis in (None, 0, 3)
    ),
    *(
        pytest.param(
            lambda name=name: QuantSpec(axis=-1, calibrator=CalibratorSpec(name)),
            f"calibrator '{name}' finds no scale for each channel, but axis is -1",
            "^write calibrator: max, outliers, smooth, or axis: null$",
            id=f"scaled-with-{name}",
        )
        for name in calibrator_names()
        if name not in SCALE_METHODS
    ),
    pytest.param(lambda: QuantSpec(zero_point=3), "but the grid is signed", "unsigned: true", id="signed-zero-point"),
    *(
        pytest.param(
            lambda value=value: QuantSpec(unsigned=True, zero_point=value),
            f"zero_point {value} is outside 0 to 128",
            "32",
            id=f"zero-point-{value}",
        )
        for value in (-1, 129)
    ),
    pytest.param(
        lambda: QuantSpec(axis=-1, learn=True),
        "a scale per channel is not learned",
        "remove learn",
        id="scaled-learned",
    ),
    pytest.param(
        lambda: CalibratorSpec("outliers", threshold=0.5),
        "threshold 0.5 is outside 1 to 1000",
        "^write for example 1.5$",
        id="threshold-below-one",
    ),
    pytest.param(
        lambda: CalibratorSpec("smooth", alpha=float("nan")), "alpha nan is outside 0 to 1", "0.5", id="alpha-nan"
    ),
    pytest.param(
        lambda: CalibratorSpec("smooth", threshold=2.0),
        "calibrator 'smooth' takes no threshold",
        "^remove it, or write name: outliers$",
        id="threshold-of-smooth",
    ),
    pytest.param(
        lambda: CalibratorSpec("max", alpha=0.5), "calibrator 'max' takes no alpha", "name: smooth", id="alpha-of-max"
    ),
    *(
        pytest.param(
            lambda value=value: QuantSpec(max_amax=value),
            f"^max_amax {value} is no range$",
            "^write a number above 0, for example 10$",
            id=f"max-amax-{value}",
        )
        for value in (0, 0.0, -0.0, -1.5, float("inf"), float("-inf"), float("nan"))
    ),
    pytest.param(
        lambda: QuantSpec(unsigned=True, narrow_range=True), "the grid is unsigned", "remove one", id="unsigned-narrow"
    ),
    *(
        pytest.param(
            lambda name=name: Place("default", name),
            "is no quantizer name",
            "ending in _quantizer",
            id=f"place-{name!r}",
        )
        for name in ("", "quantizer", "_quantizer", "A_quantizer", "a.b_quantizer", "a_quantizer\n", "1_quantizer")
    ),
    *(
        pytest.param(lambda within=within: Scope(**within), "within names no module", "glob such as", id=name)
        for name, within in {
            "within-nothing": {"within": ()},
            "within-nothing-in-0": {"within": (), "layers": (0,)},
        }.items()
    ),
    pytest.param(lambda: Scope(layers=()), "layers names no layer", r"all, 0 or \[0, 1\]", id="layers-nothing"),
    *(
        pytest.param(
            lambda layers=layers: Scope(layers=layers),
            f"^layer {min(layers)} does not exist$",
            "layers count from 0",
            id=f"layers-{layers}",
        )
        for layers in ((-1,), (0, -1), (-12, 3))
    ),
    *(
        pytest.param(lambda keys=keys: Count(**keys), "a count allows no number", r"\{min: 1\}", id=f"count-{name}")
        for name, keys in {"nothing": {}, "of-an-empty-list": {"allowed": ()}}.items()
    ),
    *(
        pytest.param(
            lambda keys=keys: Count(**keys), f"^a count of {lowest} cannot be$", "write 0 or more", id=f"count-{name}"
        )
        for name, keys, lowest in (
            ("negative", {"allowed": (-1,)}, -1),
            ("negative-beside-others", {"allowed": (6, -2)}, -2),
            ("negative-minimum", {"minimum": -1}, -1),
            ("negative-maximum", {"maximum": -3}, -3),
            # Both faults at once: the number that cannot be is named, not the order.
            ("negative-maximum-below-minimum", {"minimum": 0, "maximum": -1}, -1),
        )
    ),
    pytest.param(
        lambda: Count(minimum=5, maximum=2), "^no count is at least 5 and at most 2$", "exchange them", id="count-empty"
    ),
    pytest.param(lambda: a_rule(quantize={}), "rule 'first' quantizes nothing", "at least one capture", id="nothing"),
    pytest.param(
        lambda: a_rule(quantize={"x": Place("default"), "y": Place("default")}),
        "rule 'first' quantizes 'y', which its pattern does not capture",
        "the pattern captures: w, x$",
        id="no-such-capture",
    ),
    pytest.param(
        lambda: a_rule(pattern=parse_pattern("gelu(_)")),
        "rule 'first' quantizes 'x', which its pattern does not capture",
        "the pattern captures: none$",
        id="no-capture-at-all",
    ),
    *(
        pytest.param(
            lambda spec=spec: a_rule_set(a_rule(), specs={"mine": None, "default": spec}),
            "a spec is called 'default', which means pytorch-quantization's default descriptors",
            "rename it",
            id=f"spec-called-default-{name}",
        )
        # Refused whatever it says: a file could only mean one of the two.
        for name, spec in {"as-it-is": None, "otherwise": QuantSpec(4)}.items()
    ),
    pytest.param(
        lambda: a_rule_set(a_rule("a"), a_rule("b"), a_rule("a")), "two rules are called 'a'", "rename", id="two-rules"
    ),
    pytest.param(
        lambda: a_rule_set(a_rule(quantize={"x": Place("nope")}), specs={"mine": None}),
        "rule 'first' uses the spec 'nope', which is not defined",
        "known: default, mine$",
        id="undefined-spec",
    ),
    pytest.param(
        lambda: a_rule_set(
            a_rule("a", quantize={"x": Place("default", "x_quantizer")}),
            a_rule("b", quantize={"w": Place("default", "x_quantizer")}),
        ),
        "^rules 'a' and 'b' both name a quantizer 'x_quantizer'$",
        "under 'as'",
        id="one-quantizer-in-two-rules",
    ),
    pytest.param(
        lambda: a_rule_set(
            a_rule(quantize={"x": Place("default", "x_quantizer"), "w": Place("default", "x_quantizer")})
        ),
        "^rule 'first' twice names a quantizer 'x_quantizer'$",
        "under 'as'",
        id="one-quantizer-twice-in-a-rule",
    ),
    pytest.param(
        lambda: a_rule_set(a_rule("b"), a_rule("a"), exclude=(Exclude("why", rules=("a*", "c")),)),
        "exclude names the rule 'c', which does not exist",
        "^rules: a, b$",
        id="exclude-unknown-rule",
    ),
    pytest.param(
        lambda: a_rule_set(exclude=(Exclude("why", rules=("*",)),)),
        r"exclude names the rule '\*', which does not exist",
        "^rules: none$",
        id="exclude-from-no-rules",
    ),
    pytest.param(
        lambda: a_rule_set(a_rule("b"), a_rule("a"), share=(Share("why", rules=("a*", "c")),)),
        "^share names the rule 'c', which does not exist$",
        "^rules: a, b$",
        id="share-unknown-rule",
    ),
    pytest.param(
        # Optional is what it finds, not what it names.
        lambda: a_rule_set(a_rule("a"), share=(Share("why", rules=("b*",), optional=True),)),
        r"^share names the rule 'b\*', which does not exist$",
        "^rules: a$",
        id="share-unknown-rule-optional",
    ),
    pytest.param(
        lambda: a_rule_set(share=(Share("why", rules=("*",)),)),
        r"^share names the rule '\*', which does not exist$",
        "^rules: none$",
        id="share-from-no-rules",
    ),
]


@pytest.mark.parametrize(("make", "found", "fix"), REFUSED)
def test_refused(make: Callable[[], object], found: str, fix: str) -> None:
    with pytest.raises(RuleFileError) as caught:
        make()
    assert re.search(found, caught.value.found)
    assert re.search(fix, caught.value.fix)
    # Built in Python: there is no file to point at, and the message does not pretend that there is.
    assert (caught.value.path, caught.value.line, caught.value.column) == (None, None, None)
    assert str(caught.value) == printable(f"{caught.value.found}; {caught.value.fix}")


# -- limits that are still allowed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_bits_within_the_limits(bits: int) -> None:
    assert QuantSpec(num_bits=bits).num_bits == bits


@pytest.mark.parametrize("axis", [0, 1, 2, 3, None])
def test_axes_within_the_limits(axis: int | None) -> None:
    assert QuantSpec(axis=axis).axis == axis


@pytest.mark.parametrize("percentile", [50, 99.99, 100])
def test_percentiles_within_the_limits(percentile: float) -> None:
    assert CalibratorSpec("percentile", percentile).percentile == percentile


@pytest.mark.parametrize("name", [name for name in calibrator_names() if name not in SCALE_METHODS])
@pytest.mark.parametrize("bins", [128, 1 << 20])
def test_bins_within_the_limits(name: str, bins: int) -> None:
    assert CalibratorSpec(name, num_bins=bins).num_bins == bins


@pytest.mark.parametrize(("name", "is_histogram"), [(name, name not in SCALE_METHODS) for name in calibrator_names()])
def test_all_but_maxima_need_a_histogram(name: str, is_histogram: bool) -> None:
    assert CalibratorSpec(name).is_histogram is is_histogram


@pytest.mark.parametrize("name", ["max", "mse"])
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_one_range_per_channel_by_max_or_mse(name: str, axis: int) -> None:
    spec = QuantSpec(axis=axis, calibrator=CalibratorSpec(name))
    assert (spec.axis, spec.calibrator.name) == (axis, name)


@pytest.mark.parametrize("calibrator", ["max", "outliers", "smooth"])
def test_a_scale_per_channel(calibrator: str) -> None:
    spec = QuantSpec(axis=-1, calibrator=CalibratorSpec(calibrator))
    assert spec.scaled
    assert str(spec) == f"int8 scaled {calibrator}"
    assert not QuantSpec(axis=0).scaled


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        (CalibratorSpec("outliers"), 1.5),
        (CalibratorSpec("outliers", threshold=3), 3),
        (CalibratorSpec("smooth"), 0.5),
        (CalibratorSpec("smooth", alpha=0.0), 0.0),
        (CalibratorSpec("max"), None),
    ],
    ids=str,
)
def test_the_option_of_a_scale(spec: CalibratorSpec, value: float | None) -> None:
    assert spec.scale_value == value


@pytest.mark.parametrize("value", [2.0**-23, 1e-3, 10, 2.0**126])
def test_limits_of_ranges_within_the_limits(value: float) -> None:
    assert QuantSpec(max_amax=value).max_amax == value


def test_the_default_is_eight_signed_bits_per_tensor_by_max() -> None:
    assert QuantSpec() == QuantSpec(8, None, False, False, CalibratorSpec("max", None, None), None, False)


def test_the_default_calibration_has_no_dropout_and_keeps_weights() -> None:
    assert CalibrationOptions() == CalibrationOptions(dropout=False, recalibrate_weights=False)


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("matmul_q_input_quantizer", True),
        ("input_quantizer", True),
        ("x2_quantizer", True),
        ("q_quantizer_quantizer", True),
        ("quantizer", False),
        ("_quantizer", False),
        ("2x_quantizer", False),
        ("X_quantizer", False),
        ("x-y_quantizer", False),
        ("x.y_quantizer", False),
        ("é_quantizer", False),
        ("x_quantizer ", False),
        ("x_quantizer\n", False),
        ("x_quantizers", False),
        ("", False),
    ],
)
def test_quantizer_names(name: str, good: bool) -> None:
    assert is_quantizer_name(name) is good


@pytest.mark.parametrize("keys", [{"minimum": 0}, {"maximum": 0}, {"minimum": 2, "maximum": 2}, {"allowed": (0,)}])
def test_counts_within_the_limits(keys: dict[str, Any]) -> None:
    count = Count(**keys)
    assert {name: getattr(count, name) for name in keys} == keys


# -- in words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param(CalibratorSpec(), "max", id="calibrator"),
        pytest.param(CalibratorSpec("percentile", 99.99), "percentile(99.99%)", id="percentile"),
        pytest.param(CalibratorSpec("percentile", 100.0), "percentile(100%)", id="percentile-whole"),
        pytest.param(CalibratorSpec("entropy", None, 2048), "entropy(2048 bins)", id="bins"),
        pytest.param(CalibratorSpec("percentile", 99.9, 512), "percentile(99.9%, 512 bins)", id="percentile-and-bins"),
        pytest.param(QuantSpec(), "int8 per-tensor max", id="spec"),
        pytest.param(QuantSpec(4, 0), "int4 axis 0 max", id="axis-0-is-an-axis"),
        pytest.param(QuantSpec(4, 1, unsigned=True), "uint4 axis 1 max", id="unsigned"),
        pytest.param(QuantSpec(8, None, narrow_range=True), "int8 narrow per-tensor max", id="narrow"),
        pytest.param(QuantSpec(calibrator=CalibratorSpec("mse")), "int8 per-tensor mse", id="calibrated"),
        pytest.param(QuantSpec(calibrator=CalibratorSpec("best")), "int8 per-tensor best", id="best"),
        pytest.param(QuantSpec(4, 0, calibrator=CalibratorSpec("mse")), "int4 axis 0 mse", id="channels-by-mse"),
        pytest.param(QuantSpec(max_amax=10), "int8 per-tensor max up to 10", id="limited"),
        pytest.param(QuantSpec(max_amax=0.125), "int8 per-tensor max up to 0.125", id="limited-by-a-fraction"),
        pytest.param(QuantSpec(learn=True), "int8 per-tensor max learned", id="learned"),
        pytest.param(
            QuantSpec(4, calibrator=CalibratorSpec("mse"), max_amax=10.0, learn=True),
            "int4 per-tensor mse up to 10 learned",
            id="limited-and-learned",
        ),
        pytest.param(Scope(), "everywhere", id="scope"),
        pytest.param(Scope(within=("bert.*", "*.mlp")), "within bert.*, *.mlp", id="within"),
        pytest.param(Scope(layers="all"), "layers all", id="all-layers"),
        pytest.param(Scope(layers=(0, 11)), "layers 0, 11", id="layers"),
        pytest.param(Scope(("a*",), (0,)), "within a*; layers 0", id="within-and-layers"),
        pytest.param(Count((6,)), "6", id="count"),
        pytest.param(Count((0,)), "0", id="count-zero"),
        pytest.param(Count((6, 10)), "6 or 10", id="counts"),
        pytest.param(Count(minimum=1), "at least 1", id="minimum"),
        pytest.param(Count(maximum=3), "at most 3", id="maximum"),
        pytest.param(Count(minimum=0, maximum=0), "0 to 0", id="range-of-zeros"),
        pytest.param(Count(minimum=1, maximum=3), "1 to 3", id="range"),
    ],
)
def test_in_words(value: object, text: str) -> None:
    assert str(value) == text


# -- what is meant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "path", "layer", "holds"),
    [
        pytest.param(Scope(), "bert.pooler", None, True, id="everywhere-outside"),
        pytest.param(Scope(), "bert.encoder.layer.0", 0, True, id="everywhere-inside"),
        pytest.param(Scope(layers="all"), "x", 5, True, id="all-inside"),
        pytest.param(Scope(layers="all"), "x", None, False, id="all-outside"),
        pytest.param(Scope(layers=(0, 2)), "x", 0, True, id="layer-0"),
        pytest.param(Scope(layers=(0, 2)), "x", 1, False, id="other-layer"),
        pytest.param(Scope(layers=(0, 2)), "x", None, False, id="layer-outside"),
        pytest.param(Scope(within=("*.query",)), "bert.layer.0.query", 0, True, id="star-crosses-dots"),
        pytest.param(Scope(within=("query",)), "bert.layer.0.query", 0, False, id="whole-path-is-meant"),
        pytest.param(Scope(within=("*.Query",)), "bert.layer.0.query", 0, False, id="case-counts"),
        pytest.param(Scope(within=("*.key", "*.query")), "a.query", None, True, id="one-glob-is-enough"),
        pytest.param(Scope(within=("a.?",)), "a.b", None, True, id="question-mark"),
        pytest.param(Scope(("*.query",), (1,)), "a.query", 1, True, id="both-hold"),
        pytest.param(Scope(("*.query",), (1,)), "a.query", 0, False, id="layer-does-not-hold"),
        pytest.param(Scope(("*.query",), (1,)), "a.key", 1, False, id="glob-does-not-hold"),
    ],
)
def test_scope(scope: Scope, path: str, layer: int | None, holds: bool) -> None:
    assert scope.holds(path, layer) is holds


@pytest.mark.parametrize(
    ("count", "allowed"),
    [
        pytest.param(Count((6, 10)), {6, 10}, id="list"),
        pytest.param(Count((0,)), {0}, id="zero"),
        pytest.param(Count(minimum=9), {9, 10, 11}, id="minimum"),
        pytest.param(Count(maximum=2), {0, 1, 2}, id="maximum"),
        pytest.param(Count(maximum=0), {0}, id="maximum-zero"),
        pytest.param(Count(minimum=2, maximum=4), {2, 3, 4}, id="range"),
    ],
)
def test_count(count: Count, allowed: set[int]) -> None:
    assert {number for number in range(12) if count.holds(number)} == allowed


SITE = ("encoder-linear", "input_quantizer", "bert.layer.3.query", 3)


@pytest.mark.parametrize(
    ("exclude", "holds"),
    [
        pytest.param(Exclude("w", Scope(layers=(3,))), True, id="layer"),
        pytest.param(Exclude("w", Scope(layers=(2,))), False, id="other-layer"),
        pytest.param(Exclude("w", sites=("input_*",)), True, id="site"),
        pytest.param(Exclude("w", sites=("weight_*",)), False, id="other-site"),
        pytest.param(Exclude("w", sites=("weight_*", "input_*")), True, id="one-site-is-enough"),
        pytest.param(Exclude("w", rules=("encoder-*",)), True, id="rule"),
        pytest.param(Exclude("w", rules=("encoder",)), False, id="rule-is-a-whole-name"),
        pytest.param(Exclude("w", Scope(("*.query",), (3,)), ("input_*",), ("*linear",)), True, id="all-keys-hold"),
        pytest.param(Exclude("w", Scope(("*.key",), (3,)), ("input_*",), ("*linear",)), False, id="path-fails"),
        pytest.param(Exclude("w", Scope(("*.query",), (3,)), ("w*",), ("*linear",)), False, id="site-fails"),
        pytest.param(Exclude("w", Scope(("*.query",), (3,)), ("input_*",), ("add",)), False, id="rule-fails"),
    ],
)
def test_exclude(exclude: Exclude, holds: bool) -> None:
    assert exclude.holds(*SITE) is holds


@pytest.mark.parametrize(
    ("share", "holds"),
    [
        pytest.param(Share("w", Scope(layers=(3,))), True, id="layer"),
        pytest.param(Share("w", Scope(layers=(2,))), False, id="other-layer"),
        pytest.param(Share("w", Scope(("*.key",))), False, id="other-module"),
        pytest.param(Share("w", sites=("input_*",)), True, id="site"),
        pytest.param(Share("w", sites=("weight_*",)), False, id="other-site"),
        pytest.param(Share("w", rules=("encoder-*",)), True, id="rule"),
        pytest.param(Share("w", rules=("encoder",)), False, id="rule-is-a-whole-name"),
        pytest.param(Share("w", captures=("x",)), True, id="capture"),
        pytest.param(Share("w", captures=("y", "x")), True, id="one-capture-is-enough"),
        pytest.param(Share("w", captures=("y",)), False, id="other-capture"),
        pytest.param(Share("w", captures=("?",)), False, id="capture-is-no-glob"),
        pytest.param(Share("w", Scope(("*.query",), (3,)), ("i*",), ("*linear",), ("x",)), True, id="all-keys-hold"),
        pytest.param(Share("w", Scope(("*.key",), (3,)), ("i*",), ("*linear",), ("x",)), False, id="path-fails"),
        pytest.param(Share("w", Scope(("*.query",), (3,)), ("w*",), ("*linear",), ("x",)), False, id="site-fails"),
        pytest.param(Share("w", Scope(("*.query",), (3,)), ("i*",), ("add",), ("x",)), False, id="rule-fails"),
        pytest.param(Share("w", Scope(("*.query",), (3,)), ("i*",), ("*linear",), ("w",)), False, id="capture-fails"),
    ],
)
def test_share(share: Share, holds: bool) -> None:
    rule, site, path, layer = SITE
    assert share.holds(rule, "x", site, path, layer) is holds


def test_a_named_architecture_has_its_own_count() -> None:
    expect = Expect(per_layer=Count(minimum=4), model_types={"bert": Count((6, 10))})
    assert expect.layer_count("bert") == Count((6, 10))
    assert expect.layer_count("roberta") == Count(minimum=4)
    assert Expect().layer_count("bert") is None


def test_a_rule_set_finds_its_parts_by_name() -> None:
    four = QuantSpec(4)
    rules = a_rule_set(a_rule("a"), a_rule("b"), specs={"four": four, "plain": None})
    assert rules.spec("four") is four
    assert rules.spec("plain") is None
    assert rules.spec(DEFAULT_SPEC) is None
    assert rules.rule("b") is rules.rules[1]
    with pytest.raises(KeyError, match="nope"):
        rules.spec("nope")
    with pytest.raises(KeyError, match="nope"):
        rules.rule("nope")


@pytest.mark.parametrize("value", [5e-324, 1e-60, 2.0**-24, 1e38, 3.5e38, 1e39])
def test_a_limit_that_float32_has_no_grid_for_is_refused(value: float) -> None:
    with pytest.raises(RuleFileError, match=r"max_amax .* is outside 1\.19e-07 to 8\.51e\+37, where float32"):
        QuantSpec(max_amax=value)


@pytest.mark.parametrize("value", [2.0**-23, 2.0**126])
def test_the_outermost_limits_have_normal_steps_in_float32(value: float) -> None:
    tiny, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    for bits in (2, 8, 16):
        amax = torch.tensor(value)
        steps = 2.0**bits - 1
        assert tiny <= amax / steps <= largest
        assert tiny <= steps / amax <= largest
        assert torch.equal(fake_quant(amax[None], amax, Grid(bits)), amax[None])


class Counted(str):
    """A text that counts how often it is compared with another one."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        return str.__hash__(self)


def comparisons(rules: int, globs: int) -> int:
    """How often names are compared when a rule set of that size is checked."""
    some = tuple(a_rule(Counted(f"rule{index}"), quantize={"x": Place("default")}) for index in range(rules))
    names = tuple(Counted(f"rule{index % rules}") for index in range(globs))
    Counted.compared = 0
    a_rule_set(*some, exclude=(Exclude("so", rules=names),))
    return Counted.compared


def test_the_check_of_a_rule_set_is_linear_in_its_size() -> None:
    # Comparing every rule with every glob gives 64 x 512 of them, and 128 x 1024.
    assert comparisons(64, 512) <= 4 * (64 + 512)
    assert comparisons(128, 1024) <= 4 * (128 + 1024)


def many(count: int) -> tuple[Rule, ...]:
    return tuple(a_rule(f"rule{index}") for index in range(count))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        pytest.param(lambda: a_rule_set(*many(129)), "rules has 129 entries", id="rules"),
        pytest.param(lambda: a_rule_set(exclude=(Exclude("so"),) * 257), "exclude has 257 entries", id="exclude"),
        pytest.param(lambda: a_rule_set(share=(Share("so"),) * 257), "share has 257 entries", id="share"),
        pytest.param(
            lambda: a_rule_set(specs={f"s{index}": None for index in range(129)}), "specs has 129", id="specs"
        ),
        pytest.param(
            lambda: a_rule_set(exclude=(Exclude("so", sites=tuple(f"*{index}" for index in range(257))),)),
            "has 257 different globs",
            id="wildcards",
        ),
        pytest.param(lambda: Exclude("so", sites=("a",) * 1025), "sites has 1025 globs", id="globs"),
        pytest.param(lambda: Scope(within=("*" * 257,)), "a glob of within has 257 characters", id="glob"),
        pytest.param(lambda: Scope(layers=(10_000,)), "layer 10000 does not exist", id="layer"),
        pytest.param(lambda: Scope(layers=(0,) * 1025), "layers has 1025 entries", id="layers"),
        pytest.param(lambda: Scope(layers="some"), "layers is 'some'", id="layers-a-word"),
        pytest.param(lambda: Count((1_000_001,)), "a count of 1000001 cannot be", id="count"),
        pytest.param(lambda: a_rule("x" * 257), "the name of a rule has 257 characters", id="name"),
        pytest.param(lambda: a_rule("a\x1b[2Jb"), r"the name of a rule has the hidden character U\+001B", id="escape"),
        pytest.param(lambda: Exclude("a\u200bb"), r"why has the hidden character U\+200B", id="zero-width"),
        pytest.param(lambda: Exclude("so", source="x"), "the source 'x' is none", id="source"),
        pytest.param(lambda: Place("default", "q" * 119 + "_quantizer"), "is no quantizer name", id="quantizer"),
    ],
)
def test_a_rule_set_is_bounded(make: Callable[[], Any], found: str) -> None:
    with pytest.raises(RuleFileError, match=found):
        make()


@pytest.mark.parametrize(
    ("globs", "name", "fits"),
    [
        (("a.b",), "a.b", True),
        (("a.b",), "a.bc", False),
        (("a?b", "x"), "a.b", True),
        (("*.self",), "layer.0.self", True),
        (("*.self",), "layer.0.SELF", False),
        (("[ab]c",), "bc", True),
        (("[",), "[", True),
        (("a*",), "a\nb", True),
        (("*a" * 100,), "a" * 300, True),
        (("*a" * 100 + "b",), "a" * 300, False),
    ],
)
def test_globs_are_those_of_fnmatch(globs: tuple[str, ...], name: str, fits: bool) -> None:
    assert Scope(within=globs).holds(name, None) is fits
    assert any(fnmatchcase(name, glob) for glob in globs) is fits


def test_rules_without_names_may_share_a_spec() -> None:
    # Only names given with 'as' must differ: without one, the quantizers are named by their place.
    rules = a_rule_set(a_rule("a"), a_rule("b"))
    assert [place.name for rule in rules.rules for place in rule.quantize.values()] == [None, None]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        pytest.param(CalibratorSpec(), "percentile", id="CalibratorSpec"),
        pytest.param(QuantSpec(), "num_bits", id="QuantSpec"),
        pytest.param(Place("default"), "name", id="Place"),
        pytest.param(Scope(), "layers", id="Scope"),
        pytest.param(Count((1,)), "minimum", id="Count"),
        pytest.param(Expect(), "total", id="Expect"),
        pytest.param(a_rule(), "name", id="Rule"),
        pytest.param(Exclude("w", rules=("a",)), "why", id="Exclude"),
        pytest.param(Share("w", rules=("a",)), "optional", id="Share"),
        pytest.param(CalibrationOptions(), "dropout", id="CalibrationOptions"),
        pytest.param(a_rule_set(), "rules", id="RuleSet"),
    ],
)
def test_frozen(value: object, name: str) -> None:
    before = getattr(value, name)
    with pytest.raises(FrozenInstanceError):
        setattr(value, name, 3)
    assert getattr(value, name) is before
