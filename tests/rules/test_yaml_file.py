"""Rule files: what is written is what is loaded; every bad file is refused with line, column and remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from qdq_surgery.errors import QdqSurgeryError, RuleFileError, printable
from qdq_surgery.rules import yaml_file
from qdq_surgery.rules.pattern import parse_pattern
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec
from qdq_surgery.rules.schema import SCHEMA
from qdq_surgery.rules.spec import CalibrationOptions, Count, Exclude, Expect, Place, Rule, RuleSet, Scope, Share
from qdq_surgery.rules.yaml_file import load_rules, shipped_rules

HEAD = "schema: 1\nname: mine\n"

RULES = """\
rules:
  - name: first
    why: it pays
    match: {pattern: "linear(x, w)"}
    quantize: {x: default}
"""

GOOD = HEAD + RULES

#: By name: the file's text with a mark, what the message says was found (a regex), and the remedy (a regex).
Cases = dict[str, tuple[str, ...]]

#: Marks the place that the error must name; it is taken out before the file is written.
MARK = "^"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))  # not write_text: line ends must stay as they are given
    return path


def write_marked(path: Path, text: str) -> tuple[Path, int, int]:
    """Writes the file without the mark; the mark's line and column, counted from 1."""
    before, mark, after = text.partition(MARK)
    assert mark
    assert MARK not in after
    write(path, before + after)
    return path, before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def refusal(path: Path | str) -> RuleFileError:
    with pytest.raises(RuleFileError) as caught:
        load_rules(path)
    return caught.value


def check(error: RuleFileError, path: Path, line: int | None, column: int | None, found: str, fix: str) -> None:
    assert re.search(found, error.found)
    assert re.search(fix, error.fix)
    assert (error.path, error.line, error.column) == (path.resolve(), line, column)
    place = ":".join(str(part) for part in (path.resolve(), line, column) if part is not None)
    assert str(error) == f"{place}: {printable(error.found)}; {printable(error.fix)}"


def with_spec(text: str) -> str:
    return f"{HEAD}specs:\n  s: {text}\n{RULES}"


def with_calibrator(text: str) -> str:
    return with_spec(f"{{calibrator: {text}}}")


def with_rule(text: str) -> str:
    return f"{HEAD}rules:\n  - {text}\n"


def with_match(text: str) -> str:
    return RULES_WITH.format(match=text, quantize="{x: default}")


def with_pattern(text: str) -> str:
    return with_match(f"{{layers: all, pattern: {text}}}")


def with_quantize(text: str) -> str:
    return RULES_WITH.format(match='{pattern: "linear(x, w)"}', quantize=text)


def with_key(text: str) -> str:
    """One more key of the rule."""
    return f"{GOOD}    {text}\n"


def with_count(text: str) -> str:
    return with_key(f"expect: {{per_layer: {text}}}")


def with_exclude(text: str) -> str:
    return f"{GOOD}exclude:\n  - {text}\n"


def with_share(text: str) -> str:
    return f"{GOOD}share:\n  - {text}\n"


def with_calibration(text: str) -> str:
    return f"{GOOD}calibration: {text}\n"


RULES_WITH = HEAD + "rules:\n  - name: first\n    why: it pays\n    match: {match}\n    quantize: {quantize}\n"

# -- one bad thing in one file ---------------------------------------------------------------------------------------

NOT_YAML: Cases = {
    "bracket-not-closed": ("schema: [1\nname^: mine\n", "not YAML: expected ',' or ']'", "brackets"),
    "brace-not-closed": ("schema: 1\nrules: {a: 1\n^", "not YAML: expected ',' or '}'", "brackets"),
    "tab-for-indentation": ("schema: 1\nspecs:\n^\ts: default\n", r"not YAML: found character '\\t'", "indentation"),
    "quote-not-closed": ("schema: 1\nname: 'mine\n^", "not YAML: found unexpected end of stream", "check"),
    "two-colons": ("schema: 1\nname: mine^: yours\n", "not YAML: mapping values are not allowed here", "check"),
    "worse-indentation": ("schema: 1\n  name^: mine\n", "not YAML: mapping values are not allowed", "indentation"),
    "at-sign": ("schema: 1\nname: ^@mine\n", "not YAML: found character '@'", "check"),
    "unknown-escape": ('schema: 1\nname: "\\^q"\n', "not YAML: found unknown escape character 'q'", "check"),
    "undefined-tag-handle": ("schema: 1\nname: ^!x!foo mine\n", "not YAML: found undefined tag handle", "check"),
    "two-documents": (f"{GOOD}^---\n{GOOD}", "^found a second document$", "one document: remove '---'"),
    "second-document-empty": (f"{GOOD}...\n^---\n", "^found a second document$", "one document: remove '---'"),
    "second-document-a-word": (f"{GOOD}^--- mine\n", "^found a second document$", "one document: remove '---'"),
}

NOT_DATA: Cases = {
    "tag-python-apply": (
        f"{HEAD}why: ^!!python/object/apply:os.system [false]\n{RULES}",
        "the YAML tag 'tag:yaml.org,2002:python/object/apply:os.system'",
        "plain data: remove the tag",
    ),
    "tag-python-name": (f"{HEAD}why: ^!!python/name:os.system x\n{RULES}", "the YAML tag .*python/name", "remove"),
    "tag-of-ones-own": (f"{HEAD}why: ^!foo x\n{RULES}", "the YAML tag '!foo'", "remove the tag"),
    "tag-at-the-top": (f"--- ^!foo\n{GOOD}", "the YAML tag '!foo'", "remove the tag"),
    "tag-of-a-list": (f"{HEAD}rules: ^!!seq []\n", "the YAML tag 'tag:yaml.org,2002:seq'", "remove the tag"),
    "tag-of-a-key": (f"{HEAD}^!!str why: x\n{RULES}", "the YAML tag 'tag:yaml.org,2002:str'", "remove the tag"),
    "tag-set": (f"{HEAD}specs: ^!!set {{a, b}}\n{RULES}", "the YAML tag 'tag:yaml.org,2002:set'", "remove the tag"),
    # A tag that says what is true anyway is refused too: there is one way to write a value.
    "tag-harmless": (f"schema: ^!!int 1\nname: mine\n{RULES}", "the YAML tag 'tag:yaml.org,2002:int'", "remove"),
    "tag-empty": (f"{HEAD}why: ^! x\n{RULES}", "the YAML tag '!'", "remove the tag"),
    "anchor-on-a-word": (f"{HEAD}why: ^&a x\n{RULES}", "an anchor or alias", "write the value out"),
    "anchor-on-a-list": (f"{HEAD}rules: ^&a []\n", "an anchor or alias", "write the value out"),
    "anchor-on-a-mapping": (f"{HEAD}specs: ^&a {{s: default}}\n{RULES}", "an anchor or alias", "write the value out"),
    "alias-without-anchor": (f"{HEAD}why: ^*a\n{RULES}", "an anchor or alias", "write the value out"),
    # A bomb of nested aliases: the first anchor ends it, so nothing ever grows.
    "billion-laughs": (
        f"{HEAD}a: ^&a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
        "an anchor or alias",
        "write the value out",
    ),
    "merge-key": (f"{HEAD}^<<: {{why: x}}\n{RULES}", "unknown key '<<' in the file", "known: "),
    "too-deep-lists": (f"{HEAD}why: {'[' * 15}^[{']' * 16}\n{RULES}", "deeper than 16 levels", "needs five"),
    "too-deep-mappings": (f"{'{a: ' * 16}^{{a: 1{'}' * 17}\n", "deeper than 16 levels", "needs five"),
    "too-deep-lines": ("".join(f"{' ' * i}a:\n" for i in range(16)) + " " * 16 + "^a: 1\n", "deeper than 16", "five"),
}

