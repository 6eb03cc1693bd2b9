"""Rule files that extend others: what is merged, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rule_texts import (
    GOOD,
    HEAD,
    SECOND,
    TOO_LONG,
    check,
    refusal,
    with_calibration,
    with_key,
    with_quantize,
    with_spec,
    write,
    write_marked,
)

from qdq_surgery.rules.quant_spec import QuantSpec
from qdq_surgery.rules.spec import CalibrationOptions, Share
from qdq_surgery.rules.yaml_file import load_rules, shipped_rules

# -- two rules, one name ---------------------------------------------------------------------------------------------


def test_one_quantizer_in_the_base_and_in_the_extending_file(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", with_quantize("{x: {as: x_quantizer}}"))
    path, line, column = write_marked(tmp_path / "mine.yaml", f"^{HEAD}extends: base.yaml\nrules:\n{SECOND}")
    # The extending file's rules come first, so the second to give the name is the base's, which has no line in this
    # file: the place is where the keys of this file begin.
    found = "^rules 'second' and 'first' both name a quantizer 'x_quantizer'$"
    check(refusal(path), path, line, column, found, "its own name under 'as'")


def test_one_quantizer_in_the_base_and_in_a_rule_that_replaces_one(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", with_quantize("{x: {as: x_quantizer}}") + SECOND.replace("x_q", "y_q"))
    path, line, _ = write_marked(tmp_path / "mine.yaml", f"{HEAD}extends: base.yaml\nrules:\n  # mine\n^{SECOND}")
    found = "^rules 'first' and 'second' both name a quantizer 'x_quantizer'$"
    check(refusal(path), path, line, None, found, "its own name under 'as'")


def test_a_rule_of_the_same_name_may_keep_the_quantizer(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", with_quantize("{x: {as: x_quantizer}}"))
    own = SECOND.replace("second", "first")
    rules = load_rules(write(tmp_path / "mine.yaml", f"{HEAD}extends: base.yaml\nrules:\n{own}"))
    assert [(rule.name, str(rule.pattern)) for rule in rules.rules] == [("first", "gelu(x)")]


# -- extends: what is refused ----------------------------------------------------------------------------------------


def test_extends_itself(tmp_path: Path) -> None:
    path, line, column = write_marked(tmp_path / "mine.yaml", f"{HEAD}extends: ^mine.yaml\n")
    check(refusal(path), path, line, column, r"circular extends: mine\.yaml -> mine\.yaml$", "stand on its own")


def test_extends_itself_by_another_path(tmp_path: Path) -> None:
    path, line, column = write_marked(tmp_path / "mine.yaml", f"{HEAD}extends: ^../{tmp_path.name}/mine.yaml\n")
    check(refusal(path), path, line, column, r"circular extends: mine\.yaml -> mine\.yaml$", "stand on its own")


def test_extends_itself_through_a_link(tmp_path: Path) -> None:
    path, line, column = write_marked(tmp_path / "mine.yaml", f"{HEAD}extends: ^link.yaml\n")
    (tmp_path / "link.yaml").symlink_to(path)
    check(refusal(path), path, line, column, r"circular extends: mine\.yaml -> mine\.yaml$", "stand on its own")


def test_two_files_extend_each_other(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", f"{HEAD}extends: b.yaml\n")
    second, line, column = write_marked(tmp_path / "b.yaml", f"{HEAD}# back\nextends: ^a.yaml\n")
    # The place is where the circle closes, which is not the file that was asked for.
    found = r"circular extends: a\.yaml -> b\.yaml -> a\.yaml$"
    check(refusal(first), second, line, column, found, "stand on its own")


def test_a_circle_names_only_its_own_files(tmp_path: Path) -> None:
    start = write(tmp_path / "start.yaml", f"{HEAD}extends: a.yaml\n")
    write(tmp_path / "a.yaml", f"{HEAD}extends: b.yaml\n")
    last, line, column = write_marked(tmp_path / "b.yaml", f"{HEAD}extends: ^a.yaml\n")
    found = r"^circular extends: a\.yaml -> b\.yaml -> a\.yaml$"
    check(refusal(start), last, line, column, found, "stand on its own")


@pytest.mark.parametrize("name", ["nope", "nope.yaml", "../nope.yaml", "/nope/nope.yaml", ".", "~/nope.yaml"])
def test_extends_something_missing(name: str, tmp_path: Path) -> None:
    path, line, column = write_marked(tmp_path / "mine.yaml", f"{HEAD}extends: ^{name}\n")
    found = f"extends: '{re.escape(name)}' is neither a shipped rule set nor a file"
    check(refusal(path), path, line, column, found, "shipped: .*qdqbert.*; or give the path")


@pytest.mark.parametrize("name", TOO_LONG)
def test_extends_a_name_too_long_for_a_file(name: str, tmp_path: Path) -> None:
    path, line, column = write_marked(tmp_path / "mine.yaml", f"{HEAD}extends: ^{name}\n")
    found = f"^extends: '{re.escape(name[:197])}[.]{{3}}' is neither a shipped rule set nor a file$"
    check(refusal(path), path, line, column, found, "shipped: .*qdqbert.*; or give the path")


@pytest.mark.parametrize("files", [17, 40])
def test_a_chain_of_more_than_16_files(files: int, tmp_path: Path) -> None:
    for index in range(1, files):
        write(tmp_path / f"{index}.yaml", f"{HEAD}extends: {index + 1}.yaml\n")
    write(tmp_path / f"{files}.yaml", GOOD)
    # The place is the file that extends one too many, whatever stands behind it.
    last, line, column = write_marked(tmp_path / "16.yaml", f"{HEAD}extends: ^17.yaml\n")
    found = "^a chain of more than 16 files$"
    check(refusal(tmp_path / "1.yaml"), last, line, column, found, "a file that stands on its own")


def test_a_bad_base_is_refused_at_its_own_place(tmp_path: Path) -> None:
    base, line, column = write_marked(tmp_path / "base.yaml", with_key("optional: ^yes"))
    path = write(tmp_path / "mine.yaml", f"{HEAD}extends: base.yaml\n")
    check(refusal(path), base, line, column, "optional is 'yes'", "true or false")


def test_a_base_that_is_wrong_as_a_whole_is_refused_at_its_own_place(tmp_path: Path) -> None:
    # The extending file defines the spec, but a base must stand on its own.
    text = with_quantize("{x: int4}").replace("- name", "- ^name")
    base, line, _ = write_marked(tmp_path / "base.yaml", text)
    path = write(tmp_path / "mine.yaml", f"{HEAD}extends: base.yaml\nspecs: {{int4: {{num_bits: 4}}}}\n")
    check(refusal(path), base, line, None, "uses the spec 'int4'", "known: default$")


@pytest.mark.parametrize(
    ("more", "found", "fix"),
    [
        pytest.param(
            "rules:\n^" + SECOND.replace("as: x_quantizer", "spec: nope"),
            "'second' uses .* 'nope'",
            "known: default$",
            id="spec",
        ),
        pytest.param(
            "exclude:\n  - ^{why: w, rules: third}\n", "exclude names the rule 'third'", "^rules: first$", id="exclude"
        ),
        pytest.param(
            "share:\n  - ^{why: w, rules: third}\n", "share names the rule 'third'", "^rules: first$", id="share"
        ),
        pytest.param(
            "specs: {s: default}\nrules:\n  # first's spec is known here\n^"
            + SECOND.replace("second", "first").replace("as: x_quantizer", "spec: t"),
            "'first' uses .* 't'",
            "known: default, s$",
            id="replaced-rule",
        ),
    ],
)
def test_a_whole_that_is_wrong_only_together(more: str, found: str, fix: str, tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", GOOD)
    path, line, _ = write_marked(tmp_path / "mine.yaml", f"{HEAD}extends: base.yaml\n{more}")
    check(refusal(path), path, line, None, found, fix)


# -- extends: what is merged -----------------------------------------------------------------------------------------

BASE = """\
schema: 1
name: base
why: the base's own reason
specs: {activation: default, weight: {num_bits: 8, axis: 0}}
rules:
  - {name: one, why: w, match: {pattern: "linear(x, w)"}, quantize: {x: activation, w: weight}}
  - {name: two, why: w, match: {pattern: "gelu(x)"}, quantize: {x: activation}}
  - {name: three, why: w, match: {pattern: "relu(x)"}, quantize: {x: activation}}