MISSING: Cases = {
    "schema": (f"^name: mine\n{RULES}", "the key 'schema' is missing", f"write schema: {SCHEMA}"),
    "schema-after-a-comment": (f"# mine\n\n^name: mine\n{RULES}", "the key 'schema' is missing", "write schema: 1"),
    "name": (f"^schema: 1\n{RULES}", "the key 'name' is missing", "write name:"),
    "name-when-extending": ("^schema: 1\nextends: qdqbert\n", "the key 'name' is missing", "write name:"),
    "rules": ("^schema: 1\nname: mine\n", "the key 'rules' is missing", "write rules:"),
    "all-but-schema": ("^schema: 1\n", "the key 'name' is missing", "write name:"),
    "everything": ("^{}\n", "the key 'schema' is missing", "write schema: 1"),
    "rule-name": (with_rule("^{why: w, match: {}, quantize: {}}"), "a rule has no key 'name'", "write name:"),
    "rule-why": (with_rule("^{name: a, match: {}, quantize: {}}"), "a rule has no key 'why'", "write why:"),
    "rule-match": (with_rule("^{name: a, why: w, quantize: {}}"), "a rule has no key 'match'", "write match:"),
    "rule-quantize": (with_rule("^{name: a, why: w, match: {}}"), "a rule has no key 'quantize'", "write quantize:"),
    "rule-everything": (with_rule("^{}"), "a rule has no key 'name'", "write name:"),
    "pattern": (with_match("^{layers: all}"), "rule 'first' has no pattern", r"pattern: linear\(x, w\)"),
    "calibrator-name": (with_calibrator("^{percentile: 99.9}"), "calibrator has no name", "name: percentile"),
    "exclude-why": (with_exclude("^sites: '*'"), "exclude entry has no key 'why'", "say why"),
    "exclude-everything": (with_exclude("^{}"), "exclude entry has no key 'why'", "say why"),
    "exclude-what": (with_exclude("^why: because"), "exclude entry names nothing", "within, layers, sites or rules"),
    "share-why": (with_share("^sites: '*'"), "share entry has no key 'why'", "say why these have one range"),
    "share-everything": (with_share("^{}"), "share entry has no key 'why'", "say why"),
    "share-what": (
        with_share("^why: because"),
        "share entry names nothing",
        "write within, layers, sites, rules or captures$",
    ),
    # Optional says how much is found, not what is meant.
    "share-what-optional": (
        with_share("^{why: because, optional: true}"),
        "share entry names nothing",
        "write within, layers, sites, rules or captures$",
    ),
    "count-range": (with_count("^{}"), "per_layer says nothing", "min, max or both"),
    "count-list": (with_count("^[]"), "per_layer allows no number", r"6, \[6, 10\] or \{min: 1\}"),
    "quantize-captures": (
        with_quantize("{}").replace("- name", "- ^name"),
        "rule 'first' quantizes nothing",
        "at least one capture",
    ),
}

UNKNOWN_KEY: Cases = {
    "file": (
        f"{HEAD}^rule: []\n{RULES}",
        "unknown key 'rule' in the file",
        "known: calibration, exclude, extends, name, rules, schema, share, specs, why$",
    ),
    "file-capital": (f"{HEAD}^Why: x\n{RULES}", "unknown key 'Why' in the file", "known: .*why"),
    "spec": (with_spec("{^bits: 8}"), r"unknown key 'bits' in specs\.s", "known: axis, calibrator, .*num_bits"),
    "spec-amax": (with_spec("{^amax: 1}"), r"unknown key 'amax' in specs\.s", "known: .*learn, max_amax, "),
    "calibrator": (with_calibrator("{name: mse, ^bins: 256}"), "unknown key 'bins' in calibrator", "known: .*num_bins"),
    "rule": (with_key("^expects: {}"), "unknown key 'expects' in a rule", "known: expect, match, name"),
    "match": (
        with_match('{pattern: "linear(x)", ^layer: 0}'),
        "unknown key 'layer' in match",
        "known: layers, pattern",
    ),
    "quantize": (with_quantize("{x: {^name: a_quantizer}}"), r"unknown key 'name' in quantize\.x", "known: as, spec"),
    "expect": (
        with_key("expect: {^layer: 6}"),
        "unknown key 'layer' in expect",
        "known: model_types, per_layer, total",
    ),
    "count": (with_count("{^minimum: 6}"), "unknown key 'minimum' in per_layer", "known: max, min"),
    "total": (with_key("expect: {total: {^least: 6}}"), "unknown key 'least' in total", "known: max, min"),
    "model-type-count": (
        with_key("expect: {model_types: {bert: {^least: 6}}}"),
        r"unknown key 'least' in model_types\.bert",
        "known: max, min",
    ),
    "exclude": (
        with_exclude("{why: w, ^rule: first}"),
        "unknown key 'rule' in an exclude entry",
        "known: layers, optional, rules",
    ),
    "share": (
        with_share("{why: w, ^site: a}"),
        "unknown key 'site' in a share entry",
        "known: captures, layers, optional, rules, sites, why, within$",
    ),
    # An exclude entry is about single sites.
    "exclude-captures": (
        with_exclude("{why: w, ^captures: x}"),
        "unknown key 'captures' in an exclude entry",
        "known: layers, optional, rules, sites, why, within$",
    ),
    "calibration": (
        with_calibration("{^batches: 8}"),
        "unknown key 'batches' in calibration",
        "known: dropout, recalibrate_weights$",
    ),
    "key-is-a-list": (with_spec("{^[num_bits]: 8}"), "a key is a list", "a plain word"),
    "key-is-a-mapping": (with_spec("{? ^{a: b} : 8}"), "a key is a mapping", "a plain word"),
    "spec-name-is-a-list": (f"{HEAD}specs:\n  ? ^[a]\n  : default\n{RULES}", "a key is a list", "a plain word"),
}

REPEATED_KEY: Cases = {
    "file": (f"{HEAD}^name: again\n{RULES}", r"the key 'name' stands twice \(first in line 2\)", "remove one"),
    "file-quoted": (f'{HEAD}^"name": again\n{RULES}', r"the key 'name' stands twice \(first in line 2\)", "remove one"),
    "rules": (f"{GOOD}^{RULES}", r"the key 'rules' stands twice \(first in line 3\)", "remove one"),
    "spec-name": (f"{HEAD}specs:\n  s: default\n  ^s: default\n{RULES}", "'s' stands twice .first in line 4", "remove"),
    "spec": (with_spec("{axis: 0, ^axis: 1}"), r"the key 'axis' stands twice \(first in line 4\)", "remove one"),
    "calibrator": (
        with_calibrator("{name: mse, ^name: max}"),
        r"'name' stands twice \(first in line 4\)",
        "remove one",
    ),
    "rule": (with_key("^why: again"), r"the key 'why' stands twice \(first in line 5\)", "remove one"),
    "match": (
        with_match('{pattern: "linear(x)", ^pattern: "gelu(x)"}'),
        r"'pattern' stands twice \(first in line 6\)",
        "remove one",
    ),
    "quantize": (with_quantize("{x: default, ^x: default}"), r"'x' stands twice \(first in line 7\)", "remove one"),
    "place": (with_quantize("{x: {spec: default, ^spec: default}}"), r"'spec' stands twice", "remove one"),
    "expect": (with_key("expect: {total: 1, ^total: 1}"), r"'total' stands twice \(first in line 8\)", "remove one"),
    "model-type": (with_key("expect: {model_types: {bert: 6, ^bert: 6}}"), "'bert' stands twice", "remove one"),
    "count": (with_count("{min: 1, ^min: 1}"), r"the key 'min' stands twice", "remove one"),
    "exclude": (with_exclude("{why: w, sites: a, ^why: w}"), "the key 'why' stands twice", "remove one"),
    "share": (with_share("{why: w, sites: a, ^sites: b}"), "the key 'sites' stands twice", "remove one"),
    "calibration": (with_calibration("{dropout: true, ^dropout: true}"), "the key 'dropout' stands twice", "remove"),
    "share-section": (f"{with_share('{why: w, sites: a}')}^share: []\n", "the key 'share' stands twice", "remove one"),
}


def each(kind: str, values: str, found: str, fix: str, **places: Callable[[str], str]) -> Cases:
    """Every value, split at ``|``, in every place."""
    return {
        f"{kind}-{place.replace('_', '-')}-{value}": (build(f"^{value}"), found, fix)
        for place, build in places.items()
        for value in values.split("|")
    }


NOT_A_TEXT: Cases = {
    **each(
        "text",
        # What looks like something else in YAML 1.1 is never silently a text, and never silently that something.
        "3|1.5|yes|No|true|null|~|''|'  '|2001-12-14|[a]|{a: b}",
        "is .*, not a text",
        "in quotes if it looks like a number",
        name=lambda value: f"schema: 1\nname: {value}\n{RULES}",
    ),
    **each(
        "text",
        "3|off|[a]",
        "is .*, not a text",
        "write a word, in quotes",
        why=lambda value: f"{HEAD}why: {value}\n{RULES}",
        extends=lambda value: f"{HEAD}extends: {value}\n",
        rule_name=lambda value: GOOD.replace("name: first", f"name: {value}"),
        rule_why=lambda value: GOOD.replace("why: it pays", f"why: {value}"),
        pattern=lambda value: with_match(f"{{pattern: {value}}}"),
        spec_of_place=lambda value: with_quantize(f"{{x: {{spec: {value}}}}}"),
        name_of_place=lambda value: with_quantize(f"{{x: {{as: {value}}}}}"),
        calibrator_name=lambda value: with_calibrator(f"{{name: {value}}}"),
        within_item=lambda value: with_match(f'{{pattern: "linear(x)", within: [a, {value}]}}'),
        exclude_why=lambda value: with_exclude(f"{{why: {value}, sites: a}}"),
        sites_item=lambda value: with_exclude(f"{{why: w, sites: [a, {value}]}}"),
        rules_item=lambda value: with_exclude(f"{{why: w, rules: [first, {value}]}}"),
        share_why=lambda value: with_share(f"{{why: {value}, sites: a}}"),
        share_sites_item=lambda value: with_share(f"{{why: w, sites: [a, {value}]}}"),
        share_captures_item=lambda value: with_share(f"{{why: w, captures: [x, {value}]}}"),
    ),
    **each(
        "text",
        "3|on",
        "is .*, not a text",
        "write a word, in quotes",
        place=lambda value: with_quantize(f"{{x: {value}}}"),
        calibrator=with_calibrator,
        within=lambda value: with_match(f'{{pattern: "linear(x)", within: {value}}}'),
        sites=lambda value: with_exclude(f"{{why: w, sites: {value}}}"),
        rules=lambda value: with_exclude(f"{{why: w, rules: {value}}}"),
        captures=lambda value: with_share(f"{{why: w, captures: {value}}}"),
    ),
}

#: Half a character cannot be printed or written to a file. YAML's escapes are single characters, so two are no pair.
SURROGATES: Cases = each(
    "surrogate",
    r'"\uD800"|"a\uDFFF"|"\uD83D\uDE00"',
    r" has half a character \(a surrogate\)$",
    "remove the escape",
    name=lambda value: f"schema: 1\nname: {value}\n{RULES}",
    why=lambda value: f"{HEAD}why: {value}\n{RULES}",
    extends=lambda value: f"{HEAD}extends: {value}\n",
    rule_name=lambda value: GOOD.replace("name: first", f"name: {value}"),
    rule_why=lambda value: GOOD.replace("why: it pays", f"why: {value}"),
    pattern=lambda value: with_match(f"{{pattern: {value}}}"),
    place=lambda value: with_quantize(f"{{x: {value}}}"),
    name_of_place=lambda value: with_quantize(f"{{x: {{as: {value}}}}}"),
    calibrator=with_calibrator,
    within=lambda value: with_match(f'{{pattern: "linear(x)", within: {value}}}'),
    sites_item=lambda value: with_exclude(f"{{why: w, sites: [a, {value}]}}"),
    rules_item=lambda value: with_exclude(f"{{why: w, rules: [first, {value}]}}"),
)

NOT_WHOLE: Cases = {
    **each(
        "int",
        "8.0|'8'|eight|yes|null|~|0x8|0b11|0o7|1:30|[8]|{min: 8}|.inf",
        "num_bits is .*, not a (decimal )?whole number",
        "for example 8",
        num_bits=lambda value: with_spec(f"{{num_bits: {value}}}"),
    ),
    # YAML 1.1 calls these whole numbers, most of them worth something else than they look; the last is only too long.
    **each(
        "int",
        "0x8|0b11|1:30|-1:30|0_7|1_0|8_|+0x8|1000000000",
        "is '.{2,60}', not a decimal whole number$",
        "for example 8",
        num_bits=lambda value: with_spec(f"{{num_bits: {value}}}"),
    ),
    **each(
        "int",
        "0_1|1_|0b1|0x1",
        "schema is '.*', not a decimal whole number$",
        "for example 8",
        schema=lambda value: f"schema: {value}\nname: mine\n{RULES}",
    ),
    **each(
        "int",
        "1.5|'1'|on|0x1|0_1",
        "is .*, not a (decimal )?whole number",
        "write for example",
        schema=lambda value: f"schema: {value}\nname: mine\n{RULES}",
        axis=lambda value: with_spec(f"{{axis: {value}}}"),
        num_bins=lambda value: with_calibrator(f"{{name: mse, num_bins: {value}}}"),
        layers=lambda value: with_match(f'{{pattern: "linear(x)", layers: {value}}}'),
        layers_item=lambda value: with_match(f'{{pattern: "linear(x)", layers: [0, {value}]}}'),
        exclude_layers=lambda value: with_exclude(f"{{why: w, layers: {value}}}"),
        share_layers=lambda value: with_share(f"{{why: w, layers: {value}}}"),
        per_layer=with_count,
        per_layer_item=lambda value: with_count(f"[6, {value}]"),
        min=lambda value: with_count(f"{{min: {value}}}"),
        max=lambda value: with_count(f"{{min: 1, max: {value}}}"),
        total=lambda value: with_key(f"expect: {{total: {value}}}"),
        model_type=lambda value: with_key(f"expect: {{model_types: {{bert: {value}}}}}"),
    ),
    # Only 'null' is null: an empty value or a wave is more likely to be something that was forgotten.
    **each(
        "int",
        "~|none|Null|NULL",
        "axis is .*, not a whole number",
        "for example 8",
        axis=lambda value: with_spec(f"{{axis: {value}}}"),
    ),
    # 'all' is a word for the whole key, not for one of several layers.
    **each(
        "int",
        "all|null|some",
        "layers is .*, not a whole number",
        "for example",
        layers_item=lambda value: with_match(f'{{pattern: "linear(x)", layers: [{value}]}}'),
    ),
}

NOT_A_NUMBER: Cases = each(
    "number",
    "'99'|all|yes|null|.inf|-.inf|.nan|0x63|1e1|1:30.5|[99]|{a: 99}",
    "(percentile|max_amax) is .*, not a (decimal )?number",
    "for example 99.99",
    percentile=lambda value: with_calibrator(f"{{name: percentile, percentile: {value}}}"),
    max_amax=lambda value: with_spec(f"{{max_amax: {value}}}"),
)

NOT_A_BOOLEAN: Cases = each(
    "bool",
    "yes|no|on|off|True|FALSE|y|1|0|null|~|'true'|\"false\"|[true]|{true: 1}",
    r"(unsigned|narrow_range|optional|learn|dropout|recalibrate_weights) is ",
    "write true or false",
    unsigned=lambda value: with_spec(f"{{unsigned: {value}}}"),
    narrow_range=lambda value: with_spec(f"{{narrow_range: {value}}}"),
    optional=lambda value: with_key(f"optional: {value}"),
    learn=lambda value: with_spec(f"{{learn: {value}}}"),
    share_optional=lambda value: with_share(f"{{why: w, sites: a, optional: {value}}}"),
    dropout=lambda value: with_calibration(f"{{dropout: {value}}}"),
    recalibrate_weights=lambda value: with_calibration(f"{{recalibrate_weights: {value}}}"),
)