exclude: [{why: base, layers: 0}]
share: [{why: base, rules: [one, two], optional: true}]
calibration: {dropout: true}
"""

OWN = """\
schema: 1
name: own
extends: base.yaml
specs: {weight: {num_bits: 4}, extra: {num_bits: 2}}
rules:
  - {name: new, why: w, match: {pattern: "softmax(x)"}, quantize: {x: extra}}
  - {name: two, why: mine, match: {pattern: "tanh(x)"}, quantize: {x: extra}}
  - {name: newer, why: w, match: {pattern: "silu(x)"}, quantize: {x: activation}}
exclude: [{why: own, rules: [one, new]}]
share: [{why: own, captures: x}]
calibration: {recalibrate_weights: true}
"""


def test_extends_merges(tmp_path: Path) -> None:
    base = load_rules(write(tmp_path / "base.yaml", BASE))
    own = load_rules(write(tmp_path / "own.yaml", OWN))
    assert own.specs == {"activation": None, "weight": QuantSpec(4), "extra": QuantSpec(2)}
    # New rules come first, so that they win; one of a base's name stands where the base's stood.
    assert [rule.name for rule in own.rules] == ["new", "newer", "one", "two", "three"]
    assert (own.rule("two").why, str(own.rule("two").pattern), own.rule("two").source) == (
        "mine",
        "tanh(x)",
        "own.yaml:7",
    )
    assert (own.rule("one"), own.rule("three")) == (base.rule("one"), base.rule("three"))
    assert own.rule("one").source == "base.yaml:6"
    assert [(exclude.why, exclude.source) for exclude in own.exclude] == [
        ("base", "base.yaml:9"),
        ("own", "own.yaml:9"),
    ]
    assert [(share.why, share.optional, share.source) for share in own.share] == [
        ("base", True, "base.yaml:10"),
        ("own", False, "own.yaml:10"),
    ]
    assert base.calibration == CalibrationOptions(dropout=True)
    assert own.calibration == CalibrationOptions(dropout=True, recalibrate_weights=True)
    assert (own.name, own.extends, own.text) == ("own", "base", OWN)
    assert own.why == ""  # a reason is for one file, so it is not inherited
    assert own.files == ((tmp_path / "own.yaml").resolve(), (tmp_path / "base.yaml").resolve())
    # Merging leaves the base as it is.
    assert base == load_rules(tmp_path / "base.yaml")


def test_extends_alone_changes_nothing(tmp_path: Path) -> None:
    base = load_rules(write(tmp_path / "base.yaml", BASE))
    own = load_rules(write(tmp_path / "own.yaml", f"{HEAD}extends: base.yaml\n"))
    assert (own.specs, own.rules, own.exclude) == (base.specs, base.rules, base.exclude)
    assert (own.share, own.calibration) == (base.share, base.calibration)
    assert len(own.share) == 1


@pytest.mark.parametrize("base", ["{dropout: true}", "{dropout: true, recalibrate_weights: true}", "{}", None])
@pytest.mark.parametrize(
    "own", [None, "{}", "{dropout: false}", "{dropout: true}", "{recalibrate_weights: false}"], ids=str
)
def test_calibration_options_that_are_left_out_are_those_of_the_base(
    base: str | None, own: str | None, tmp_path: Path
) -> None:
    write(tmp_path / "base.yaml", GOOD if base is None else with_calibration(base))
    more = "" if own is None else f"calibration: {own}\n"
    rules = load_rules(write(tmp_path / "own.yaml", f"{HEAD}extends: base.yaml\n{more}"))
    wanted = {"dropout": False, "recalibrate_weights": False}
    for text in (base, own):
        wanted.update(
            {key: value == "true" for key, value in re.findall(r"(\w+): (true|false)", text or "")},
        )
    assert vars(rules.calibration) == wanted


def test_a_spec_of_the_bases_name_replaces_all_of_it(tmp_path: Path) -> None:
    # A spec is one thing: what the own one leaves out has its default, not the base's value.
    write(tmp_path / "base.yaml", with_spec("{num_bits: 4, max_amax: 10, learn: true}"))
    same = load_rules(write(tmp_path / "same.yaml", f"{HEAD}extends: base.yaml\n"))
    assert same.spec("s") == QuantSpec(4, max_amax=10.0, learn=True)
    own = load_rules(write(tmp_path / "own.yaml", f"{HEAD}extends: base.yaml\nspecs: {{s: {{num_bits: 4}}}}\n"))
    assert own.spec("s") == QuantSpec(4, max_amax=None, learn=False)
    assert str(own.spec("s")) == "int4 per-tensor max"


def test_a_share_entry_may_name_the_bases_rules(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", GOOD)
    text = f"{HEAD}extends: base.yaml\nshare: [{{why: w, rules: fir*, optional: true}}]\n"
    rules = load_rules(write(tmp_path / "own.yaml", text))
    assert rules.share == (Share("w", rules=("fir*",), optional=True, source="own.yaml:4"),)


def test_extends_over_three_files(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", BASE)
    write(tmp_path / "own.yaml", OWN)
    last = SECOND.replace("second", "last") + SECOND.replace("second", "new").replace("x_q", "y_q")
    path = write(tmp_path / "top.yaml", f"{HEAD}extends: own.yaml\nrules:\n{last}")
    top = load_rules(path)
    assert [rule.name for rule in top.rules] == ["last", "new", "newer", "one", "two", "three"]
    assert str(top.rule("new").pattern) == "gelu(x)"
    assert [file.name for file in top.files] == ["top.yaml", "own.yaml", "base.yaml"]
    assert [exclude.why for exclude in top.exclude] == ["base", "own"]
    assert [share.why for share in top.share] == ["base", "own"]
    assert top.calibration == CalibrationOptions(dropout=True, recalibrate_weights=True)


def test_extends_over_sixteen_files(tmp_path: Path) -> None:
    for index in range(1, 16):
        write(tmp_path / f"{index}.yaml", f"{HEAD}extends: {index + 1}.yaml\n")
    write(tmp_path / "16.yaml", GOOD)
    rules = load_rules(tmp_path / "1.yaml")
    assert [file.name for file in rules.files] == [f"{index}.yaml" for index in range(1, 17)]
    assert [rule.source for rule in rules.rules] == ["16.yaml:4"]


def test_extends_is_relative_to_the_file_that_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "shared" / "base.yaml", BASE)
    write(tmp_path / "shared" / "middle.yaml", f"{HEAD}extends: base.yaml\n")
    path = write(tmp_path / "project" / "own.yaml", f"{HEAD}extends: ../shared/middle.yaml\n")
    # A file of that name where the program runs is not meant.
    write(tmp_path / "elsewhere" / "base.yaml", "not a rule file")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [file.name for file in load_rules(path).files] == ["own.yaml", "middle.yaml", "base.yaml"]
    assert load_rules(Path("..") / "project" / "own.yaml") == load_rules(path)


def test_extends_an_absolute_path(tmp_path: Path) -> None:
    base = write(tmp_path / "a" / "base.yaml", BASE)
    path = write(tmp_path / "b" / "own.yaml", f"{HEAD}extends: {base}\n")
    assert load_rules(path).extends == "base"


@pytest.mark.parametrize("name", sorted(shipped_rules()))
def test_extends_a_shipped_file_by_name(name: str, tmp_path: Path) -> None:
    rules = load_rules(write(tmp_path / "mine.yaml", f"{HEAD}extends: {name}\n"))
    base = load_rules(name)
    assert (rules.extends, rules.rules) == (name, base.rules)
    assert (rules.share, rules.calibration) == (base.share, base.calibration)
    assert rules.files == ((tmp_path / "mine.yaml").resolve(), *base.files)