NOT_A_LIST: Cases = {
    **each(
        "list",
        "3|some|null|{a: b}",
        "is .*",
        "write a list",
        rules=lambda value: f"{HEAD}rules: {value}\n",
        exclude=lambda value: f"{GOOD}exclude: {value}\n",
        share=lambda value: f"{GOOD}share: {value}\n",
    ),
    **each(
        "list",
        "{a: b}",
        "is a mapping",
        "write a list",
        within=lambda value: with_match(f'{{pattern: "linear(x)", within: {value}}}'),
        layers=lambda value: with_match(f'{{pattern: "linear(x)", layers: {value}}}'),
        sites=lambda value: with_exclude(f"{{why: w, sites: {value}}}"),
        rule_globs=lambda value: with_exclude(f"{{why: w, rules: {value}}}"),
        captures=lambda value: with_share(f"{{why: w, captures: {value}}}"),
    ),
}

NOT_A_MAPPING: Cases = {
    **each(
        "mapping",
        "3|some|null|[a]",
        "is ('3' .int|'some' .str|'null' .null|a list)",
        "write keys",
        specs=lambda value: f"{HEAD}specs: {value}\n{RULES}",
        spec=with_spec,
        rule=with_rule,
        match=with_match,
        quantize=with_quantize,
        expect=lambda value: with_key(f"expect: {value}"),
        model_types=lambda value: with_key(f"expect: {{model_types: {value}}}"),
        exclude=with_exclude,
        share=with_share,
        calibration=with_calibration,
    ),
    # One word is a short form here, so only a list cannot be meant.
    **each(
        "mapping",
        "[a]",
        "is a list",
        "write keys",
        place=lambda value: with_quantize(f"{{x: {value}}}"),
        calibrator=with_calibrator,
    ),
    **each(
        "mapping", "[a]|mine|3|'mine'|~", "found .* at the top", "keys: schema, name", file=lambda value: f"{value}\n"
    ),
}

PATTERNS: Cases = {
    "unknown-operator": (with_pattern('"linear(x, ^foo(w))"'), "unknown operator 'foo'", "known: .*linear"),
    "unknown-operator-first": (with_pattern('"^foo(x)"'), "unknown operator 'foo'", "known: "),
    "single-quotes": (with_pattern("'linear(x, ^foo(w))'"), "unknown operator 'foo'", "known: "),
    "no-quotes": (with_match("{pattern: ^foo(x)}"), "unknown operator 'foo'", "known: "),
    "no-quotes-block": (
        with_match("\n      pattern: linear(x, w=^foo(_))"),
        "unknown operator 'foo'",
        "known: ",
    ),
    "after-named-operands": (with_pattern('"where(a=_, b=_, ^foo(x))"'), "unknown operator 'foo'", "known: "),
    "inside-maybe": (with_pattern('"add(maybe(mul, ^foo)(_), x)"'), "unknown operator 'foo'", "known: "),
    # In a block the text does not stand where the key does: its start is the best there is.
    "literal-block": (
        with_match("\n      pattern: ^|\n        linear(x, foo(w))"),
        "unknown operator 'foo'",
        "known: ",
    ),
    "folded-block": (with_match("\n      pattern: ^>\n        linear(x, foo(w))"), "unknown operator 'foo'", "known: "),
    # Nor does it where a text goes over two lines, or where an escape is longer than what it stands for.
    "double-quotes-on-two-lines": (
        with_match('\n      pattern: ^"linear(x,\n        foo(w))"'),
        "unknown operator 'foo'",
        "known: ",
    ),
    "single-quotes-on-two-lines": (
        with_match("\n      pattern: ^'linear(x,\n        foo(w))'"),
        "unknown operator 'foo'",
        "known: ",
    ),
    "no-quotes-on-two-lines": (
        with_match("\n      pattern: ^linear(x,\n        foo(w))"),
        "unknown operator 'foo'",
        "known: ",
    ),
    "first-of-two-lines": (
        with_match('\n      pattern: ^"linear(foo(x),\n        w)"'),
        "unknown operator 'foo'",
        "known: ",
    ),
    "line-continued": (
        with_match('\n      pattern: ^"linear(x, \\\n        foo(w))"'),
        "unknown operator 'foo'",
        "known: ",
    ),
    "never-closed-on-two-lines": (
        with_match('\n      pattern: ^"linear(x,\n        w"'),
        "pattern syntax: .*never closed",
        "for example",
    ),
    "escape": (with_pattern('^"linear(x,\\x20foo(w))"'), "unknown operator 'foo'", "known: "),
    "escape-after-the-place": (with_pattern('^"linear(foo(x),\\x20w)"'), "unknown operator 'foo'", "known: "),
    "doubled-quotes": (with_pattern("^'linear(x, ''w'')'"), "found ''w'' where an operator is wanted", "operands"),
    # Columns count characters.
    "after-two-bytes": (with_pattern('"linear(é, ^foo(x))"'), "unknown operator 'foo'", "known: "),
    "after-four-bytes": (with_pattern("'linear(𠮷, ^foo(x))'"), "unknown operator 'foo'", "known: "),
    "after-two-bytes-named": (with_pattern('"where(é=_, ü=_, ^foo(x))"'), "unknown operator 'foo'", "known: "),
    "after-two-bytes-unmatched": (with_pattern('"add(é=_, b=_)^)"'), "pattern syntax: unmatched", "for example"),
    "after-another-key-of-many-bytes": (
        with_match('{within: "größer → 😀", pattern: "linear(x, ^foo(w))"}'),
        "unknown operator 'foo'",
        "known: ",
    ),
    "after-blanks": (with_pattern('"linear(x,   ^foo(w))  "'), "unknown operator 'foo'", "known: "),
    "490-signs": (
        with_pattern(f'"^{"-" * 490}x"'),
        r"^found '\.\.\.' where an operator is wanted",
        "with its operands",
    ),
    "maybe-double-star": (with_pattern('"add(maybe(dropout, **^z)(_), y)"'), r"^found \*\* in", "operator names"),
    "named-anything": (with_pattern('"add(^_=linear(_), b)"'), "'_' is no name", "another name"),
    "named-maybe": (with_pattern('"add(b, ^maybe=_)"'), "'maybe' is .* here used as a capture", "another name"),
    "never-closed": (with_pattern('"linear^(x, w"'), "pattern syntax: .*never closed", "for example"),
    "unmatched": (with_pattern('"linear(x, w)^)"'), "pattern syntax: unmatched", "for example"),
    "unmatched-after-named": (with_pattern('"add(a=_, b=_)^)"'), "pattern syntax: unmatched", "for example"),
    "two-statements": (with_pattern('"linear(x)^; gelu(x)"'), "pattern syntax: ", "for example"),
    "no-operator": (with_pattern('"^x"'), "found 'x' where an operator is wanted", "an operator with its operands"),
    "operand": (with_pattern('"linear(x, ^1)"'), "found '1' where an operator is wanted", "with its operands"),
    "maybe-outermost": (with_pattern('"^maybe(mul)(_)"'), "cannot be optional", "around maybe"),
    "captured-twice": (with_pattern('"^linear(x, x)"'), "'x' is captured twice", "each capture name once"),
    "too-long": (with_pattern(f'"^linear(x){" " * 500}"'), "has 509 characters", "at most 500"),
    # Read, never evaluated.
    "import": (with_pattern("\"^__import__('os')(x)\""), "only maybe.* may be called twice", "write maybe"),
    "import-call": (with_pattern("\"^__import__('os').system('true')\""), "as an operator", "plain name"),
    "open": (with_pattern("\"linear(x, ^open('/etc/passwd'))\""), "unknown operator 'open'", "known: "),
    "comprehension": (with_pattern('"linear(^[y for y in x])"'), "where an operator is wanted", "with its operands"),
}

MEANING: Cases = {
    "schema-2": (f"schema: ^2\nname: mine\n{RULES}", "schema 2 is not known", "this release reads schema 1"),
    "schema-0": (f"schema: ^0\nname: mine\n{RULES}", "schema 0 is not known", "this release reads schema 1"),
    "schema-negative": (f"schema: ^-1\nname: mine\n{RULES}", "schema -1 is not known", "reads schema 1"),
    "capture-not-in-pattern": (
        with_quantize("{x: default, ^y: default}"),
        "rule 'first' quantizes 'y', which its pattern does not capture",
        "the pattern captures: x, w$",
    ),
    "capture-of-no-captures": (
        RULES_WITH.format(match='{pattern: "linear(_)"}', quantize="{^x: default}"),
        "rule 'first' quantizes 'x'",
        "the pattern captures: none$",
    ),
    "anything-is-no-capture": (
        RULES_WITH.format(match='{pattern: "linear(_, w)"}', quantize="{^_: default}"),
        "rule 'first' quantizes '_'",
        "the pattern captures: w$",
    ),
    **{
        f"quantizer-name-{name}": (
            with_quantize(f"{{x: ^{{as: '{name}'}}}}"),
            f"'{re.escape(name)}' is no quantizer name",
            "ending in _quantizer",
        )
        for name in ("q", "Q_quantizer", "_quantizer", "a.b_quantizer", "q-quantizer", "q_quantizer ", "q_quantizers")
    },
    "unknown-calibrator": (with_calibrator("^mean"), "unknown calibrator 'mean'", "max, histogram, percentile"),
    "unknown-calibrator-name": (with_calibrator("^{name: mean}"), "unknown calibrator 'mean'", "write one of max"),
    "calibrator-in-capitals": (with_calibrator("^Max"), "unknown calibrator 'Max'", "write one of max"),
    **{
        f"percentile-of-{name}": (
            with_calibrator(f"^{{name: {name}, percentile: 99.9}}"),
            f"calibrator '{name}' takes no percentile",
            "name: percentile",
        )
        for name in ("max", "histogram", "entropy", "mse", "best")
    },
    **{
        f"percentile-{value}": (
            with_calibrator(f"^{{name: percentile, percentile: {value}}}"),
            r"percentile .* is outside \(0, 100\]",
            "99.99",
        )
        for value in ("0", "0.0", "-1", "100.01", "9999")
    },
    "num-bins-of-max": (with_calibrator("^{name: max, num_bins: 256}"), "'max' keeps no histogram", "remove"),
    **{
        f"num-bins-{value}": (
            with_calibrator(f"^{{name: entropy, num_bins: {value}}}"),
            f"num_bins {value} is outside 128 to 1048576",
            "2048",
        )
        for value in ("-1", "0", "127", "1048577")
    },
    **{
        f"num-bits-{value}": (with_spec(f"^{{num_bits: {value}}}"), f"num_bits {value} is outside 2 to 16", "8")
        for value in ("-8", "0", "1", "17")
    },
    **{
        f"axis-{value}": (with_spec(f"^{{axis: {value}}}"), f"axis {value} is outside -1 to 3", "or null")
        for value in ("-4", "-2", "4", "768")
    },
    **{
        f"axis-with-{name}": (
            with_spec(f"^{{axis: 0, calibrator: {name}}}"),
            f"calibrator '{name}' needs one range per tensor, but axis is 0",
            r"axis: null, or calibrator: max \(for weights also mse\)$",
        )
        for name in ("histogram", "percentile", "entropy", "best")
    },
    **{
        f"max-amax-{value}": (
            with_spec(f"^{{max_amax: {value}}}"),
            "^max_amax .* is no range$",
            "^write a number above 0, for example 10$",
        )
        for value in ("0", "0.0", "-1", "-0.5")
    },
    # A list that names nothing has a place of its own.
    **{
        f"share-{key}-nothing": (
            with_share(f"{{why: w, {key}: ^[]}}"),
            f"^{key} names nothing$",
            r"^write a glob such as 'add_\*', or leave it out$",
        )
        for key in ("sites", "rules", "captures")
    },
    "share-layers-nothing": (with_share("^{why: w, layers: []}"), "layers names no layer", r"all, 0 or \[0, 1\]"),
    "share-layers-negative": (with_share("^{why: w, layers: -1}"), "^layer -1 does not exist$", "count from 0"),
    "share-within-nothing": (with_share("^{why: w, within: []}"), "within names no module", "glob such as"),
    "unsigned-and-narrow": (
        with_spec("^{unsigned: true, narrow_range: true}"),
        "narrow_range .* the grid is unsigned",
        "remove one",
    ),
    # 'default' has a meaning already. What is wrong is the set of names, so the place is where the file's keys begin.
    **{
        f"spec-called-default-{name}": (
            f"# mine\n^{HEAD}specs: {{a: default, default: {spec}}}\n{RULES}",
            "a spec is called 'default', which means pytorch-quantization's default descriptors",
            "rename it",
        )
        for name, spec in {"as-it-is": "default", "otherwise": "{num_bits: 4}"}.items()
    },
    # What a scope or a count says is refused where its rule begins.
    "within-nothing": (
        with_match('{pattern: "linear(x)", within: []}').replace("- name", "- ^name"),
        "within names no module",
        "glob such as",
    ),
    "layers-nothing": (
        with_match('{pattern: "linear(x)", layers: []}').replace("- name", "- ^name"),
        "layers names no layer",
        r"all, 0 or \[0, 1\]",
    ),
    **{
        f"layers-{value}": (
            with_match(f'{{pattern: "linear(x)", layers: {value}}}').replace("- name", "- ^name"),
            "^layer -1 does not exist$",
            "layers count from 0",
        )
        for value in ("-1", "[-1]", "[0, -1]")
    },
    **{
        f"count-{key.partition(':')[0]}-{value}": (
            with_key(f"expect: {{{key.format(value)}}}").replace("- name", "- ^name"),
            "^a count of -1 cannot be$",
            "write 0 or more",
        )
        for key in ("per_layer: {}", "total: {}", "model_types: {{bert: {}}}")
        for value in ("-1", "[6, -1]", "{min: -1}", "{max: -1}")
    },
    **{
        f"count-range-{key.partition(':')[0]}": (
            with_key(f"expect: {{{key.format('{min: 5, max: 2}')}}}").replace("- name", "- ^name"),
            "^no count is at least 5 and at most 2$",
            "exchange them",
        )
        for key in ("per_layer: {}", "total: {}", "model_types: {{bert: {}}}")
    },
}

SECOND = """\
  - {name: second, why: w, match: {pattern: "gelu(x)"}, quantize: {x: {as: x_quantizer}}}
"""

#: Checks over the whole of a file, with what it extends: the mark stands on the line that the error must name. Which
#: key of the rule or of the exclude entry is meant cannot be said, so there is no column.
WHOLE: Cases = {
    "undefined-spec": (
        with_quantize("{x: int4}").replace("- name", "- ^name"),
        "rule 'first' uses the spec 'int4', which is not defined",
        "known: default$",
    ),
    "undefined-spec-beside-others": (
        with_spec("default").replace("x: default", "x: {spec: t}").replace("- name", "- ^name"),
        "rule 'first' uses the spec 't', which is not defined",
        "known: default, s$",
    ),
    "undefined-spec-of-the-second-rule": (
        GOOD + "  # a comment\n\n^" + SECOND.replace("as: x_quantizer", "spec: t"),
        "rule 'second' uses the spec 't', which is not defined",
        "known: default$",
    ),
    "one-quantizer-in-two-rules": (
        "# a comment\n" + with_quantize("{x: {as: x_quantizer}}") + "^" + SECOND,
        "^rules 'first' and 'second' both name a quantizer 'x_quantizer'$",
        "its own name under 'as'",
    ),
    "one-quantizer-twice-in-a-rule": (
        with_quantize("{x: {as: x_quantizer}, w: {as: x_quantizer}}").replace("- name", "- ^name"),
        "^rule 'first' twice names a quantizer 'x_quantizer'$",
        "its own name under 'as'",
    ),
    "one-quantizer-twice-in-the-second-rule": (
        GOOD + "^" + SECOND.replace("gelu(x)", "add(x, y)").replace("}}}", "}, y: {as: x_quantizer}}}"),
        "^rule 'second' twice names a quantizer 'x_quantizer'$",
        "its own name under 'as'",
    ),
    "two-rules-of-one-name": (
        GOOD + "^" + SECOND.replace("second", "first"),
        "^two rules are called 'first'$",
        "rename one",
    ),
    "exclude-unknown-rule": (
        with_exclude("^{why: w, rules: second}"),
        "exclude names the rule 'second', which does not exist",
        "^rules: first$",
    ),
    "exclude-unknown-glob": (
        with_exclude("^{why: w, rules: [first, 'sec*']}"),
        r"exclude names the rule 'sec\*', which does not exist",
        "^rules: first$",
    ),
    "exclude-unknown-rule-in-the-second-entry": (
        with_exclude("{why: w, rules: first}\n  - why: w\n    layers: 0\n    rules: third").replace("- why", "- ^why"),
        "exclude names the rule 'third', which does not exist",
        "^rules: first$",
    ),
    "exclude-unknown-rule-of-several": (
        GOOD + SECOND.replace("second", "a-rule") + "exclude:\n  - ^{why: w, rules: [third]}\n",
        "exclude names the rule 'third', which does not exist",
        "^rules: a-rule, first$",
    ),
    "exclude-from-no-rules": (
        HEAD + "rules: []\nexclude:\n  - ^{why: w, rules: '*'}\n",
        r"exclude names the rule '\*', which does not exist",
        "^rules: none$",
    ),
    "share-unknown-rule": (
        with_share("^{why: w, rules: second}"),
        "^share names the rule 'second', which does not exist$",
        "^rules: first$",
    ),
    "share-unknown-glob-optional": (
        with_share("^{why: w, rules: [first, 'sec*'], optional: true}"),
        r"^share names the rule 'sec\*', which does not exist$",
        "^rules: first$",
    ),
    "share-unknown-rule-in-the-second-entry": (
        with_share("{why: w, rules: first}\n  - why: w\n    layers: 0\n    rules: third").replace("- why", "- ^why"),
        "^share names the rule 'third', which does not exist$",
        "^rules: first$",
    ),
    "share-behind-an-exclude": (
        with_exclude("{why: w, rules: first}") + "share:\n  - ^{why: w, rules: second}\n",
        "^share names the rule 'second', which does not exist$",
        "^rules: first$",
    ),
}

BAD: dict[str, Cases] = {
    "not-yaml": NOT_YAML,
    "not-data": NOT_DATA,
    "missing": MISSING,
    "unknown-key": UNKNOWN_KEY,
    "repeated-key": REPEATED_KEY,
    "type": {**NOT_A_TEXT, **SURROGATES, **NOT_WHOLE, **NOT_A_NUMBER, **NOT_A_BOOLEAN, **NOT_A_LIST, **NOT_A_MAPPING},
    "pattern": PATTERNS,
    "meaning": MEANING,
}


@pytest.mark.parametrize(
    ("text", "found", "fix"),
    [pytest.param(*case, id=f"{group}-{name}") for group, cases in BAD.items() for name, case in cases.items()],
)
def test_refused_at(text: str, found: str, fix: str, tmp_path: Path) -> None:
    path, line, column = write_marked(tmp_path / "mine.yaml", text)
    check(refusal(path), path, line, column, found, fix)


@pytest.mark.parametrize(("text", "found", "fix"), [pytest.param(*case, id=name) for name, case in WHOLE.items()])
def test_refused_on_the_line(text: str, found: str, fix: str, tmp_path: Path) -> None:
    path, line, _ = write_marked(tmp_path / "mine.yaml", text)
    check(refusal(path), path, line, None, found, fix)


def test_the_file_that_the_bad_ones_are_made_from_is_good(tmp_path: Path) -> None:
    # Otherwise a bad file could be refused for another reason than the one it was written for.
    assert [rule.name for rule in load_rules(write(tmp_path / "a.yaml", GOOD)).rules] == ["first"]
    assert load_rules(write(tmp_path / "b.yaml", with_spec("{num_bits: 4}"))).spec("s") == QuantSpec(4)
    assert load_rules(write(tmp_path / "c.yaml", with_exclude("{why: w, rules: first}"))).exclude[0].why == "w"
    assert load_rules(write(tmp_path / "d.yaml", with_share("{why: w, rules: first}"))).share[0].why == "w"
    assert load_rules(write(tmp_path / "e.yaml", with_calibration("{dropout: true}"))).calibration.dropout


@pytest.mark.parametrize("end", [pytest.param("\r\n", id="crlf"), pytest.param("\r", id="cr")])
def test_other_line_ends_are_counted_as_lines(end: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", GOOD.replace("\n", end) + f"    optional: yes{end}")
    check(refusal(path), path, 8, 15, "optional is 'yes'", "true or false")


def test_a_byte_order_mark_is_no_character(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "\N{BYTE ORDER MARK}" + GOOD)
    assert load_rules(path).name == "mine"
    path = write(tmp_path / "mine.yaml", "\N{BYTE ORDER MARK}Schema: 1\n" + GOOD)
    check(refusal(path), path, 1, 1, "unknown key 'Schema'", "known: ")


# -- the file as a whole ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "found", "fix"),
    [
        pytest.param(b"", "the file is empty", "schema, name and rules", id="empty"),
        pytest.param(b"\n\n", "the file is empty", "schema, name and rules", id="blank-lines"),
        pytest.param(b"# only a comment\n", "the file is empty", "schema, name and rules", id="comment"),
        pytest.param(GOOD.encode("utf-16"), "not UTF-8 at byte 0", "save the file as UTF-8", id="utf-16"),
        pytest.param("schema: 1\nname: é\n".encode("latin-1"), "not UTF-8 at byte 16", "as UTF-8", id="latin-1"),
        pytest.param(
            GOOD.encode() + b"# \xed\xa0\x80\n", f"not UTF-8 at byte {len(GOOD) + 2}", "UTF-8", id="surrogate"
        ),
        pytest.param(bytes(range(128, 256)), "not UTF-8 at byte 0", "save the file as UTF-8", id="bytes"),
        pytest.param(b"schema: 1\0\n", "not YAML: special characters", "remove the character", id="nul"),
        # What PyYAML itself trips over, with an error that is not its own; the wording is Python's.
        *(
            pytest.param(f'{HEAD}why: "{escape}"\n{RULES}'.encode(), "^not YAML: ", "remove the escape", id=escape[1:])
            for escape in (r"\UFFFFFFFF", r"\U00110000", r"\U80000000")
        ),
        pytest.param(
            f"%YAML 1.{'1' * 5000}\n---\n{GOOD}".encode(),
            "^not YAML: .{1,60}$",
            "remove the escape or the directive",
            id="version-of-5000-digits",
        ),
        pytest.param(b"schema: 1\nname: \x07\n", "not YAML: special characters", "remove the character", id="bell"),
    ],
)
def test_no_line_where_the_whole_file_is_meant(content: bytes, found: str, fix: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    check(refusal(path), path, None, None, found, fix)


def test_a_file_of_10_megabytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "mine.yaml", GOOD)
    with path.open("ab") as file:
        file.truncate(10 << 20)

    def read(*_: Any, **__: Any) -> str:
        raise AssertionError("the file was read")

    monkeypatch.setattr(os, "open", read)
    check(refusal(path), path, None, None, "the file has 10485760 bytes", "at most 65536")


def test_the_largest_file_has_64_kibibytes(tmp_path: Path) -> None:
    comment = "# " + "x" * 97 + "\n"
    text = GOOD + comment * ((1 << 16) // len(comment))
    text = text[: (1 << 16) - 1] + "\n"
    assert load_rules(write(tmp_path / "mine.yaml", text)).name == "mine"
    path = write(tmp_path / "mine.yaml", text + "\n")
    check(refusal(path), path, None, None, "the file has 65537 bytes", "at most 65536")


@pytest.mark.parametrize(
    ("text", "column"),
    [
        pytest.param("[" * 16_000, 17, id="open-brackets"),
        pytest.param("[" * 32_000 + "]" * 32_000, 17, id="brackets"),
        pytest.param("{" * 16_000, 17, id="open-braces"),
        pytest.param("{a: " * 8_000, 65, id="open-mappings"),
        pytest.param("- " * 16_000, 33, id="dashes"),
        pytest.param("? " * 16_000, 33, id="question-marks"),
        pytest.param("[" * 65_500, 17, id="as-many-brackets-as-fit#-brackets"),
    ],
)
def test_deep_nesting_is_refused_where_it_is(
    text: str, column: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "mine.yaml", f"# schema: 1\n{text}")
    composed = nodes_made(monkeypatch)
    check(refusal(path), path, 2, column, "nested deeper than 16 levels", "a rule file needs five")
    assert len(composed) <= 16


def test_sixteen_levels_are_still_read(tmp_path: Path) -> None:
    # The text is refused for what it is, not for its depth.
    path, line, column = write_marked(tmp_path / "mine.yaml", f"{HEAD}why: ^{'[' * 15}{']' * 15}\n{RULES}")
    check(refusal(path), path, line, column, "why is a list, not a text", "write a word")


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "mine.yaml", GOOD)
    monkeypatch.setattr(os, "open", read)  # chmod would stop nobody who runs the tests as root
    check(refusal(path), path, None, None, "cannot be read: Permission denied", "check the path and its permissions")


@pytest.mark.parametrize("name", ["", "nope", "nope.yaml", "QDQBERT", "qdqbert.yaml", ".", "~/nope.yaml", "a\0b"])
def test_no_such_rules(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = refusal(name)
    assert f"rules: '{name}' is neither a shipped rule set nor a file" in error.found
    assert re.search("shipped: .*qdqbert.*; or give the path of a YAML file", error.fix)
    assert (error.path, error.line, error.column) == (None, None, None)
    assert str(error) == printable(f"{error.found}; {error.fix}")


#: For a file's name, and for a path.
TOO_LONG = [
    pytest.param("a" * 300, id="name"),
    pytest.param("a" * 5000, id="path"),
    pytest.param("a/" * 5000, id="dirs"),
]


@pytest.mark.parametrize("name", TOO_LONG)
@pytest.mark.parametrize("type_", [str, Path])
def test_a_name_too_long_for_a_file(name: str, type_: type[str | Path]) -> None:
    error = refusal(type_(name))
    assert error.found == f"rules: '{name[:197]}...' is neither a shipped rule set nor a file"
    assert re.search("shipped: .*qdqbert.*; or give the path of a YAML file", error.fix)
    assert (error.path, error.line, error.column) == (None, None, None)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_file(*_: Any, **__: Any) -> bool:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "mine.yaml", GOOD)
    monkeypatch.setattr(Path, "is_file", is_file)  # chmod would stop nobody who runs the tests as root
    assert "is neither a shipped rule set nor a file" in refusal(path).found


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    error = refusal(tmp_path)
    assert f"'{tmp_path}' is neither a shipped rule set nor a file" in error.found
    assert error.line is None


def test_a_broken_link_is_no_file(tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(tmp_path / "nowhere.yaml")
    assert "is neither a shipped rule set nor a file" in refusal(link).found


def test_a_circle_of_links_is_no_file(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.symlink_to(two)
    two.symlink_to(one)
    assert "is neither a shipped rule set nor a file" in refusal(one).found


def test_the_error_is_the_packages_own(tmp_path: Path) -> None:
    error = refusal(write(tmp_path / "mine.yaml", "schema: [1\n"))
    assert isinstance(error, QdqSurgeryError)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        pytest.param({}, "found; fix", id="no-place"),
        pytest.param({"path": Path("a.yaml")}, "a.yaml: found; fix", id="path"),
        pytest.param({"path": "a.yaml", "line": 3}, "a.yaml:3: found; fix", id="line"),
        pytest.param({"path": "a.yaml", "line": 3, "column": 7}, "a.yaml:3:7: found; fix", id="column"),
        # A column counts from its line; a pattern that is read alone has only a column, and no place to print.
        pytest.param({"column": 7}, "found; fix", id="column-alone"),
    ],
)
def test_the_message_begins_with_the_place(keys: dict[str, Any], text: str) -> None:
    error = RuleFileError("found", "fix", **keys)
    assert str(error) == text
    assert (error.found, error.fix) == ("found", "fix")


def test_nothing_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    attempts = [
        with_pattern("\"__import__('pathlib').Path('ran').touch()\""),
        with_pattern("\"linear(x, open('ran', 'w'))\""),
        with_pattern('"linear(f\'{open(\\"ran\\", 1)}\')"'),
        f"{HEAD}why: !!python/object/apply:os.system ['touch ran']\n{RULES}",
        f"{HEAD}why: !!python/object/new:subprocess.Popen [[touch, ran]]\n{RULES}",
    ]
    for index, text in enumerate(attempts):
        refusal(write(tmp_path / f"{index}.yaml", text))
    # A text stays a text, whatever it looks like.
    lines = "{{ open('ran', 'w') }} ${HOME} $(touch ran) %s"
    assert load_rules(write(tmp_path / "text.yaml", f'{HEAD}why: "{lines}"\n{RULES}')).why == lines
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        pytest.param(f"schema: ^LONG\nname: mine\n{RULES}", "x", id="schema"),
        pytest.param(f"schema: ^LONG\nname: mine\n{RULES}", "1", id="schema-digits"),
        pytest.param(f"{HEAD}extends: ^LONG\n", "x", id="extends"),
        pytest.param(f"{HEAD}rules: ^LONG\n", "x", id="list"),
        pytest.param(with_spec("^LONG"), "x", id="mapping"),
        pytest.param(with_pattern('"^LONG"'), "x", id="pattern"),
        pytest.param(with_key("optional: ^LONG"), "x", id="boolean"),
        pytest.param(with_calibrator("{name: percentile, percentile: ^LONG:1.5}"), "1", id="number"),
        pytest.param("^LONG\n", "x", id="file"),
    ],
)
def test_a_scalar_that_fills_the_file_is_not_quoted_whole(text: str, letter: str, tmp_path: Path) -> None:
    path, line, column = write_marked(tmp_path / "mine.yaml", text.replace("LONG", letter * ((1 << 16) - 1000)))
    error = refusal(path)
    assert (error.path, error.line, error.column) == (path.resolve(), line, column)
    assert len(error.found) + len(error.fix) < 420


def nodes_made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Gets an entry for each YAML node that is made from now on."""
    made: list[Any] = []
    compose = yaml.SafeLoader.compose_node

    def counted(self: yaml.SafeLoader, parent: Any, index: Any) -> Any:
        node = compose(self, parent, index)
        made.append(node)
        return node

    monkeypatch.setattr(yaml.SafeLoader, "compose_node", counted)
    return made


# -- a file of a stranger --------------------------------------------------------------------------------------------

SECRET = "root:x:0:0:secret:/root:/bin/sh"


@pytest.fixture(params=["fifo", "device", "directory", "link-to-a-fifo"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "special.yaml"
    if request.param == "fifo":
        os.mkfifo(path)
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    elif request.param == "directory":
        path.mkdir()
    else:
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to(tmp_path / "fifo")
    return path


def test_a_special_file_is_never_opened(special: Path, tmp_path: Path) -> None:
    # Opening a FIFO would block for ever.
    assert "is neither a shipped rule set nor a file" in refusal(special).found
    path, line, column = write_marked(tmp_path / "mine.yaml", f"{HEAD}extends: ^{special.name}\n")
    check(refusal(path), path, line, column, "extends: 'special.yaml' is neither", "give the path")


def test_a_special_file_that_takes_the_place_of_a_rule_file_is_never_opened(
    special: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    error = refusal(special)
    assert re.search(r"^cannot be read: it is a (FIFO|device|directory), no regular file$", error.found)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "secret", "secret.txt", "../secret.json", "secret.yaml/", "secret.YAML"]
)
def test_extends_names_only_rule_files(name: str, tmp_path: Path) -> None:
    for file in ("secret", "secret.txt", "secret.YAML"):
        write(tmp_path / file, SECRET)
    path, line, column = write_marked(tmp_path / "mine.yaml", f"{HEAD}extends: ^{name}\n")
    check(refusal(path), path, line, column, "^extends: '.*' is neither a shipped rule set nor a file$", ".yaml file$")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(SECRET, id="a-word"),
        pytest.param(f"{SECRET}\n{SECRET}\n", id="lines"),
        pytest.param(f"[{SECRET}]", id="list"),
        pytest.param("secret: 1\n", id="key"),
        pytest.param("a: !secret b\n", id="tag"),
        pytest.param("a: !secret!x b\n", id="tag-handle"),
        pytest.param("a: *secret\n", id="alias"),
        pytest.param("%secret 1\n--- a\n", id="directive"),
        pytest.param('a: "\\secret"\n', id="escape"),
        pytest.param("- secret: 1\n  - secret\n", id="indentation"),
        pytest.param("secret: 1\nsecret: 2\n", id="twice"),
        pytest.param("secret: {a: @b}\n", id="at-sign"),
    ],
)
def test_nothing_is_quoted_from_what_is_no_rule_file(text: str, tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", text)
    path = write(tmp_path / "mine.yaml", f"{HEAD}extends: base.yaml\n")
    error = refusal(path)
    assert error.path == base.resolve()
    assert "secret" not in str(error).replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("letter", "code"),
    [
        (r"\0", "0000"),
        (r"\x1b", "001B"),
        (r"\x7f", "007F"),
        (r"\x85", "0085"),
        (r"\u200b", "200B"),
        (r"\u202e", "202E"),
        (r"\u2028", "2028"),
        (r"\ufeff", "FEFF"),
        (r"\n", "000A"),
    ],
)
@pytest.mark.parametrize(
    ("text", "what"),
    [
        pytest.param(f'schema: 1\nname: ^"aXb"\n{RULES}', "name", id="name"),
        pytest.param(f'{HEAD}extends: ^"aXb"\n', "extends", id="extends"),
        pytest.param(f'{HEAD}specs: {{^"aXb": default}}\n{RULES}', "a key", id="spec"),
        pytest.param(GOOD.replace("first", '^"aXb"'), "name", id="rule"),
        pytest.param(GOOD.replace("it pays", '^"aXb"'), "why", id="why"),
        pytest.param(with_quantize('{x: ^"aXb"}'), "quantize.x", id="place"),
        pytest.param(with_exclude('{why: w, sites: [a, ^"aXb"]}'), "sites", id="glob"),
        pytest.param(with_exclude('{^"aXb": w, sites: a}'), "a key", id="key"),
        pytest.param(with_key('expect: {model_types: {^"aXb": 1}}'), "a key", id="model-type"),
    ],
)
def test_hidden_characters_are_refused_where_they_stand(
    text: str, what: str, letter: str, code: str, tmp_path: Path
) -> None:
    path, line, column = write_marked(tmp_path / "mine.yaml", text.replace("X", letter))
    if (what, letter) == ("why", r"\n"):
        assert load_rules(path).rules[0].why == "a\nb"  # a reason may take several lines
        return
    error = refusal(path)
    check(error, path, line, column, rf"^{what} has the hidden character U\+{code}$", "remove it")
    assert str(error).isprintable()


@pytest.mark.parametrize("name", ["a\x1b[2J.yaml", "a\nb.yaml", "a\u202eb.yaml"])
def test_names_of_files_are_printed_so_that_they_show(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, GOOD)
    assert load_rules(path).rules[0].source == f"{printable(name)}:4"
    write(path, GOOD.replace("x: default", "x: nope"))
    error = refusal(path)
    assert error.line == 4
    assert str(error).isprintable()


# -- what reading costs ----------------------------------------------------------------------------------------------


def test_a_file_is_read_once_and_each_value_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for rules in (16, 32, 64, 128):
        path = write(tmp_path / f"{rules}.yaml", f"{HEAD}rules:\n" + "".join(map(RULE.format, range(rules))))
        with monkeypatch.context() as patch:
            made = nodes_made(patch)
            assert len(load_rules(path).rules) == rules
        counts.append(len(made))
    # Twice the rules are twice the nodes, whatever the rest has.
    first, *steps = [after - before for before, after in pairwise(counts)]
    assert steps == [2 * first, 4 * first]


RULE = '  - {{name: rule{0}, why: w, match: {{pattern: "linear(x, w)"}}, quantize: {{x: {{as: x{0}_quantizer}}}}}}\n'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        pytest.param(
            f"{HEAD}rules:\n" + "".join(map(RULE.format, range(129))), "^rules has 129 entries$", id="129-rules"
        ),
        pytest.param(f"{HEAD}rules:\n" + "".join(map(RULE.format, range(400))), "too many values$", id="400-rules"),
        pytest.param(
            with_exclude("{why: w, rules: [" + "first, " * 1025 + "]}"), "more than 1024 entries$", id="1025-globs"
        ),
        pytest.param(
            f"{GOOD}exclude:\n" + "  - {why: w, rules: [first]}\n" * 260,
            "^exclude has 260 entries$",
            id="260-entries",
        ),
        pytest.param(
            with_exclude("{why: w, rules: [" + "first, " * 6000 + "]}"), "more than 1024 entries$", id="6000-globs"
        ),
        pytest.param(
            f"{HEAD}specs: {{{', '.join(f's{index}: default' for index in range(1025))}}}\n{RULES}",
            "^specs has 1025 keys$",
            id="1025-specs",
        ),
    ],
)
def test_what_a_rule_file_has_too_much_of_is_refused(text: str, found: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", text)
    error = refusal(path)
    assert re.search(found, error.found)
    assert error.line is not None


def test_a_chain_of_files_has_one_limit(tmp_path: Path) -> None:
    # Four files of 64 KiB are as much as may be read; the fifth is refused before it is opened.
    comment = "#" * ((1 << 16) - 200) + "\n"
    for index in range(1, 6):
        write(tmp_path / f"{index}.yaml", f"{comment}{HEAD}extends: {index + 1}.yaml\n")
    path = write(tmp_path / "5.yaml", f"{'#' * ((1 << 16) - 200)}\n{GOOD}")
    check(refusal(tmp_path / "1.yaml"), path, None, None, "one too many, with", "at most 262144 bytes")
    assert load_rules(tmp_path / "2.yaml").name == "mine"


def test_a_chain_of_files_has_one_limit_of_values(tmp_path: Path) -> None:
    globs = ", ".join(["first"] * 1000)
    write(tmp_path / "1.yaml", with_exclude(f"{{why: w, rules: [{globs}]}}"))
    for index in range(2, 7):
        write(
            tmp_path / f"{index}.yaml",
            f"{HEAD}extends: {index - 1}.yaml\nexclude:\n  - {{why: w, rules: [{globs}]}}\n",
        )
    assert len(load_rules(tmp_path / "2.yaml").exclude) == 2
    error = refusal(tmp_path / "6.yaml")
    assert "too many values" in error.found
    assert error.path == (tmp_path / "4.yaml").resolve()


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
    expect: {}
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
